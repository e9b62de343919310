"""Two models side by side on held-out clips, without Ray."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from prioritycut_ray.config import Config
from prioritycut_ray.data.index import ClipIndex
from prioritycut_ray.metrics.aggregate import Metric
from prioritycut_ray.retraining.diff import slice_table
from prioritycut_ray.training.checkpoint import save_checkpoint
from prioritycut_ray.training.state import new_state
from tests.clip_sets import write_random, write_set
from tests.conftest import Result, assert_one_line


@pytest.fixture
def models(tiny: Config, tmp_path: Path) -> str:
    for seed, name in enumerate("ab"):
        config = tiny.model_copy(update={"seed": seed})
        folder = tmp_path / "models" / name
        save_checkpoint(new_state(config, torch.device("cpu")), config, folder / "run/step_0000001")
        (folder / "index.json").write_text("{}")
    return str(tmp_path / "models")


def test_two_models_are_shown_side_by_side(
    models: str, tmp_path: Path, prioritycut: Callable[..., Result]
) -> None:
    data = write_set(f"{tmp_path}/data", 3)
    words = ("models", "diff", "a", "b", "--models", models)
    assert_one_line(prioritycut(*words, "--no-open"), "--data", "--split")
    assert_one_line(
        prioritycut("models", "diff", "a", "c", "--models", models), "c: is neither a model"
    )
    place = ("--data", data, "--split", "train", "--out", str(tmp_path / "diff"))
    done = prioritycut(*words, *place, "--workers", "0", "--no-open")
    assert done.returncode == 0, done.stderr
    assert "Side by side: " in done.stdout
    page = (tmp_path / "diff" / "diff.html").read_text()
    assert "<td>identity=clip2</td>" in page
    assert page.count("data:video/mp4") == 3
    assert not re.search(r'(src|href)="(?!data:)', page)


def test_a_slice_that_changed_is_marked(tmp_path: Path) -> None:
    index: ClipIndex = write_random(f"{tmp_path}/data", list(range(1, 13)))
    l1 = Metric(key="l1", label="L1", definition="", decimals=3)
    changes: list[dict[str, float | None]] = [
        {"l1": (0.02 if n < 6 else 0.0) + (-1) ** n * 0.005} for n in range(12)
    ]
    values = [{"source": "web" if n < 6 else "studio"} for n in range(12)]
    table = slice_table(index.clips, changes, [l1], values)
    assert table.rows == [
        ["source=studio", "6", "6", "0.000"],
        ["source=web", "6", "6", "0.020 *"],
    ]
