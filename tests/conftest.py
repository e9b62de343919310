"""Fixtures: small synthetic data, a small configuration, and one local Ray for a whole session."""

import os

# Before torch is imported: on a busy machine its threads wait for each other more than they work.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import shutil
import sys
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from rich.console import Console

from prioritycut_ray import cli
from prioritycut_ray.config import Config, load_config

TINY = Path(__file__).parent / "data" / "tiny.yaml"


@pytest.fixture
def tiny() -> Config:
    """Small networks at 32x32, for tests."""
    return load_config(str(TINY))


@pytest.fixture(scope="session")
def puppet_videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of six synthetic puppet clips, 32x32, 12 frames each."""
    from prioritycut_ray.data.puppets import render_clip
    from prioritycut_ray.data.video import write_video

    folder = tmp_path_factory.mktemp("puppets")
    for seed in range(6):
        frames = render_clip(seed, size=32, frames=12).frames
        write_video(folder / f"puppet_{seed}.mp4", frames, 12.0)
    return folder


@pytest.fixture(scope="session")
def local_ray() -> Iterator[None]:
    """A Ray instance of this test session with two CPUs; ended with it."""
    import ray

    assert "RAY_ADDRESS" not in os.environ, "tests start their own Ray"
    ray.init(
        num_cpus=2, object_store_memory=200_000_000, log_to_driver=False, logging_level="ERROR"
    )
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory, puppet_videos: Path, local_ray: None) -> Path:
    """The puppet clips, packed: five to train, one to test."""
    from prioritycut_ray.data.packing import pack_videos

    out = tmp_path_factory.mktemp("packed") / "data"
    pack_videos([str(puppet_videos)], str(out), size=32)
    return out


@pytest.fixture(scope="session")
def object_store() -> Iterator[dict[str, str]]:
    """A real S3 API on this machine; gives the environment that leads s3:// there."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    environment = {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        yield environment
    server.stop()


@pytest.fixture
def bucket(object_store: dict[str, str]) -> str:
    """URL of a new bucket."""
    import fsspec

    url = f"s3://test-{uuid.uuid4().hex}"
    fsspec.filesystem("s3").mkdir(url)
    return url


@pytest.fixture
def shards_copy(shards: Path, tmp_path: Path) -> Path:
    """A copy of the shards that a test may damage."""
    return Path(shutil.copytree(shards, tmp_path / "data"))


class Result(NamedTuple):
    returncode: int
    stdout: str
    stderr: str


@pytest.fixture
def prioritycut(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> Callable[..., Result]:
    """Runs the command line's own entry point, in this process: torch is slow to import."""
    monkeypatch.chdir(tmp_path)

    def call(*words: str) -> Result:
        monkeypatch.setattr(sys, "argv", ["prioritycut", *words])
        monkeypatch.setattr(cli, "_debug", False)
        monkeypatch.setattr(cli, "console", Console(highlight=False, soft_wrap=True))
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
    assert result.returncode == 1, result.stderr
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("error: ")
    for fragment in fragments:
        assert fragment in lines[0]
