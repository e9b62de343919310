"""A candidate is promoted only if its export runs, alike and as cheaply, in a fresh process."""

from pathlib import Path

import numpy as np
import pytest
import torch

from prioritycut_ray.config import Config
from prioritycut_ray.data.puppets import render_clip
from prioritycut_ray.inference import pretrained
from prioritycut_ray.inference.pretrained import Animator
from prioritycut_ray.retraining.rehearsal import Frames, rehearse
from prioritycut_ray.retraining.settings import Gate
from prioritycut_ray.training.checkpoint import save_checkpoint
from prioritycut_ray.training.state import new_state

GATE = Gate(time_factor=50, memory_factor=5)
"""Generous, as this machine is shared; the factors have a test of their own."""


@pytest.fixture
def checkpoint(tiny: Config, tmp_path: Path) -> str:
    folder = tmp_path / "run" / "step_0000001"
    save_checkpoint(new_state(tiny, torch.device("cpu")), tiny, folder)
    return str(folder)


@pytest.fixture
def clip() -> Frames:
    return np.stack([*render_clip(3, size=32, frames=4).frames])


@pytest.mark.slow
def test_a_sound_candidate_passes_and_its_cost_is_stated(checkpoint: str, clip: Frames) -> None:
    checks = rehearse(checkpoint, checkpoint, clip, GATE)
    assert [check.passed for check in checks] == [True] * 3, checks
    assert "differ by at most 0/255" in checks[0].text
    assert "ms a frame" in checks[1].text
    assert "MiB" in checks[2].text
    cheaper = GATE.model_copy(update={"time_factor": 1e-6, "memory_factor": 1e-6})
    assert [check.passed for check in rehearse(checkpoint, checkpoint, clip, cheaper)] == [
        True,
        False,
        False,
    ]


@pytest.mark.slow
def test_an_export_that_animates_differently_is_refused(
    checkpoint: str, clip: Frames, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if an export had lost the last layer's bias."""
    save = pretrained.save_file

    def lossy(weights: dict[str, torch.Tensor], path: Path, metadata: dict[str, str]) -> None:
        last = [name for name in weights if name.endswith("bias")][-1]
        save(weights | {last: weights[last] + 1}, path, metadata=metadata)

    monkeypatch.setattr(pretrained, "save_file", lossy)
    same, *_ = rehearse(checkpoint, checkpoint, clip, GATE)
    assert not same.passed
    assert "(limit 1/255)" in same.text


def test_an_export_that_does_not_load_is_refused(
    checkpoint: str, clip: Frames, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = Animator.save_pretrained

    def truncated(self: Animator, folder: Path) -> None:
        write(self, folder)
        (folder / "model.safetensors").write_bytes(b"half")

    monkeypatch.setattr(Animator, "save_pretrained", truncated)
    (only,) = rehearse(checkpoint, checkpoint, clip, GATE)
    assert not only.passed
    assert "does not run in a fresh process: it ended with exit code 1" in only.text
