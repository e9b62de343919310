"""Slices come from the index and from the JSON beside each clip."""

import pytest

from prioritycut_ray.data.facts import read_facts
from prioritycut_ray.data.index import ClipIndex
from prioritycut_ray.errors import UserError
from prioritycut_ray.retraining.slices import slice_values
from tests.clip_sets import write_random


@pytest.fixture
def index(tmp_path: object) -> ClipIndex:
    """Clips of 3000 bytes in several shards."""
    return write_random(f"{tmp_path}/data", [3, 4, 5, 6, 7])


def test_the_json_of_every_clip_is_found(index: ClipIndex, tmp_path: object) -> None:
    for clip in index.clips:
        facts = read_facts(f"{tmp_path}/data", clip)
        assert facts["key"] == clip.key
        assert facts["original"] == f"{clip.key}.MOV"


def test_slices_by_identity_and_by_a_key_of_the_json(index: ClipIndex, tmp_path: object) -> None:
    values = slice_values(f"{tmp_path}/data", index.clips, ["identity", "original"])
    assert values[0] == {"identity": "person 3", "original": "clip3.MOV"}
    # The identity alone needs no shard.
    assert slice_values("nowhere", index.clips, ["identity"])[1] == {"identity": "person 4"}


def test_a_key_that_no_clip_has_is_an_error(index: ClipIndex, tmp_path: object) -> None:
    with pytest.raises(UserError, match=r"gate\.slices\.age: .* use one of first_frame, fps"):
        slice_values(f"{tmp_path}/data", index.clips, ["age"])
