"""Shared fixtures: small synthetic data, a small configuration, and one local Ray."""

import os

from tests.places import TINY

# Set before torch is imported: on a busy machine its threads mostly wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

import functools
import shutil
import sys
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import fsspec
import pytest

from prioritycut_ray import cli
from prioritycut_ray.config import Config, load_config
from prioritycut_ray.errors import UserError
from tests.s3_server import S3, s3_server


@pytest.fixture
def tiny() -> Config:
    """The configuration of small networks at 32x32."""
    return load_config(str(TINY))


@pytest.fixture(scope="session")
def puppet_videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of six synthetic puppet clips, 32x32, 12 frames each."""
    from prioritycut_ray.data.puppets import render_clip
    from prioritycut_ray.video.encoding import write_video

    folder = tmp_path_factory.mktemp("puppets")
    for seed in range(6):
        frames = render_clip(seed, size=32, frames=12).frames
        write_video(folder / f"puppet_{seed}.mp4", frames, 12.0)
    return folder


@pytest.fixture(params=["decord", "pyav", "torchcodec"])
def decoder(request: pytest.FixtureRequest) -> str:
    """Each library that decodes clips, if it is installed here."""
    if reason := why_not_usable(request.param):
        pytest.skip(reason)
    return str(request.param)


@functools.cache
def why_not_usable(decoder: str) -> str:
    from prioritycut_ray.video.random_access import check_decoder

    try:
        check_decoder(decoder)
    except UserError as error:
        return str(error)
    return ""


@pytest.fixture(scope="session")
def local_ray() -> Iterator[None]:
    """One Ray instance with two CPUs for the whole test session."""
    import ray

    assert "RAY_ADDRESS" not in os.environ, "unset RAY_ADDRESS: tests start their own Ray"
    _start_ray()
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def restarted_ray(local_ray: None) -> Iterator[None]:
    """The local Ray, restarted after the module: for tests that leave some of its CPUs occupied."""
    import ray

    yield
    ray.shutdown()
    _start_ray()


def _start_ray() -> None:
    import ray

    ray.init(
        num_cpus=2, object_store_memory=200_000_000, log_to_driver=False, logging_level="ERROR"
    )


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory, puppet_videos: Path, local_ray: None) -> Path:
    """The packed puppet clips: five for training, one for testing."""
    from prioritycut_ray.packing.pipeline import pack_videos

    out = tmp_path_factory.mktemp("packed") / "data"
    pack_videos([str(puppet_videos)], str(out), size=32)
    return out


@pytest.fixture(scope="session")
def server() -> Iterator[S3]:
    """A real S3 API on this machine that s3:// leads to; one per session, as clients are cached."""
    with s3_server() as running, pytest.MonkeyPatch.context() as patch:
        for name, value in running.variables.items():
            patch.setenv(name, value)
        yield running


@pytest.fixture
def bucket(server: S3) -> str:
    """The URL of a new bucket."""
    name = f"bucket-{uuid.uuid4().hex[:12]}"
    fsspec.filesystem("s3").mkdir(name)
    return f"s3://{name}"


@pytest.fixture
def shards_copy(shards: Path, tmp_path: Path) -> Path:
    """A copy of the shards that the test may damage."""
    return Path(shutil.copytree(shards, tmp_path / "data"))


class Result(NamedTuple):
    """The outcome of a command."""

    returncode: int
    stdout: str
    stderr: str


@pytest.fixture
def prioritycut(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> Callable[..., Result]:
    """Run the command line's entry point in this process, as torch is slow to import."""
    monkeypatch.chdir(tmp_path)

    def call(*words: str) -> Result:
        monkeypatch.setattr(sys, "argv", ["prioritycut", *words])
        capsys.readouterr()
        try:
            cli.main()
            code = 0
        except SystemExit as stop:
            code = int(stop.code or 0)
        return Result(code, *capsys.readouterr())

    return call


Prioritycut = Callable[..., Result]


def assert_one_line(result: Result, *fragments: str) -> None:
    """The command failed with one error line that contains the fragments."""
    assert result.returncode == 1, result.stderr
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("error: ")
    for fragment in fragments:
        assert fragment in lines[0]
