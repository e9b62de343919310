"""Validation while training, in this process: what is scored, when, and what follows from it."""

import json
import os
import signal
from collections.abc import Mapping
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from prioritycut_ray.config import Config, load_config
from prioritycut_ray.data.index import read_index
from prioritycut_ray.data.shard_writer import ShardWriter
from prioritycut_ray.errors import Preempted, UserError
from prioritycut_ray.evaluation.evaluate import evaluate_runs
from prioritycut_ray.evaluation.measures import Measures
from prioritycut_ray.launch.in_process import train_in_process
from prioritycut_ray.launch.train import train
from prioritycut_ray.runs.locate import find_checkpoint
from prioritycut_ray.runs.verdicts import read_verdicts
from prioritycut_ray.storage.folder import Folder
from prioritycut_ray.training.run import validation_clips
from tests.clip_sets import clip_member, damage
from tests.places import TINY
from tests.runs import assert_same_weights

VALIDATE = "train.validate_every=2"
HELD_OUT = {"clip0", "clip3", "clip5"}


def write_data(folder: Path) -> str:
    """Seven clips, three of them held out."""
    with ShardWriter(str(folder), 20_000) as writer:
        for number in range(7):
            writer.add(clip_member(number))
        keys = [f"clip{number}" for number in range(7)]
        writer.finish({key: "val" if key in HELD_OUT else "train" for key in keys})
    return str(folder)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_data(tmp_path_factory.mktemp("data"))


def configured(data: str, storage: Path, *words: str) -> Config:
    places = [f"data.url={data}", f"storage={storage}"]
    return load_config(str(TINY), [*places, "train.workers=0", *words])


class Validated:
    """A run of eight steps that validates every two, and what it has reported."""

    def __init__(self, data: str, storage: Path) -> None:
        self.reports: list[Mapping[str, float]] = []
        config = configured(data, storage, VALIDATE, "train.checkpoint_every=4")
        self.run = Path(train_in_process(config, self.reports.append, print))


@pytest.fixture(scope="module")
def validated(data: str, tmp_path_factory: pytest.TempPathFactory) -> Validated:
    return Validated(data, tmp_path_factory.mktemp("runs"))


def test_validation_changes_no_bit_of_the_weights(
    data: str, validated: Validated, tmp_path: Path
) -> None:
    run = train_in_process(configured(data, tmp_path), lambda metrics: None, print)
    assert_same_weights(Path(run), validated.run)


def test_the_scores_are_those_of_an_evaluation(data: str, validated: Validated) -> None:
    last = read_verdicts(Folder(validated.run))[-1]
    evaluation, _ = evaluate_runs(
        [str(validated.run)],
        data,
        split="val",
        measures=Measures(),
        mapper=map,
        on_clip=lambda done, total, key: None,
    )
    expected = {}
    for model, prefix in zip(evaluation.models, ("val/copy_source/", "val/"), strict=True):
        for key, estimate in model.mean_over_clips.items():
            expected[f"{prefix}{key}"] = estimate.value
    assert last.scores == pytest.approx(expected, rel=1e-9)
    assert (last.step, last.clips, last.skipped) == (8, 3, {})


def test_the_scores_are_curves_rows_reports_and_files(validated: Validated) -> None:
    verdicts = read_verdicts(Folder(validated.run))
    steps, values = [2, 4, 6, 8], [verdict.scores["val/l1"] for verdict in verdicts]
    assert [verdict.step for verdict in verdicts] == steps
    assert len(set(values)) == 4
    events = EventAccumulator(str(validated.run / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("val/l1")] == steps
    assert [event.step for event in events.Images("val/columns")] == steps
    lines = "".join(path.read_text() for path in (validated.run / "metrics").iterdir())
    rows = [row for row in map(json.loads, lines.splitlines()) if "val/l1" in row]
    assert [(row["step"], row["val/l1"]) for row in rows] == list(zip(steps, values, strict=True))
    reports = [report for report in validated.reports if "val/l1" in report]
    assert [report["val/step"] for report in reports] == steps


def test_the_progress_line_shows_the_newest_scores(
    data: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = train(configured(data, tmp_path, VALIDATE))
    scores = read_verdicts(Folder(run))[-1].scores
    copied = scores["val/copy_source/l1"]
    shown = f"val/l1 {scores['val/l1']:.4f} at step 8 (copied source {copied:.4f})"
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.startswith("training: 100%")
    assert shown in line


def test_best_is_the_checkpoint_with_the_lowest_l1(validated: Validated) -> None:
    verdicts = read_verdicts(Folder(validated.run))
    best = min(verdicts, key=lambda verdict: verdict.scores["val/l1"])
    assert find_checkpoint(validated.run / "best").name == f"step_{best.step:07d}"
    assert find_checkpoint(validated.run).name == "step_0000008"


def test_a_run_that_ranks_nothing_has_no_best(data: str, tmp_path: Path) -> None:
    run = train_in_process(configured(data, tmp_path), lambda metrics: None, print)
    with pytest.raises(UserError, match=r"tiny/best: .*set train\.validate_every"):
        find_checkpoint(f"{run}/best")


def test_a_run_ends_when_it_no_longer_improves(data: str, tmp_path: Path) -> None:
    # Nothing is learned, so the second validation and the third are no better than the first.
    words = [VALIDATE, "train.patience=2", "optim.lr=0", "optim.detector_lr=0"]
    warnings: list[str] = []
    config = configured(data, tmp_path, *words, "train.samples=200", "train.validate_clips=1")
    run = train_in_process(config, lambda metrics: None, warnings.append)
    assert any("not improved in the last 2 validations" in line for line in warnings)
    step = int(find_checkpoint(run).name.removeprefix("step_"))
    assert step < 50
    train_in_process(config, lambda metrics: None, warnings.append)
    assert find_checkpoint(run).name == f"step_{step:07d}", "the same command does not go on"


def test_a_lost_verdict_is_made_again(data: str, validated: Validated, tmp_path: Path) -> None:
    config = configured(data, tmp_path, VALIDATE, "train.log_every=1")

    class Killed(BaseException):
        pass

    def kill(metrics: Mapping[str, float]) -> None:
        if metrics.get("val/step") == 4:
            raise Killed

    with pytest.raises(Killed):
        train_in_process(config, kill, print)
    (tmp_path / "tiny" / "validation" / "step_0000004.json").unlink(missing_ok=True)
    train_in_process(config, lambda metrics: None, print)
    ours = read_verdicts(Folder(tmp_path / "tiny"))
    assert ours == read_verdicts(Folder(validated.run))


def test_the_sample_is_fixed(data: str, tmp_path: Path) -> None:
    index = read_index(data)
    samples = []
    for seed in (0, 1):
        words = (VALIDATE, "train.validate_clips=2", f"train.seed={seed}")
        clips = validation_clips(configured(data, tmp_path, *words), index)
        samples.append([clip.key for clip in clips])
    assert samples[0] == samples[1]
    assert len(samples[0]) == 2
    assert set(samples[0]) < HELD_OUT


def test_a_damaged_clip_is_named_once_and_left_out(tmp_path: Path) -> None:
    data = write_data(tmp_path / "data")
    clip = next(clip for clip in read_index(data).clips if clip.key == "clip3")
    damage(data, clip)
    warnings: list[str] = []
    config = configured(data, tmp_path / "runs", VALIDATE)
    run = train_in_process(config, lambda metrics: None, warnings.append)
    assert [line for line in warnings if "clip3" in line] == [warnings[0]]
    assert {verdict.clips for verdict in read_verdicts(Folder(run))} == {2}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([VALIDATE, "data.validation_split=train"], "=train is the split to train on"),
        ([VALIDATE, "train.best_metric=val/psnr"], "val/psnr is better when higher: use val/l1"),
        (["train.patience=2"], r"requires train\.validate_every"),
        (["train.best_metric=val/l1"], r"requires train\.validate_every"),
    ],
)
def test_what_does_not_fit_together_is_refused(
    data: str, tmp_path: Path, words: list[str], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        configured(data, tmp_path, *words)


def test_a_split_without_clips_is_refused_before_training(data: str, tmp_path: Path) -> None:
    config = configured(data, tmp_path, VALIDATE, "data.validation_split=test")
    with pytest.raises(UserError, match=r"data\.validation_split: .*choose one of train, val"):
        train_in_process(config, lambda metrics: None, print)


def test_preemption_does_not_wait_for_a_validation(data: str, tmp_path: Path) -> None:
    def interrupt(metrics: Mapping[str, float]) -> None:
        if metrics.get("step") == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    config = configured(data, tmp_path, VALIDATE, "train.log_every=1")
    with pytest.raises(Preempted, match="step 2"):
        train_in_process(config, interrupt, print)
    assert read_verdicts(Folder(tmp_path / "tiny")) == []
    train_in_process(config, lambda metrics: None, print)
    assert [v.step for v in read_verdicts(Folder(tmp_path / "tiny"))] == [2, 4, 6, 8]
