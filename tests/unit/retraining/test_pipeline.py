"""Whole nights in this process: no Ray, small networks, synthetic puppets."""

import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from prioritycut_ray.config import load_config
from prioritycut_ray.data.index import read_index
from prioritycut_ray.data.puppets import render_clip
from prioritycut_ray.data.shard_writer import Member, ShardWriter
from prioritycut_ray.retraining import pipeline
from prioritycut_ray.retraining.notifications import RetrainReport
from prioritycut_ray.retraining.registry import adopt, promote, read_current
from prioritycut_ray.retraining.settings import RetrainSettings
from prioritycut_ray.storage.folder import Folder
from prioritycut_ray.storage.lease import leased
from prioritycut_ray.training.checkpoint import save_checkpoint
from prioritycut_ray.training.state import new_state
from prioritycut_ray.video.encoding import write_video
from prioritycut_ray.video.source import Frame
from tests.conftest import TINY

SIZE = 32


def puppet(seed: int) -> list[Frame]:
    return [*render_clip(seed, size=SIZE, frames=6).frames]


def add(data: Path, split_of: dict[str, str], frames: Sequence[list[Frame]]) -> None:
    """Append clips, which are named after their splits."""
    base = read_index(str(data)) if data.exists() else None
    with ShardWriter(str(data), base=base) as writer:
        for key, own in zip(split_of, frames, strict=True):
            encoded = io.BytesIO()
            write_video(encoded, own, 12.0)
            writer.add(
                Member(
                    key=key,
                    data=encoded.getvalue(),
                    frames=len(own),
                    fps=12.0,
                    width=SIZE,
                    height=SIZE,
                    identity=key,
                    original="",
                    variable_rate=False,
                )
            )
        writer.finish(split_of)


Night = Callable[..., RetrainReport]


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A data set, and a current model of random weights."""
    data, models = tmp_path / "data", Folder(tmp_path / "models")
    splits = {"a": "train", "b": "train", "c": "train", "x": "val", "y": "val"}
    add(data, splits, [puppet(seed) for seed in range(5)])
    config = load_config(str(TINY), [f"data.url={data}", "train.workers=0"])
    run = tmp_path / "first" / "step_0000000"
    save_checkpoint(new_state(config, torch.device("cpu")), config, run)
    with leased(models, 60) as lease:
        adopt(models, lease, str(run), "first")
        promote(models, lease, "first", "by hand")
    return tmp_path


@pytest.fixture
def night(project: Path, monkeypatch: pytest.MonkeyPatch) -> Night:
    """Run a night with changes to the settings; Ray tasks are tested elsewhere."""
    monkeypatch.setattr(pipeline, "_map", map)

    def run(**changes: Any) -> RetrainReport:
        values: dict[str, Any] = {
            "models": str(project / "models"),
            "data": str(project / "data"),
            "budget": 16,
            "set": {"optim.lr": 0.005, "optim.ema_decay": 0},
            "gate": {"tolerances": {"l1": 0.002}, "time_factor": 50},
        }
        report = pipeline.retrain(RetrainSettings.model_validate(values | changes), print)
        assert report is not None
        return report

    return run


def test_a_better_candidate_is_promoted_and_leaks_are_left_out(project: Path, night: Night) -> None:
    leak = puppet(0)
    add(project / "data", {"d": "train", "z": "val", "w": "val"}, [puppet(7), puppet(8), leak])
    report = night()
    assert report.outcome == "promoted", report.reason
    assert report.comparison is not None
    assert report.comparison.clips == {"fixed": 2, "all": 3, "new": 1}
    assert report.comparison.skipped == {"w": "has the same bytes as a"}
    assert report.data is not None
    assert [figure.name for figure in report.data.figures][:2] == ["brightness", "motion"]
    assert report.verdict is not None
    assert "fresh process" in report.verdict.checks[0].text
    current = read_current(Folder(project / "models"))
    assert current is not None
    assert (current.model, current.anchor.model) == (report.candidate, "first")
    assert current.anchor.compared == [report.candidate]
    page = (project / "models" / report.candidate / "report.html").read_text()
    assert "Left out of the holdout" in page
    assert "comparison 1 since it was pinned" in page
    probes = json.loads((project / "models" / report.candidate / "probes.json").read_text())
    assert len(probes) == 7
    assert not (project / "models" / "first" / "probes.json").exists()


@pytest.mark.slow
def test_a_shifted_night_is_refused_before_anything_is_trained(
    project: Path, night: Night, capsys: pytest.CaptureFixture[str]
) -> None:
    white = [np.full((SIZE, SIZE, 3), 255, np.uint8)] * 6
    add(project / "data", {"d": "train", "e": "train"}, [white, white])
    report = night(data_gate={"brightness": 0.2})
    assert report.outcome == "refused"
    assert report.reason.startswith("data_gate: brightness of the new clips is ")
    assert report.comparison is None
    assert "[3/6]" not in capsys.readouterr().out
    assert not (project / "models" / report.candidate / "run").exists()
    page = (project / "models" / report.candidate / "report.html").read_text()
    assert "REFUSED: brightness" in page
    # Once the limit is raised, the same clips are tried.
    assert night(data_gate={"brightness": 0.9}).comparison is not None


@pytest.mark.slow
def test_a_slice_refuses_by_name(project: Path, night: Night) -> None:
    add(project / "data", {"d": "train"}, [puppet(7)])
    report = night(gate={"tolerances": {}, "slices": {"identity": {"l1": 0.0}}, "time_factor": 50})
    assert report.verdict is not None
    # One clip an identity: nothing can be tested, which is said.
    texts = [check.text for check in report.verdict.checks]
    assert any("2 of one identity or clip cannot be tested" in text for text in texts)
