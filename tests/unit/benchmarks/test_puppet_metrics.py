"""benchmarks/puppet_metrics.py: rank correlations of metrics with true errors."""

import importlib
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from prioritycut_ray.config import load_config
from prioritycut_ray.training.checkpoint import save_checkpoint
from prioritycut_ray.training.state import new_state
from tests.places import FAMILIES, ROOT


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("puppet_metrics")


@pytest.mark.parametrize(
    ("guessed", "count", "verdict"),
    [
        (lambda x: x**3, 20, "validated"),
        (lambda x: x**3, 19, "unvalidated: 19 of 20 models"),
        (lambda x: -x, 20, "unvalidated"),
        (lambda x: 1.0, 20, "unvalidated"),
    ],
)
def test_a_metric_is_validated_by_its_ranks_over_enough_models(
    script: Any, guessed: Any, count: int, verdict: str
) -> None:
    true = [float(x) for x in range(count)]
    found = script.ranking("name", "l1", [guessed(x) for x in true], true)
    assert found.models == count
    assert found.verdict() == verdict
    if verdict == "validated":
        assert found.correlation == pytest.approx(1)
        assert found.interval == pytest.approx((1, 1))


def test_models_whose_values_are_not_finite_do_not_count(script: Any) -> None:
    found = script.ranking("name", "l1", [1, 2, math.nan, 3], [1, 2, 3, math.inf])
    assert (found.models, found.correlation) == (2, pytest.approx(1))
    assert math.isnan(script.ranking("name", "l1", [math.nan], [1]).correlation)


def test_two_models_of_random_weights_are_scored_once(
    script: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = []
    for family, source in FAMILIES.items():
        config, folder = load_config(str(source)), tmp_path / f"random-{family}"
        save_checkpoint(new_state(config, torch.device("cpu")), config, folder / "step_0000001")
        runs.append(str(folder))
    out = tmp_path / "out"
    script.main(runs, train=0, out=out, identities=1, frames=3)
    said = capsys.readouterr().out
    files = sorted(out.glob("scores/*/puppets.json"))
    assert [file.parent.name for file in files] == sorted(Path(run).name for run in runs)
    for words in ("random-first_order", "identity_distance", "l1 of reconstruction", "baseline"):
        assert words in said
    assert said.count("unvalidated: 2 of 20 models") == 3
    written = [file.stat().st_mtime_ns for file in files]
    script.main(runs, train=0, out=out, identities=1, frames=3)
    assert capsys.readouterr().out == said
    assert [file.stat().st_mtime_ns for file in files] == written
    script.main(runs[:1], train=0, out=out, identities=2, frames=3)
    assert files[0].stat().st_mtime_ns > written[0], "other puppets, other scores"


@pytest.mark.slow
def test_small_models_are_trained_and_not_trained_again(
    script: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(script, "PUPPETS", 2)
    few = ["train.samples=16", "train.image_every=1000"]
    for _ in range(2):
        script.main([], train=2, out=tmp_path, identities=1, frames=3, override=few)
        said = capsys.readouterr().out
        assert "| model00 |" in said
        assert "| model01 |" in said
    assert len(list(tmp_path.glob("runs/model*/step_*"))) == 2


def test_without_models_it_says_what_to_give(
    script: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    script.main([], train=0)
    assert "--train 20" in capsys.readouterr().out
