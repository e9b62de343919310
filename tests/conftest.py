"""Fixtures: small synthetic data, a small configuration, and one local Ray for a whole session."""

import os

# Before torch is imported: on a busy machine its threads wait for each other more than they work.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

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


@pytest.fixture
def shards_copy(shards: Path, tmp_path: Path) -> Path:
    """A copy of the shards that a test may damage."""
    return Path(shutil.copytree(shards, tmp_path / "data"))
