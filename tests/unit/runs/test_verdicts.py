"""What follows from verdicts: which checkpoint is best, and whether a run still improves."""

import math
from pathlib import Path

import pytest
import torch

from prioritycut_ray.config import Config, load_config
from prioritycut_ray.errors import UserError
from prioritycut_ray.runs.locate import find_checkpoint, locate_checkpoint, run_of_best
from prioritycut_ray.runs.verdicts import Verdict, comparable, has_stalled, write_verdict
from prioritycut_ray.storage.folder import Folder
from prioritycut_ray.training.checkpoint import save_checkpoint
from prioritycut_ray.training.state import new_state
from tests.places import TINY


def verdict(step: int, l1: float, sample: str = "a") -> Verdict:
    return Verdict(step=step, sample=sample, clips=1, skipped={}, scores={"val/l1": l1})


@pytest.mark.parametrize(
    ("values", "stalled"),
    [
        ([], False),
        ([0.3, 0.3], False),
        ([0.3, 0.2, 0.4, 0.2], True),
        ([0.3, 0.4, 0.2, 0.4, 0.1], False),
        ([0.3, 0.4, 0.5, 0.1], True),  # a run that has ended stays so
        ([0.3, math.nan, 0.2], False),
        ([math.nan, math.nan], True),
    ],
)
def test_a_run_stalls_without_a_new_lowest_l1(values: list[float], stalled: bool) -> None:
    verdicts = [verdict(step, value) for step, value in enumerate(values)]
    assert has_stalled(verdicts, patience=2) is stalled
    assert not has_stalled(verdicts, patience=0)


def test_only_verdicts_on_the_newest_sample_are_compared() -> None:
    verdicts = [verdict(1, 0.1, "old"), verdict(2, 0.2), verdict(3, 0.3)]
    assert [v.step for v in comparable(verdicts)] == [2, 3]
    assert comparable([]) == []


def test_a_verdict_that_is_not_finite_is_read_back() -> None:
    stored = Verdict.model_validate_json(verdict(1, math.nan).model_dump_json())
    assert math.isnan(stored.scores["val/l1"])


@pytest.fixture
def validating() -> Config:
    return load_config(str(TINY), ["train.validate_every=1"])


def write_run(config: Config, run: Path, values: dict[int, float]) -> None:
    """A run of random weights with these verdicts."""
    state = new_state(config, torch.device("cpu"))
    for step, value in values.items():
        save_checkpoint(state, config, run / f"step_{step:07d}")
        write_verdict(Folder(run), verdict(step, value))


def test_best_is_the_lowest_finite_one(validating: Config, tmp_path: Path) -> None:
    run = tmp_path / "vox"
    write_run(validating, run, {1: 0.3, 2: 0.1, 3: math.nan, 4: 0.2})
    assert find_checkpoint(f"{run}/best") == run / "step_0000002"
    assert locate_checkpoint(f"{run}/best/") == str(run / "step_0000002")
    assert run_of_best(run / "best") == str(run)
    assert run_of_best(run) is None


def test_a_run_may_be_called_best(validating: Config, tmp_path: Path) -> None:
    run = tmp_path / "best"
    write_run(validating, run, {1: 0.1, 2: 0.3})
    assert find_checkpoint(run).name == "step_0000002"
    assert find_checkpoint(run / "best").name == "step_0000001"


def test_a_run_without_a_finite_verdict_has_no_best(validating: Config, tmp_path: Path) -> None:
    write_run(validating, tmp_path / "vox", {1: math.nan})
    with pytest.raises(UserError, match="no checkpoint has a finite val/l1 yet"):
        find_checkpoint(tmp_path / "vox" / "best")


def test_a_remote_run_has_a_best_checkpoint(validating: Config, tmp_path: Path) -> None:
    write_run(validating, tmp_path / "vox", {1: 0.1, 2: 0.3})
    folder = Folder(f"memory://{tmp_path.name}/vox")
    folder.fs.put(f"{tmp_path}/vox/", f"{folder.root}/", recursive=True)
    assert locate_checkpoint(f"{folder.url}/best") == f"{folder.url}/step_0000001"
    assert find_checkpoint(f"{folder.url}/best").name == "step_0000001"
