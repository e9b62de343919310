"""Which values a resumed run may change."""

import pytest

from prioritycut_ray.config import load_config
from prioritycut_ray.runs.compatibility import changed_keys
from tests.places import TINY


def changed(before: list[str], after: list[str]) -> set[str]:
    old, new = (load_config(str(TINY), words) for words in (before, after))
    return set(changed_keys(old.model_dump(mode="json"), new.model_dump(mode="json")))


def test_changed_keys_are_dotted() -> None:
    assert changed([], ["optim.lr=1"]) == {"optim.lr"}
    assert "priority_cut.top_k" in changed([], ["priority_cut=null"])


UNET = ["priority_cut=null"]
BASELINE = [*UNET, "discriminator.kind=patch"]
CUTMIX = ["priority_cut.mask=cutmix"]


@pytest.mark.parametrize(
    ("row", "previous", "section"),
    [
        (UNET, BASELINE, "discriminator.kind"),
        (CUTMIX, UNET, "priority_cut"),
        ([], CUTMIX, "priority_cut.mask"),
    ],
)
def test_each_row_of_the_ablation_changes_one_thing(
    row: list[str], previous: list[str], section: str
) -> None:
    keys = changed(previous, row)
    assert keys
    assert all(key.startswith(section) for key in keys)
