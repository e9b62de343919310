"""The names of the runs that an evaluation compares; the animation of another identity."""

import io
from pathlib import Path

import pytest
import torch

from prioritycut_ray.config import load_config
from prioritycut_ray.data.puppets import render_clip
from prioritycut_ray.data.shard_writer import Member, ShardWriter
from prioritycut_ray.errors import UserError
from prioritycut_ray.evaluation.evaluate import evaluate_runs, short_names
from prioritycut_ray.evaluation.measures import Measures, selected_metrics
from prioritycut_ray.evaluation.records import Evaluation
from prioritycut_ray.evaluation.report import markdown
from prioritycut_ray.metrics import transfer
from prioritycut_ray.metrics.transfer import CORRELATIONS, IDENTITY, POSE
from prioritycut_ray.retraining.comparison import ClipChange
from prioritycut_ray.retraining.gate import check_rules, judge
from prioritycut_ray.retraining.settings import Gate
from prioritycut_ray.training.checkpoint import save_checkpoint
from prioritycut_ray.training.state import new_state
from prioritycut_ray.video.encoding import write_video
from tests.conftest import Prioritycut, assert_one_line
from tests.places import FAMILIES


def test_names_are_as_short_as_makes_them_distinct() -> None:
    assert short_names(["/runs/vox"]) == ["vox"]
    assert short_names(["/runs/vox/", "s3://bucket/runs/plain"]) == ["vox", "plain"]
    assert short_names(["/old/vox", "/new/vox"]) == ["old/vox", "new/vox"]


@pytest.mark.parametrize("again", ["s3://bucket/vox", "s3://bucket/vox/"])
def test_the_same_run_twice_is_an_error(again: str) -> None:
    with pytest.raises(UserError, match="given twice"):
        short_names(["s3://bucket/vox", again])


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Three puppets in a split, packed without Ray."""
    folder = tmp_path_factory.mktemp("packed")
    with ShardWriter(str(folder), shard_bytes=2**20) as writer:
        for seed in range(3):
            encoded = io.BytesIO()
            write_video(encoded, render_clip(seed, size=32, frames=4).frames, 8.0)
            key = f"puppet{seed}"
            writer.add(Member(key, encoded.getvalue(), 4, 8.0, 32, 32, key, key, False))
        writer.finish({"puppet0": "test", "puppet1": "test", "puppet2": "one"})
    return str(folder)


def random_run(folder: Path, family: str) -> str:
    """A run with one checkpoint of random weights."""
    config = load_config(str(FAMILIES[family]))
    save_checkpoint(new_state(config, torch.device("cpu")), config, folder / "step_0000001")
    return str(folder)


def scored(runs: list[str], data: str, measures: Measures) -> Evaluation:
    evaluation, _ = evaluate_runs(
        runs, data, split="test", measures=measures, mapper=map, on_clip=lambda *progress: None
    )
    return evaluation


@pytest.fixture
def no_correlations(monkeypatch: pytest.MonkeyPatch) -> None:
    """The metrics without truth as they are before their correlations have been measured."""
    monkeypatch.setattr(transfer, "CORRELATIONS", dict.fromkeys(CORRELATIONS))


def test_another_identity_is_animated_on_request(
    no_correlations: None, packed: str, tmp_path: Path
) -> None:
    runs = [random_run(tmp_path / family, family) for family in FAMILIES]
    evaluation = scored(runs, packed, Measures(transfer=True))
    baseline, *models = evaluation.models
    for model in models:
        for key in CORRELATIONS:
            estimate = model.mean_over_clips[key]
            assert estimate.value is not None
            assert estimate.value > 0
            assert estimate.clips == 2
    assert baseline.mean_over_clips[POSE].value is None
    assert baseline.mean_over_clips[IDENTITY].value == pytest.approx(0, abs=1e-5)
    (warning,) = (line for line in evaluation.warnings if "unvalidated" in line)
    for text in (markdown(evaluation), warning):
        for name in ("identity distance", "pose transfer", "estimated flicker"):
            assert f"{name} (unvalidated)" in text
    plain = scored(runs, packed, Measures())
    assert not any("unvalidated" in line for line in plain.warnings)
    for before, after in zip(plain.models, evaluation.models, strict=True):
        shared = {key: after.mean_over_clips[key] for key in before.mean_over_clips}
        assert before.mean_over_clips == shared


def test_a_split_of_one_identity_has_no_other_one_to_animate(
    packed: str, tmp_path: Path, prioritycut: Prioritycut
) -> None:
    run = random_run(tmp_path / "mine", "first_order")
    words = [run, packed, "--workers", "0", "--split", "one"]
    assert_one_line(prioritycut("evaluate", *words, "--transfer"), "'one'", "one identity")


def test_searches_and_the_gate_name_the_metrics_and_their_label(no_correlations: None) -> None:
    measured = selected_metrics(Measures(transfer=True))
    gate = Gate(target=IDENTITY, tolerances={"l1": 0.1})
    changes = [
        ClipChange(
            key=str(number),
            identity=str(number),
            holdout="fixed",
            slices={},
            since_current=dict.fromkeys(("l1", IDENTITY), -0.01),
            since_anchor=dict.fromkeys(("l1", IDENTITY), -0.01),
        )
        for number in range(20)
    ]
    verdict = judge(changes, measured, gate, night=1)
    assert verdict.promote
    assert "identity distance (unvalidated)" in verdict.reason
    with pytest.raises(UserError, match=IDENTITY):
        check_rules(selected_metrics(Measures()), gate)
