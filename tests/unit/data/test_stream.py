"""The order of samples is the same for any number of ranks and workers, and after resuming."""

import collections
import gc
import itertools
import logging
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from prioritycut_ray.data.index import read_index
from prioritycut_ray.data.stream import Batch, FramePairs, batches, two_frames
from prioritycut_ray.errors import DataError, UserError
from tests.clip_sets import CLIPS, SIZE, clip_frames, damage, write_set


def pairs(url: str, seed: int = 1, num_repeats: int = 3, pairs_per_visit: int = 1) -> FramePairs:
    return FramePairs(
        url,
        read_index(url),
        "train",
        size=SIZE,
        seed=seed,
        num_repeats=num_repeats,
        pairs_per_visit=pairs_per_visit,
    )


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_set(str(tmp_path_factory.mktemp("stream") / "set"))


def joined(parts: list[Batch]) -> Batch:
    return Batch(*(torch.cat(field) for field in zip(*parts, strict=True)))


def read_order(dataset: FramePairs, start: int, stop: int, world_size: int, workers: int) -> Batch:
    """Read all ranks' shares and reassemble every global batch."""
    ranks = [
        list(
            batches(
                dataset,
                start=start,
                stop=stop,
                global_batch=8,
                rank=rank,
                world_size=world_size,
                loader_workers=workers,
            )
        )
        for rank in range(world_size)
    ]
    assert len({len(of_rank) for of_rank in ranks}) == 1
    return joined([part for step in zip(*ranks, strict=True) for part in step])


def same(one: Batch, other: Batch) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


# ---------------------------------------------------------------------------------------------
# The order
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("world_size", "workers"), list(itertools.product([1, 2, 4], [0, 2])))
def test_order_does_not_depend_on_ranks_or_workers(url: str, world_size: int, workers: int) -> None:
    dataset = pairs(url)
    one_by_one = joined([dataset.read([number])[0] for number in range(24)])
    read = read_order(dataset, 0, 24, world_size, workers)
    assert same(read, one_by_one)
    assert len(set(read.augment_seeds.tolist())) == 24


@pytest.mark.parametrize("start", [8, 16, 13])
def test_resumed_order_is_the_uninterrupted_one(url: str, start: int) -> None:
    whole = read_order(pairs(url), 0, 48, 1, 0)
    resumed = read_order(pairs(url), start, start + 24, 2, 2)
    assert same(resumed, Batch(*(field[start : start + 24] for field in whole)))


def test_order_does_not_depend_on_the_shards(url: str, tmp_path: Path) -> None:
    other = write_set(str(tmp_path / "other"), shard_bytes=1, reverse=True)
    assert read_index(other).clips != read_index(url).clips
    assert same(read_order(pairs(other), 0, 16, 1, 0), read_order(pairs(url), 0, 16, 1, 0))


def test_seeds_and_data_sets_have_orders_of_their_own(url: str, tmp_path: Path) -> None:
    def order(dataset: FramePairs) -> list[int]:
        return [dataset.draw(number).augment_seed for number in range(10)]

    smaller = write_set(str(tmp_path / "smaller"), clips=CLIPS - 1)
    assert order(pairs(url, seed=1)) == order(pairs(url, seed=1))
    assert order(pairs(url, seed=1)) != order(pairs(url, seed=2))
    assert order(pairs(url, seed=1)) != order(pairs(smaller, seed=1))


def test_every_epoch_shows_every_clip_equally_often_in_its_own_order(url: str) -> None:
    dataset = pairs(url, num_repeats=3)
    assert dataset.epoch_length == 3 * CLIPS
    epochs = [
        [draw.clip for draw in dataset.draws(range(first, first + 3 * CLIPS))]
        for first in range(0, 5 * 3 * CLIPS, 3 * CLIPS)
    ]
    for epoch in epochs:
        assert collections.Counter(epoch) == dict.fromkeys(range(CLIPS), 3)
    assert len({tuple(epoch) for epoch in epochs}) == 5


def test_pairs_of_a_visit_show_one_clip_after_the_other(url: str) -> None:
    dataset = pairs(url, num_repeats=2, pairs_per_visit=3)
    assert dataset.epoch_length == 2 * 3 * CLIPS
    epoch = dataset.draws(range(dataset.epoch_length))
    visits = [draw.clip for draw in epoch[::3]]
    assert [draw.clip for draw in epoch] == [clip for clip in visits for _ in range(3)]
    assert collections.Counter(visits) == dict.fromkeys(range(CLIPS), 2)
    assert len({draw.augment_seed for draw in epoch}) == len(epoch)
    assert len({draw.places for draw in epoch}) == len(epoch)
    # A visit may be split between batches and ranks.
    one_by_one = joined([dataset.read([number])[0] for number in range(16)])
    assert same(read_order(dataset, 0, 16, 2, 0), one_by_one)


def test_a_run_can_start_at_any_sample(url: str) -> None:
    [batch] = batches(
        pairs(url),
        start=10**12,
        stop=10**12 + 8,
        global_batch=8,
        rank=0,
        world_size=1,
        loader_workers=0,
    )
    assert batch.source.shape == (8, 3, SIZE, SIZE)


@pytest.mark.parametrize(("stop", "count"), [(0, 0), (7, 0), (8, 1), (15, 1), (16, 2)])
def test_only_complete_batches_are_yielded(url: str, stop: int, count: int) -> None:
    given = batches(
        pairs(url), start=0, stop=stop, global_batch=8, rank=1, world_size=2, loader_workers=0
    )
    assert [len(batch.source) for batch in given] == [4] * count


def test_global_batch_must_divide_evenly(url: str) -> None:
    with pytest.raises(UserError, match=r"batch of 8 .* 3 workers: choose a multiple of 3"):
        batches(pairs(url), start=0, stop=8, global_batch=8, rank=0, world_size=3, loader_workers=0)


def test_global_random_state_is_left_alone(url: str) -> None:
    torch.manual_seed(5)
    np.random.seed(5)
    before = torch.get_rng_state(), np.random.get_state()[1].tolist()
    read_order(pairs(url), 0, 8, 1, 2)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.random.get_state()[1].tolist() == before[1]


# ---------------------------------------------------------------------------------------------
# The frames
# ---------------------------------------------------------------------------------------------


def test_frames_are_two_different_ones_of_the_clip_drawn(url: str) -> None:
    dataset = pairs(url)
    by_number = {clip.key: number for number, clip in enumerate(dataset.clips)}
    for number in range(40):
        sample, draw = dataset.read([number])[0], dataset.draw(number)
        frames = clip_frames(by_number[dataset.clips[draw.clip].key])
        indices = two_frames(draw.places, len(frames))
        assert indices[0] != indices[1]
        for shown, index in zip((sample.source, sample.driving), indices, strict=True):
            assert shown.dtype == torch.uint8
            assert shown.is_contiguous(memory_format=torch.channels_last)
            expected = torch.from_numpy(frames[index]).permute(2, 0, 1)
            assert (shown[0].int() - expected.int()).abs().max() <= 4


def test_frames_have_the_requested_size(url: str) -> None:
    dataset = FramePairs(url, read_index(url), "train", size=64, seed=0)
    assert dataset.read([0])[0].source.shape == (1, 3, 64, 64)


@pytest.mark.parametrize("frames", [2, 3, 5])
def test_all_ordered_pairs_are_equally_likely(frames: int) -> None:
    grid = (np.arange(60) + 0.5) / 60
    count = collections.Counter(two_frames((a, b), frames) for a in grid for b in grid)
    assert set(count) == set(itertools.permutations(range(frames), 2))
    assert len(set(count.values())) == 1


def test_still_clip_gives_its_one_frame_twice() -> None:
    assert two_frames((0.9, 0.9), 1) == (0, 0)


# ---------------------------------------------------------------------------------------------
# Damage
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("world_size", "workers"), [(1, 0), (2, 2), (4, 0)])
def test_damaged_clip_is_replaced_alike_everywhere(
    tmp_path: Path, world_size: int, workers: int
) -> None:
    url = write_set(str(tmp_path / "set"))
    dataset = pairs(url)
    whole = read_order(dataset, 0, 24, 1, 0)
    damage(url, dataset.clips[2])
    expected, _ = dataset.read(range(24))
    read = read_order(pairs(url), 0, 24, world_size, workers)
    assert same(read, expected)
    assert torch.equal(read.augment_seeds, whole.augment_seeds)
    for number in range(24):
        draw = dataset.draw(number)
        first, second = draw.clip, dataset.substitutes(draw)[0]
        assert torch.equal(read.source[number], whole.source[number]) == (first != 2)
        red = int(read.source[number][0].float().mean().round())
        shown = second if first == 2 else first
        assert abs(red - (30 + 15 * shown)) <= 4


@pytest.mark.parametrize("workers", [0, 2])
def test_warning_names_the_clip_and_does_not_flood(
    tmp_path: Path, caplog: Any, workers: int
) -> None:
    url = write_set(str(tmp_path / "set"), clips=2)
    dataset = pairs(url)
    damage(url, dataset.clips[1])
    with caplog.at_level(logging.WARNING):
        read_order(dataset, 0, 40, 1, workers)
    replaced = sum(dataset.draw(number).clip == 1 for number in range(40))
    assert replaced > 10
    logged = [record.getMessage() for record in caplog.records]
    assert len(logged) == replaced.bit_length()
    assert "clip clip1 is replaced" in logged[0]
    assert "checksum" in logged[0]
    assert "(8 so far, of 1 clips)" in logged[3]


@pytest.mark.parametrize("clips", [1, 3, 12])
def test_too_much_damage_is_an_error(tmp_path: Path, clips: int) -> None:
    url = write_set(str(tmp_path / "set"), clips=clips)
    for shard in Path(url).glob("*.tar"):
        shard.unlink()
    with pytest.raises(DataError, match=f"{min(clips, 9)} clips in a row cannot be read"):
        pairs(url).read([0])


def test_one_good_clip_is_enough(tmp_path: Path) -> None:
    url = write_set(str(tmp_path / "set"), clips=8)
    dataset = pairs(url)
    for clip in dataset.clips[1:]:
        damage(url, clip)
    read, _ = dataset.read(range(30))
    assert (read.source[:, 0].float().mean(dim=(1, 2)) - 30).abs().max() <= 4


# A loader that ends by an error is freed in any order, and its queue's thread may trip over that.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_error_in_a_loader_worker_reaches_the_trainer(tmp_path: Path) -> None:
    url = write_set(str(tmp_path / "set"), clips=2)
    for shard in Path(url).glob("*.tar"):
        shard.unlink()
    with pytest.raises(DataError, match="2 clips in a row cannot be read") as caught:
        read_order(pairs(url), 0, 8, 1, 2)
    del caught
    gc.collect()
    time.sleep(0.2)  # For that thread to end within this test.


def test_workers_end_with_their_iterator(url: str) -> None:
    given = batches(
        pairs(url), start=0, stop=10**6, global_batch=2, rank=0, world_size=1, loader_workers=2
    )
    next(given)
    children = Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children")
    assert len(children.read_text().split()) >= 2
    before = set(children.read_text().split())
    del given
    assert len(before - set(children.read_text().split())) == 2
