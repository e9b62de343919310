"""Which values a resumed run may change."""

from pathlib import Path

import pytest

from prioritycut_ray.config import Config, dump_config, load_config
from prioritycut_ray.errors import UserError
from prioritycut_ray.runs.compatibility import changed_keys, check_resumable
from prioritycut_ray.runs.locate import RunProgress
from prioritycut_ray.runs.manifest import seal
from tests.places import TINY, TINY_TPS


def changed(before: list[str], after: list[str]) -> set[str]:
    old, new = (load_config(str(TINY), words) for words in (before, after))
    return set(changed_keys(old.model_dump(mode="json"), new.model_dump(mode="json")))


def test_changed_keys_are_dotted() -> None:
    assert changed([], ["optim.lr=1"]) == {"optim.lr"}
    assert "priority_cut.top_k" in changed([], ["priority_cut=null"])


def stored(folder: Path, source: Path, *words: str) -> Config:
    """A configuration, and a checkpoint of it without weights."""
    config = load_config(str(source), [f"storage={folder}", *words])
    step = folder / "tiny" / "step_0000001"
    step.mkdir(parents=True)
    (step / "config.yaml").write_text(dump_config(config))
    progress = RunProgress(
        step=1, samples=4, skipped=0, skipped_in_a_row={}, averaged=1, seed=0, data="clips"
    )
    (step / "progress.json").write_text(progress.model_dump_json())
    seal(step)
    return config


@pytest.mark.parametrize(
    ("source", "words", "named"),
    [
        (TINY_TPS, [], ["model.family"]),
        (TINY, ["discriminator.kind=none", "priority_cut=null"], ["discriminator.kind"]),
    ],
)
def test_other_networks_do_not_resume_a_run(
    tmp_path: Path, source: Path, words: list[str], named: list[str]
) -> None:
    """The other family has other keys altogether: naming each would say nothing more."""
    check_resumable(stored(tmp_path, TINY), "clips")
    other = load_config(str(source), [f"storage={tmp_path}", *words])
    with pytest.raises(UserError, match="restore them to resume it, or set another name") as caught:
        check_resumable(other, "clips")
    message = str(caught.value)
    listed = message.partition("different values of ")[2].partition(";")[0].split(", ")
    assert [key for key in listed if key.startswith(("model.", "discriminator."))] == named
    assert "\n" not in message


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
