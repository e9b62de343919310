"""How much of an epoch shows clips that the current model has seen."""

import collections
from pathlib import Path

import pytest

from prioritycut_ray.data.index import ClipIndex, build_index, read_index, write_index
from prioritycut_ray.data.stream import FramePairs
from tests.clip_sets import CLIPS, SIZE, write_set

REPEATS = 20


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> ClipIndex:
    return read_index(write_set(str(tmp_path_factory.mktemp("replay") / "set")))


def shown(index: ClipIndex, known: int | None, replay: float, epoch: int = 0) -> dict[str, int]:
    """Visits of each clip in an epoch when the first ``known`` clips are known."""
    seen = None if known is None else build_index(index.clips[:known])
    pairs = FramePairs(
        "nowhere",
        index,
        "train",
        size=SIZE,
        seed=1,
        num_repeats=REPEATS,
        known=seen,
        replay=replay,
    )
    start = epoch * pairs.epoch_length
    draws = pairs.draws(range(start, start + pairs.epoch_length))
    return dict(collections.Counter(pairs.clips[draw.clip].key for draw in draws))


@pytest.mark.parametrize("replay", [0.0, 0.25, 0.5])
def test_known_and_new_clips_have_their_shares_and_equal_visits(
    index: ClipIndex, replay: float
) -> None:
    for epoch in (0, 3):
        visits = shown(index, 4, replay, epoch)
        old = [visits.get(clip.key, 0) for clip in index.clips[:4]]
        new = [visits[clip.key] for clip in index.clips[4:]]
        assert sum(old) == round(replay * CLIPS * REPEATS)
        assert sum(old) + sum(new) == CLIPS * REPEATS
        assert max(old) - min(old) <= 1
        assert max(new) - min(new) <= 1


def test_without_known_clips_all_have_equal_visits(index: ClipIndex) -> None:
    assert set(shown(index, None, 0.5).values()) == {REPEATS}
    assert set(shown(index, CLIPS, 0.5).values()) == {REPEATS}, "nothing is new"


def test_substitutes_of_a_damaged_clip_are_distinct(index: ClipIndex) -> None:
    seen = build_index(index.clips[:4])
    pairs = FramePairs(
        "nowhere", index, "train", size=SIZE, seed=1, num_repeats=3, known=seen, replay=0.5
    )
    known = {place for place, clip in enumerate(pairs.clips) if clip in [*index.clips[:4]]}
    for draw in pairs.draws(range(pairs.epoch_length)):
        found = [draw.clip, *pairs.substitutes(draw)]
        assert sorted(found) == list(range(CLIPS))
        alike = known if draw.clip in known else set(range(CLIPS)) - known
        assert set(found[: len(alike)]) == alike, "clips of the same kind come first"


def test_few_places_for_known_clips_still_show_all_of_them(index: ClipIndex) -> None:
    """Of seven visits an epoch, one is for four known clips."""
    pairs = FramePairs(
        "nowhere",
        index,
        "train",
        size=SIZE,
        seed=1,
        num_repeats=1,
        known=build_index(index.clips[:4]),
        replay=0.15,
    )
    visits = collections.Counter(draw.clip for draw in pairs.draws(range(8 * CLIPS)))
    assert [visits[place] for place in range(CLIPS)] == [2] * 4 + [16] * 3


def test_the_folder_of_a_known_index_is_all_that_is_needed(
    index: ClipIndex, tmp_path: Path
) -> None:
    write_index(index, str(tmp_path))
    assert read_index(str(tmp_path)) == index
