"""Validation beside the training, in real Ray tasks, and by the ranks where there is no room."""

import os
import signal
from collections.abc import Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path

import pytest

from prioritycut_ray.config import Config, load_config
from prioritycut_ray.evaluation.evaluate import evaluate_runs
from prioritycut_ray.evaluation.measures import Measures
from prioritycut_ray.launch.driver import launch
from prioritycut_ray.launch.in_process import train_in_process
from prioritycut_ray.runs.locate import find_checkpoint
from prioritycut_ray.runs.verdicts import Verdict, read_verdicts
from prioritycut_ray.storage.folder import Folder
from tests.places import TINY
from tests.runs import Start, assert_same_weights, await_truth

pytestmark = [pytest.mark.integration]

# The packed puppets have one test clip.
VALIDATE = ["train.validate_every=4", "data.validation_split=test"]


def configured(shards: Path, storage: Path, *words: str) -> Config:
    places = [f"data.url={shards}", f"storage={storage}"]
    return load_config(str(TINY), [*places, *VALIDATE, *words])


def verdicts(run: str | Path) -> list[Verdict]:
    return read_verdicts(Folder(run))


def scores_of_evaluation(run: str, data: Path) -> dict[str, float | None]:
    evaluation, _ = evaluate_runs(
        [run],
        str(data),
        split="test",
        measures=Measures(),
        mapper=map,
        on_clip=lambda done, total, key: None,
    )
    models = zip(evaluation.models, ("val/copy_source/", "val/"), strict=True)
    return {
        f"{prefix}{key}": estimate.value
        for model, prefix in models
        for key, estimate in model.mean_over_clips.items()
    }


@pytest.mark.slow
@pytest.mark.usefixtures("local_ray")
def test_tasks_score_what_the_process_itself_would(shards: Path, tmp_path: Path) -> None:
    """One worker leaves one of the two CPUs free."""
    reports: list[Mapping[str, float]] = []
    warnings: list[str] = []
    words = ["train.workers=1", "train.samples=48"]
    beside = launch(configured(shards, tmp_path, *words), reports.append, warnings.append)
    config = configured(shards, tmp_path, "train.workers=0", "train.samples=48", "name=inline")
    inline = train_in_process(config, lambda metrics: None, print)
    assert_same_weights(Path(inline), beside)
    expected = {verdict.step: verdict for verdict in verdicts(inline)}
    found = {verdict.step: verdict for verdict in verdicts(beside)}
    assert expected.keys() == {4, 8, 12}
    assert {4, 12} <= found.keys()
    assert all(expected[step] == verdict for step, verdict in found.items())
    assert [r["val/step"] for r in reports if "val/l1" in r] == sorted(found)
    left_out = [line for line in warnings if "is not validated, because earlier" in line]
    assert len(left_out) == 3 - len(found) <= 1


@pytest.mark.slow
@pytest.mark.usefixtures("local_ray")
def test_without_room_all_ranks_score_together(shards: Path, tmp_path: Path) -> None:
    """Two workers take both CPUs."""
    warnings: list[str] = []
    config = configured(shards, tmp_path, "train.workers=2")
    run = launch(config, lambda metrics: None, warnings.append)
    assert warnings == []
    assert [verdict.step for verdict in verdicts(run)] == [4, 8]
    assert verdicts(run)[-1].scores == pytest.approx(scores_of_evaluation(run, shards), rel=1e-9)


@pytest.mark.slow
@pytest.mark.usefixtures("local_ray")
def test_patience_ends_all_ranks(shards: Path, tmp_path: Path) -> None:
    words = ["train.workers=2", "train.samples=400", "train.patience=2"]
    config = configured(shards, tmp_path, *words, "optim.lr=0", "optim.detector_lr=0")
    warnings: list[str] = []
    run = launch(config, lambda metrics: None, warnings.append)
    assert any("not improved in the last 2 validations" in line for line in warnings)
    assert int(find_checkpoint(run).name.removeprefix("step_")) < 100


def tasks_of(driver: int) -> list[int]:
    """The processes below a driver that are scoring a checkpoint."""
    titles = {int(path.parent.name): path for path in Path("/proc").glob("[0-9]*/cmdline")}
    return [pid for pid, path in titles.items() if _is_scoring(path) and driver in _ancestors(pid)]


def _is_scoring(cmdline: Path) -> bool:
    with suppress(OSError):
        return b"ray::score_checkpoint" in cmdline.read_bytes()
    return False


def _ancestors(pid: int) -> list[int]:
    found = []
    with suppress(OSError):
        while pid > 1:
            stat = Path(f"/proc/{pid}/stat").read_text()
            pid = int(stat.rpartition(")")[2].split()[1])
            found.append(pid)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("victim", ["task", "worker"])
def test_a_verdict_survives_the_death_of_either(shards: Path, tmp_path: Path, victim: str) -> None:
    start = Start(shards, tmp_path)
    words = ["train.validate_every=5", "data.validation_split=test", "train.workers=1"]
    with start(*words, "train.samples=800") as training:
        task, *_ = await_truth(partial(tasks_of, training.process.pid), "a task scores")
        pid = task if victim == "task" else training.at_step(1, workers=1)[0].pid
        os.kill(pid, signal.SIGKILL)
        assert training.end() == 0, training.output()
        assert ("worker killed" in training.output()) == (victim == "worker")
    steps = [verdict.step for verdict in verdicts(start.run)]
    assert steps[0] == 5
    assert steps[-1] == 200
