"""What a retraining keeps: weights that somebody may need, and all reports."""

from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import torch

from prioritycut_ray.config import Config
from prioritycut_ray.retraining.job import RetrainingJob, finish
from prioritycut_ray.retraining.registry import promote
from prioritycut_ray.retraining.settings import RetrainSettings
from prioritycut_ray.storage.folder import Folder
from prioritycut_ray.storage.lease import leased
from prioritycut_ray.training.checkpoint import save_checkpoint
from prioritycut_ray.training.state import new_state

NIGHTS = 7


@pytest.fixture
def models(tiny: Config, tmp_path: Path) -> Folder:
    """A candidate a night, of random weights."""
    folder = Folder(str(tmp_path / "models"))
    state = new_state(tiny, torch.device("cpu"))
    for night in range(NIGHTS):
        save_checkpoint(state, tiny, tmp_path / "models" / f"n{night}" / "run" / "step_0000001")
        folder.write(f"n{night}/index.json", b"{}")
        folder.write(f"n{night}/report.html", b"kept")
    return folder


@pytest.mark.parametrize(
    ("promoted", "keep", "removed"),
    [
        ({0}, 2, [1, 2, 3, 4]),  # night after night refused: the newest refused ones stay
        # all promoted: the newest former ones and the anchor, the first, stay
        ({0, 1, 2, 3, 4, 5, 6}, 2, [1, 2, 3]),
        ({0, 2, 4}, 1, [1, 3, 5]),
        ({0, 2, 4}, 9, []),
    ],
)
def test_only_weights_that_nobody_needs_are_removed(
    models: Folder, promoted: set[int], keep: int, removed: list[int]
) -> None:
    settings = RetrainSettings(data="data", budget=1, keep=keep)
    begun = datetime(2026, 1, 1, tzinfo=UTC)
    gone: list[str] = []
    with leased(models, 60) as lease:
        for night in range(NIGHTS):
            job = RetrainingJob(
                candidate=f"n{night}",
                current="n0",
                checkpoint="",
                settings=settings,
                new_clips=1,
                samples=1,
                begun=begun + timedelta(days=night),
            )
            models.write(f"n{night}/job.json", job.model_dump_json().encode())
            if night in promoted:
                promote(models, lease, job.candidate, "better")
            gone += finish(models, job, lease)
    assert sorted(gone) == [f"n{night}" for night in removed]
    for night in range(NIGHTS):
        assert models.exists(f"n{night}/run/step_0000001") == (night not in removed)
        assert models.exists(f"n{night}/report.html")
