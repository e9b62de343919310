"""`prioritycut benchmark puppets` on small networks of random weights, of both families."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from prioritycut_ray.commands.quickstart import CLIPS
from prioritycut_ray.config import load_config
from prioritycut_ray.data.puppets import render_clip
from prioritycut_ray.evaluation.puppets import (
    FIRST_LOOK,
    FIRST_MOTION,
    SHOWN,
    TASKS,
    Scene,
    scenes,
)
from prioritycut_ray.inference.animate import to_tensor
from prioritycut_ray.metrics.aggregate import value_of
from prioritycut_ray.metrics.transfer import CORRELATIONS
from prioritycut_ray.metrics.truth import warping_error
from prioritycut_ray.runs.verdicts import Verdict, write_verdict
from prioritycut_ray.storage.folder import Folder
from prioritycut_ray.training.checkpoint import save_checkpoint
from prioritycut_ray.training.state import new_state
from tests.conftest import Prioritycut, assert_one_line
from tests.networks import spread_keypoints
from tests.places import FAMILIES

CPU = torch.device("cpu")
FEW = ("--identities", "2", "--frames", "3", "--workers", "0")


def random_run(folder: Path, family: str, *words: str) -> Path:
    """A run with one checkpoint of random weights."""
    config = load_config(str(FAMILIES[family]), ["train.seed=1", *words])
    state = new_state(config, CPU)
    for network in (state.animator, state.ema.module):
        spread_keypoints(network)
    save_checkpoint(state, config, folder / "step_0000001")
    return folder


def scores_in(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "puppets.json").read_text())
    return found


def means(scores: dict[str, Any], task: str, model: str) -> dict[str, float]:
    found = {row["name"]: row["mean_over_clips"] for row in scores["tasks"][task]["models"]}
    return {key: estimate["value"] for key, estimate in found[model].items()}


@pytest.mark.parametrize("family", FAMILIES)
def test_all_tasks_are_scored_beside_the_copied_source(
    prioritycut: Prioritycut, tmp_path: Path, family: str
) -> None:
    run = random_run(tmp_path / "runs" / "mine", family)
    result = prioritycut("benchmark", "puppets", str(run), *FEW)
    assert result.returncode == 0, result.stderr
    scores = scores_in(run / "benchmark" / "puppets")
    assert (scores["identities"], scores["frames"], scores["size"]) == (2, 3, 32)
    assert scores["tasks"].keys() == scores["shares"].keys() == TASKS.keys()
    for task, evaluation in scores["tasks"].items():
        assert [model["name"] for model in evaluation["models"]] == [
            *("copy source", "mine", "true frames")
        ]
        assert sum(scores["shares"][task].values()) == pytest.approx(1)
        for model in evaluation["models"][:2]:
            assert [clip["identity"] for clip in model["clips"]] == [
                "puppet1000000",
                "puppet1000001",
            ]
            assert model["mean_over_clips"].keys() == {m["key"] for m in evaluation["metrics"]}
        ours, copied = means(scores, task, "mine"), means(scores, task, "copy source")
        truth = means(scores, task, "true frames")
        without_truth = CORRELATIONS.keys() if task == "relative" else set()
        assert truth.keys() == {"flicker", *without_truth}
        assert without_truth <= ours.keys() & copied.keys()
        assert 0 < truth["flicker"] < copied["flicker"]
        assert ours["l1"] != copied["l1"] > 0
        first, second = evaluation["differences"]
        assert (first["model"], first["reference"]) == ("mine", "copy source")
        assert first["mean_over_clips"]["disoccluded"]["value"] == pytest.approx(
            ours["disoccluded"] - copied["disoccluded"]
        )
        assert second["mean_over_clips"]["flicker"]["value"] == pytest.approx(
            ours["flicker"] - truth["flicker"]
        )
    # The three tasks of the copied source: its own motion, and another one in two ways.
    assert len({means(scores, task, "copy source")["l1"] for task in TASKS}) == 3
    with Image.open(run / "benchmark" / "puppets" / "columns.png") as picture:
        rows, columns = min(2, SHOWN) * len(TASKS), 6
        assert picture.size == (34 * columns - 2, 34 * rows - 2)
    for words in ("dis-occluded", "rim", "flicker", "true frames", "relative motion", "rough"):
        assert words in result.stdout


def test_an_export_and_another_number_of_puppets_give_the_same_scores(
    prioritycut: Prioritycut, tmp_path: Path
) -> None:
    run = random_run(tmp_path / "runs" / "mine", "first_order", "train.validate_every=1")
    scores = {"val/l1": 0.1}
    write_verdict(Folder(run), Verdict(step=1, sample="", clips=1, skipped={}, scores=scores))
    assert prioritycut("export", str(run), "--out", "exported").returncode == 0
    for words in (
        [str(run), *FEW, "--out", "both"],
        ["exported", *FEW],
        [str(run / "best"), *FEW, "--identities", "1"],
    ):
        result = prioritycut("benchmark", "puppets", *words)
        assert result.returncode == 0, result.stderr
    both = scores_in(tmp_path / "both")
    exported = scores_in(tmp_path / "exported" / "benchmark" / "puppets")
    one = scores_in(run / "benchmark" / "puppets")
    assert one["model"] == str(run / "step_0000001")
    for task in TASKS:
        assert means(exported, task, "exported") == means(both, task, "mine")
        clips, (clip,) = (x["tasks"][task]["models"][1]["clips"] for x in (both, one))
        assert clips[0] == clip


@pytest.mark.parametrize(
    ("model", "reason"),
    [("runs/none", "no such run folder"), ("runs/empty", "no checkpoint"), ("a/b/c", "a/b/c")],
)
def test_a_model_that_does_not_exist_is_an_error_of_one_line(
    prioritycut: Prioritycut,
    tmp_path: Path,
    model: str,
    reason: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "runs" / "empty").mkdir(parents=True)
    place = str(tmp_path / model)
    assert_one_line(prioritycut("benchmark", "puppets", place, *FEW), place, reason)
    assert [path.name for path in tmp_path.rglob("*")] in (["runs", "empty"], ["empty", "runs"])


def test_results_are_not_written_to_a_url(prioritycut: Prioritycut, tmp_path: Path) -> None:
    run = random_run(tmp_path / "mine", "first_order")
    result = prioritycut("benchmark", "puppets", str(run), *FEW, "--out", "memory://scores")
    assert_one_line(result, "memory://scores", "path on this machine")


def test_held_out_puppets_are_in_no_training_set() -> None:
    assert CLIPS < FIRST_LOOK
    assert FIRST_LOOK + 1_000_000 <= FIRST_MOTION


@pytest.fixture(scope="module")
def rendered() -> dict[str, Scene]:
    """What the first puppet is scored on at 64x64."""
    return dict(scenes(0, 64, 6))


def test_the_true_frames_are_the_puppet_in_the_motion_of_each_task(
    rendered: dict[str, Scene],
) -> None:
    own = render_clip(FIRST_LOOK, frames=6).frames
    for name, scene in rendered.items():
        assert (scene.source == own[0]).all()
        assert scene.relative == (name == "relative")
        driving = FIRST_LOOK if name == "reconstruction" else FIRST_MOTION
        assert (scene.driving == render_clip(driving, frames=6).frames).all()
    assert (rendered["reconstruction"].true == own).all()
    assert (rendered["relative"].true[0] == own[0]).all()
    assert (rendered["absolute"].true[0] != own[0]).any()


def test_the_source_warped_by_the_true_motion_is_the_next_frame(rendered: dict[str, Scene]) -> None:
    """True frames along the true flow differ by edges and resampling alone: by less than 4/255."""
    for scene in rendered.values():
        frames = to_tensor(scene.true, CPU)
        residual = value_of("flicker", warping_error(frames, scene.motion)) or 0
        still = value_of("flicker", warping_error(frames[:1].expand_as(frames), scene.motion)) or 0
        assert residual < 4 / 255
        assert residual < still / 1.5
        assert scene.motion.visible[1:].double().mean() > 0.9
        assert not scene.motion.visible[0].any()


def test_disoccluded_pixels_are_those_that_the_source_does_not_show(
    rendered: dict[str, Scene],
) -> None:
    """There the copied source is several times as wrong as elsewhere."""
    for scene in rendered.values():
        error = np.abs(scene.true.astype(float) - scene.source).mean(axis=-1)
        hidden, elsewhere = (error[scene.masks[name]] for name in ("disoccluded", "elsewhere"))
        assert len(hidden) > 100
        assert hidden.mean() > 3 * elsewhere.mean()
