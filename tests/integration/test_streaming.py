"""The stream as training uses it: real ranks, real deaths, real object storage."""

import hashlib
import logging
import multiprocessing
import os
import signal
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch

from prioritycut_ray.config import DEFAULT_DECODER, Config
from prioritycut_ray.data.index import clips_of, read_index
from prioritycut_ray.data.shard_writer import Member
from prioritycut_ray.data.shards import read_clip
from prioritycut_ray.errors import UserError
from prioritycut_ray.storage import reading
from prioritycut_ray.training.trainer import prepare, training_batches
from prioritycut_ray.training.worker import Worker
from prioritycut_ray.video.random_access import DECODERS
from prioritycut_ray.video.source import Frame
from tests.clip_sets import clip_member, damage, write_members, write_set
from tests.s3_server import S3

# torch warns of more workers than cores.
pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")
GLOBAL_BATCH = 12
CPU = torch.device("cpu")


def config_of(tiny: Config, url: str, loader_workers: int = 0, **data: Any) -> Config:
    """Five steps over an epoch and a half, with all augmentations."""
    changes = {"url": url, "num_repeats": 6, "loader_workers": loader_workers, **data}
    return tiny.model_copy(
        update={
            "data": tiny.data.model_copy(update=changes),
            "train": tiny.train.model_copy(
                update={"batch_size": GLOBAL_BATCH, "samples": 5 * GLOBAL_BATCH}
            ),
        }
    )


def write_order(config: Config, rank: int, world_size: int, start: int, path: Path) -> None:
    """Write a line per sample that this rank trains on: its bytes as read, and as augmented."""
    torch.set_num_threads(1)
    worker = Worker(rank, world_size, CPU)
    with path.open("w") as file:
        for batch in training_batches(config, read_index(config.data.url), worker, start=start):
            pair = prepare(batch, config, CPU)
            for fields in zip(batch.source, batch.driving, pair.source, pair.driving, strict=True):
                print(*(digest(field) for field in fields), file=file)


def digest(tensor: torch.Tensor) -> str:
    return hashlib.sha256(tensor.contiguous().numpy().tobytes()).hexdigest()[:16]


def order_of(config: Config, world_size: int, folder: Path, start: int = 0) -> str:
    """Let ranks write their files at the same time, and merge them in the order of the samples."""
    folder.mkdir()
    context = multiprocessing.get_context("fork")
    paths = [folder / f"rank{rank}.txt" for rank in range(world_size)]
    ranks = [
        context.Process(target=write_order, args=(config, rank, world_size, start, path))
        for rank, path in enumerate(paths)
    ]
    try:
        for process in ranks:
            process.start()
        for process in ranks:
            process.join(120)
        assert [process.exitcode for process in ranks] == [0] * world_size
    finally:
        for process in ranks:
            process.kill()
    share = GLOBAL_BATCH // world_size
    lines = [path.read_text().splitlines(keepends=True) for path in paths]
    assert len({len(of_rank) for of_rank in lines}) == 1
    steps = range(0, len(lines[0]), share)
    return "".join(
        line for step in steps for of_rank in lines for line in of_rank[step : step + share]
    )


def test_order_files_of_any_number_of_ranks_and_workers_are_equal(
    tiny: Config, tmp_path: Path
) -> None:
    url = write_set(str(tmp_path / "set"), shard_bytes=10**9)
    assert len({clip.shard for clip in read_index(url).clips}) == 1  # Fewer shards than ranks.
    whole = order_of(config_of(tiny, url), 1, tmp_path / "whole")
    assert len(set(whole.splitlines())) == 5 * GLOBAL_BATCH
    for world_size, workers in [(1, 3), (2, 1), (3, 0), (3, 2), (4, 0), (4, 1)]:
        config = config_of(tiny, url, workers)
        assert order_of(config, world_size, tmp_path / f"{world_size}-{workers}") == whole


def test_order_resumes_on_another_number_of_ranks(tiny: Config, tmp_path: Path) -> None:
    url = write_set(str(tmp_path / "set"))
    whole = order_of(config_of(tiny, url, pairs_per_visit=5), 2, tmp_path / "whole")
    start = 2 * GLOBAL_BATCH
    rest = order_of(config_of(tiny, url, 2, pairs_per_visit=5), 3, tmp_path / "rest", start)
    assert rest.splitlines() == whole.splitlines()[start:]


@pytest.fixture
def deadly(monkeypatch: pytest.MonkeyPatch) -> Member:
    """A clip with a valid checksum that kills its decoder with a real SIGSEGV."""
    clip, decode = clip_member(6)._replace(key="deadly"), DECODERS[DEFAULT_DECODER]

    def decode_or_die(data: bytes, indices: Sequence[int] | None, size: int) -> Frame:
        if data == clip.data:
            os.kill(os.getpid(), signal.SIGSEGV)
        return decode(data, indices, size)

    monkeypatch.setitem(DECODERS, DEFAULT_DECODER, decode_or_die)
    return clip


def test_damage_and_crashes_are_skipped_alike_on_all_ranks(
    tiny: Config, tmp_path: Path, deadly: Member, caplog: Any
) -> None:
    url = write_members(str(tmp_path / "set"), [*map(clip_member, range(6)), deadly])
    damage(url, read_index(url).clips[2])
    config = config_of(tiny, url, 1)
    alone = tmp_path / "alone.txt"
    with caplog.at_level(logging.WARNING):
        write_order(config, 0, 1, 0, alone)
    assert len(alone.read_text().splitlines()) == 5 * GLOBAL_BATCH
    assert order_of(config, 3, tmp_path / "three") == alone.read_text()
    assert "a loader worker died (SIGSEGV at clip deadly)" in caplog.text
    assert "clip deadly is replaced by another one: its decoder dies (SIGSEGV)" in caplog.text
    assert "clip clip2 is replaced by another one" in caplog.text


# ---------------------------------------------------------------------------------------------
# Remote storage
# ---------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "FIRST_WAIT", 0.01)


def test_object_store_gives_the_same_order_through_a_cache(
    tiny: Config, tmp_path: Path, bucket: str
) -> None:
    local = write_set(str(tmp_path / "set"))
    url = write_set(f"{bucket}/set")
    whole = order_of(config_of(tiny, local), 1, tmp_path / "local")
    cache = tmp_path / "cache"
    config = config_of(tiny, url, 1, cache_dir=str(cache), cache_gb=0.001)
    assert order_of(config, 2, tmp_path / "remote") == whole
    assert sum(path.stat().st_size for path in cache.rglob("*") if path.is_file()) > 10_000
    # All clips lie in the cache now: the shards are not needed any more.
    for shard in {clip.shard for clip in read_index(url).clips}:
        fsspec.filesystem("s3").rm(f"{url}/{shard}")
    assert order_of(config, 1, tmp_path / "cached") == whole


def test_memory_file_system_gives_the_same_order(tiny: Config, tmp_path: Path) -> None:
    local = write_set(str(tmp_path / "set"))
    url = write_set(f"memory://{uuid.uuid4().hex}/set")
    whole = order_of(config_of(tiny, local), 1, tmp_path / "local")
    assert order_of(config_of(tiny, url, 1), 2, tmp_path / "memory") == whole


def test_transient_errors_of_an_object_store_are_retried(bucket: str, server: S3) -> None:
    url = write_set(f"{bucket}/set", clips=2)
    [clip, _] = clips_of(read_index(url), "train")
    before = read_clip(url, clip)
    server.fail_next(3, 503, "SlowDown")
    assert read_clip(url, clip) == before
    server.fail_next(2, 500, "InternalError")
    assert read_clip(url, clip) == before


def test_refusal_of_an_object_store_is_reported_in_one_line(bucket: str, server: S3) -> None:
    with pytest.raises(UserError, match="there is no index"):
        read_index(f"{bucket}/nothing")
    with pytest.raises(UserError, match="the bucket does not exist"):
        read_index("s3://no-such-bucket-here/set")
    server.fail_next(10**6, 403, "AccessDenied")
    with pytest.raises(UserError, match=r"access denied .* credentials"):
        read_index(f"{bucket}/set")
    server.fail_next(0, 503, "SlowDown")
