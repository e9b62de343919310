"""Visits by identity: identities equally often, and the clips of each in turn."""

import collections
import hashlib

import numpy as np
import pytest

from prioritycut_ray.data.index import ClipIndex, build_index
from prioritycut_ray.data.shards import Clip
from prioritycut_ray.data.visits import MOST_SUBSTITUTES, Visits

OWN = {"ann": 1, "bob": 4, "eve": 20}
"""Number of clips of each identity; bob has clips in ``test`` too."""


def clip(identity: str, number: int, split: str = "train") -> Clip:
    key = f"{split}-{identity}-{number}"
    sha256 = hashlib.sha256(key.encode()).hexdigest()
    return Clip(key, "shard-000000.tar", 0, 1, sha256, 8, 25.0, 64, 64, identity, split)


def make_index(own: dict[str, int]) -> ClipIndex:
    clips = [clip(name, number) for name, count in own.items() for number in range(count)]
    return build_index([*clips, clip("bob", 0, "test"), clip("aaa", 0, "test")])


@pytest.fixture(scope="module")
def index() -> ClipIndex:
    return make_index(OWN)


def visits_of(index: ClipIndex, repeats: int = 10, seed: int = 0, **options: object) -> Visits:
    clips = index.clips_of("train")
    entropy = (seed, index.fingerprint)
    return Visits(clips, entropy, by="identity", num_repeats=repeats, **options)  # type: ignore[arg-type]


def shown(visits: Visits, index: ClipIndex, count: int) -> list[Clip]:
    clips = index.clips_of("train")
    return [clips[place] for place in visits.clips(np.arange(count)).tolist()]


def test_an_epoch_visits_every_identity_equally_often(index: ClipIndex) -> None:
    visits = visits_of(index)
    assert visits.per_epoch == 10 * len(OWN)
    for epoch in range(3):
        seen = visits.clips(np.arange(epoch * 30, epoch * 30 + 30))
        identities = [index.clips_of("train")[place].identity for place in seen.tolist()]
        assert collections.Counter(identities) == dict.fromkeys(OWN, 10)


def test_an_identity_shows_all_its_clips_before_one_again(index: ClipIndex) -> None:
    """Over epochs, too: of ten visits an epoch, two epochs make one round of twenty clips."""
    visits = visits_of(index)
    times = collections.Counter(one.key for one in shown(visits, index, 60))
    assert {times[f"train-eve-{number}"] for number in range(20)} == {1}
    assert {times[f"train-bob-{number}"] for number in range(4)} == {5}
    assert times["train-ann-0"] == 20
    assert not any(key.startswith("test") for key in times)


def test_the_distribution_is_that_of_drawing_an_identity_and_then_one_of_its_clips(
    index: ClipIndex,
) -> None:
    """Over seeds, visit 3 shows each clip with probability 1 / identities / clips of its own."""
    draws = 600
    clips = index.clips_of("train")
    found = np.array([visits_of(index, seed=seed).clips(np.array([3]))[0] for seed in range(draws)])
    expected = np.array([draws / len(OWN) / OWN[one.identity] for one in clips])
    counts = np.bincount(found, minlength=len(clips))
    # Chi-squared with 24 degrees of freedom, six deviations above its mean.
    assert ((counts - expected) ** 2 / expected).sum() < 24 + 6 * 48**0.5


def test_any_visit_can_be_computed_by_itself(index: ClipIndex) -> None:
    visits = visits_of(index)
    numbers = np.array([0, 7, 29, 30, 10**12, 10**15 + 1])
    alone = [visits.clips(np.array([number]))[0] for number in numbers]
    assert visits.clips(numbers).tolist() == alone
    assert visits.clips(numbers).tolist() == visits_of(index).clips(numbers).tolist()
    assert (
        visits.clips(np.arange(30)).tolist()
        != visits_of(index, seed=1).clips(np.arange(30)).tolist()
    )


@pytest.mark.parametrize("replay", [0.0, 0.25, 0.5])
def test_known_clips_have_their_share_by_identity(replay: float) -> None:
    """Ann is known, Eve is new, and Bob is both."""
    index = make_index(OWN)
    known = {"train-ann-0", "train-bob-0", "train-bob-1"}
    earlier = build_index([one for one in index.clips if one.key in known])
    visits = visits_of(index, repeats=40, known=earlier, replay=replay)
    seen = shown(visits, index, visits.per_epoch)
    assert len(seen) == 120
    old = collections.Counter(one.identity for one in seen if one.key in known)
    new = collections.Counter(one.identity for one in seen if one.key not in known)
    assert sum(old.values()) == round(120 * replay)
    assert set(old) == ({"ann", "bob"} if replay else set())
    assert set(new) == {"bob", "eve"}
    assert max(new.values()) - min(new.values()) <= 1


def test_substitutes_are_other_clips_of_the_split(index: ClipIndex) -> None:
    visits = visits_of(index)
    for number in range(30):
        [place] = visits.clips(np.array([number])).tolist()
        found = visits.substitutes(number)
        assert len({place, *found}) == 1 + MOST_SUBSTITUTES
        assert all(0 <= one < 25 for one in found)
    assert visits.substitutes(3) != visits.substitutes(4)


def test_a_single_clip_has_no_substitute() -> None:
    assert visits_of(make_index({"ann": 1})).substitutes(5) == []
