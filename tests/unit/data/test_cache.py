"""The cache stays below its limit, and tolerates several processes and damage."""

import hashlib
import multiprocessing
import os
import signal
from multiprocessing.synchronize import Event
from pathlib import Path

import pytest

from prioritycut_ray.data.cache import ClipCache
from prioritycut_ray.errors import UserError

CLIP = 50_000


def clip(number: int) -> tuple[str, bytes]:
    data = number.to_bytes(4, "big") * (CLIP // 4)
    return hashlib.sha256(data).hexdigest(), data


def bytes_of_clips(folder: Path) -> int:
    """Size without the database, which takes a few megabytes."""
    return sum(path.stat().st_size for path in folder.rglob("*.val"))


def test_stored_clips_are_returned(tmp_path: Path) -> None:
    cache = ClipCache(str(tmp_path / "new" / "folder"), 10**6)
    cache.check()
    name, data = clip(1)
    assert cache.get(name) is None
    cache.put(name, data)
    assert cache.get(name) == data
    assert (tmp_path / "new" / "folder").stat().st_mode & 0o77 == 0


def test_oldest_clips_are_evicted(tmp_path: Path) -> None:
    limit = 20 * CLIP
    cache = ClipCache(str(tmp_path), limit)
    cache.check()
    for number in range(200):
        cache.put(*clip(number))
        assert bytes_of_clips(tmp_path) <= limit + CLIP
    assert cache.get(clip(199)[0]) == clip(199)[1]
    assert cache.get(clip(0)[0]) is None


def hammer(cache: ClipCache, seed: int, rounds: int, begun: Event | None = None) -> None:
    for step in range(rounds):
        name, data = clip((seed * 7 + step * 3) % 40)
        assert cache.get(name) in (None, data)
        cache.put(name, data)
        if begun is not None:
            begun.set()


def test_several_processes_share_it_and_one_may_be_killed(tmp_path: Path) -> None:
    cache = ClipCache(str(tmp_path), 15 * CLIP)
    cache.check()
    cache.put(*clip(0))  # Opened here too, before the others are forked.
    context = multiprocessing.get_context("fork")
    begun = context.Event()
    processes = [context.Process(target=hammer, args=(cache, seed, 60)) for seed in range(3)]
    victim = context.Process(target=hammer, args=(cache, 9, 10**9, begun))
    for process in [*processes, victim]:
        process.start()
    assert begun.wait(100), "the victim never stored a clip"
    assert victim.pid is not None
    os.kill(victim.pid, signal.SIGKILL)
    for process in [*processes, victim]:
        process.join(100)
    assert victim.exitcode == -signal.SIGKILL
    assert [process.exitcode for process in processes] == [0, 0, 0]
    hammer(cache, 5, 20)
    # The killed one may leave behind what it was storing and evicting: eleven files.
    assert bytes_of_clips(tmp_path) <= 28 * CLIP


def test_unusable_folder_is_reported(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match=r"data\.cache_dir=.*file.*cannot be used"):
        ClipCache(str(tmp_path / "file"), 10**6).check()


def test_a_damaged_database_does_not_stop_training(tmp_path: Path) -> None:
    cache = ClipCache(str(tmp_path), 10**6)
    (tmp_path / "cache.db").write_bytes(b"no database" * 1000)
    with pytest.raises(UserError, match="cannot be used"):
        cache.check()
    cache.put(*clip(1))
    assert cache.get(clip(1)[0]) is None
