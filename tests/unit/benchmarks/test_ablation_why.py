"""benchmarks/ablation_why.py: what masks, discriminators and gradients do, with known answers."""

import importlib
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch

from prioritycut_ray.config import load_config
from prioritycut_ray.errors import UserError
from prioritycut_ray.training.checkpoint import save_checkpoint
from prioritycut_ray.training.state import new_state
from tests.conftest import TINY
from tests.places import ROOT

CPU = torch.device("cpu")


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("ablation_why")


def test_a_discriminator_that_calls_everything_real_is_right_where_the_image_is_real(
    script: Any,
) -> None:
    config = load_config(str(TINY))
    state = new_state(config, CPU)
    assert state.discriminator is not None
    with torch.no_grad():
        state.discriminator.pixel_head.bias.fill_(1e6)
    pair, hidden = script.unseen_pairs(1, config.data.size)
    found = script.measure(state, config, pair, hidden)
    assert found["chance"] == pytest.approx(hidden.float().mean().item()) != 0
    assert found["accuracy, dis-occluded"] == found["accuracy, elsewhere"] == 0.5
    assert (found["accuracy, inside"], found["accuracy, outside"]) == (0, 1)
    assert 0 <= found["priority mask"] <= 1
    assert 0 < found["cutmix mask"] <= 1
    assert found["gradient, dis-occluded"] > 0
    assert found["gradient, elsewhere"] > 0


def test_logits_that_are_all_positive_can_rank_pixels(script: Any) -> None:
    high = torch.tensor([41.0, 43.0])
    assert script.auroc(high, high - 10) == 1
    assert script.auroc(high - 10, high) == 0
    assert script.auroc(high, high) == 0.5
    assert script.auroc(high, torch.tensor([42.0, 40.0])) == 0.75


def test_every_kept_checkpoint_of_a_run_is_a_line_and_a_point(
    script: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = load_config(str(TINY))
    state = new_state(config, CPU)
    for step in (1, 2):
        state.step, state.samples = step, 8 * step
        save_checkpoint(state, config, tmp_path / "cut" / f"step_{step:07d}")
    script.main([tmp_path / "cut"], out=tmp_path / "out", clips=1)
    assert capsys.readouterr().out.count("| cut |") == 2
    assert list(pd.read_csv(tmp_path / "out" / "table.csv")["samples"]) == [8, 16]
    assert {path.stem for path in (tmp_path / "out").glob("*.png")} == set(script.PICTURES)


def test_a_run_without_pixel_logits_is_refused(script: Any, tmp_path: Path) -> None:
    config = load_config(str(TINY), ["priority_cut=null", "discriminator.kind=none"])
    save_checkpoint(new_state(config, CPU), config, tmp_path / "step_0000001")
    with pytest.raises(UserError, match="no U-Net discriminator"):
        next(script.measured(tmp_path, 1))
    with pytest.raises(UserError, match="no checkpoint"):
        next(script.measured(tmp_path / "elsewhere", 1))
