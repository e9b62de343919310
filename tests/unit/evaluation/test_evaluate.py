"""The names of the runs that an evaluation compares."""

import pytest

from prioritycut_ray.errors import UserError
from prioritycut_ray.evaluation.evaluate import short_names


def test_names_are_as_short_as_makes_them_distinct() -> None:
    assert short_names(["/runs/vox"]) == ["vox"]
    assert short_names(["/runs/vox/", "s3://bucket/runs/plain"]) == ["vox", "plain"]
    assert short_names(["/old/vox", "/new/vox"]) == ["old/vox", "new/vox"]


@pytest.mark.parametrize("again", ["s3://bucket/vox", "s3://bucket/vox/"])
def test_the_same_run_twice_is_an_error(again: str) -> None:
    with pytest.raises(UserError, match="given twice"):
        short_names(["s3://bucket/vox", again])
