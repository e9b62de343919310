"""Tables and plots of a search, with trials of any outcome."""

import csv
import io
import math
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from prioritycut_ray.config import load_config
from prioritycut_ray.errors import UserError
from prioritycut_ray.evaluation.report import csv_text
from prioritycut_ray.metrics.aggregate import Metric
from prioritycut_ray.search.plots import against, draw_all, parallel_coordinates
from prioritycut_ray.search.report import write_results
from prioritycut_ray.search.results import (
    ReportedObjective,
    TrialResult,
    best_config,
    best_trial,
    table,
)
from prioritycut_ray.search.space import SearchConfig
from prioritycut_ray.storage.folder import Folder
from tests.conftest import TINY

L1 = Metric(key="l1", label="L1", definition="mean absolute error", decimals=4)
PSNR = Metric(key="psnr", label="PSNR", definition="dB", decimals=2, higher_is_better=True)


def trial(key: str, status: str, *values: float, **parameters: object) -> TrialResult:
    points = [
        ReportedObjective(8 * (place + 1), value, value - 0.01, value + 0.02)
        for place, value in enumerate(values)
    ]
    metrics = {"l1": values[-1]} if values else {}
    reason = "learning rate of 1e30" if status == "failed" else ""
    return TrialResult(key, dict(parameters), status, reason, points, metrics)  # type: ignore[arg-type]


VALUES = [("a", 0.3), ("b", 0.2)]
TRIALS = [
    trial("a", "finished", 0.3, 0.2, **{"priority_cut.top_k": 5, "variant": "unet"}),
    trial("b", "stopped early", 0.1, **{"priority_cut.top_k": 10, "variant": "unet"}),
    trial("c", "finished", 0.4, 0.3, **{"priority_cut.top_k": 5, "variant": "cutmix"}),
    trial("d", "failed", **{"priority_cut.top_k": 20, "variant": "cutmix"}),
]


def test_the_best_trial_has_finished() -> None:
    lowest, highest = best_trial(TRIALS, L1), best_trial(TRIALS, PSNR)
    assert lowest is not None
    assert lowest.key == "a"
    assert highest is not None
    assert highest.key == "c"
    assert best_trial(TRIALS[1:2], L1) is None


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("metric", [L1, PSNR], ids=lambda metric: metric.key)
def test_a_trial_that_is_not_finite_is_never_the_best(metric: Metric, value: float) -> None:
    diverged = trial("z", "finished", 0.5, value, **{"priority_cut.top_k": 5, "variant": "unet"})
    for trials in ([diverged, TRIALS[0]], [TRIALS[0], diverged]):
        best = best_trial(trials, metric)
        assert best is not None
        assert best.key == "a"
        assert draw_all(trials, metric).keys() == draw_all(TRIALS[:1], metric).keys()
    assert best_trial([diverged], metric) is None
    assert draw_all([diverged], metric) == {}


def test_the_best_configuration_can_be_trained(tmp_path: Path) -> None:
    search = SearchConfig.model_validate(
        {
            "name": "s",
            "base": str(TINY),
            "space": {"priority_cut.top_k": {"grid": [5]}},
            "variants": {"unet": {"priority_cut.mix_prob": 1.0}},
        }
    )
    file = tmp_path / "best.yaml"
    file.write_text(best_config(search, load_config(str(TINY)), TRIALS[0]))
    config = load_config(str(file))
    assert config.name == "s-best"
    assert config.priority_cut is not None
    assert (config.priority_cut.top_k, config.priority_cut.mix_prob) == (5, 1.0)


def test_results_are_written_and_without_a_finished_trial_it_is_an_error(tmp_path: Path) -> None:
    search = SearchConfig.model_validate(
        {"name": "s", "base": str(TINY), "space": {"priority_cut.top_k": {"grid": [5, 10]}}}
    )
    base = load_config(str(TINY))
    trials = [trial(key, "finished", value, **{"priority_cut.top_k": 5}) for key, value in VALUES]
    assert write_results(search, base, trials, L1, Folder(tmp_path / "ended")).key == "b"
    assert load_config(str(tmp_path / "ended" / "best.yaml")).name == "s-best"
    failed = [trial("c", "failed", **{"priority_cut.top_k": 10})]
    with pytest.raises(UserError, match=r"no trial finished.*trials\.csv"):
        write_results(search, base, failed, L1, Folder(tmp_path / "failed"))
    for folder in ("ended", "failed"):
        assert (tmp_path / folder / "trials.csv").exists()
        assert "<table>" in (tmp_path / folder / "search.html").read_text()
    assert not (tmp_path / "failed" / "best.yaml").exists()


def test_the_table_has_every_trial_with_the_reason_for_a_failure() -> None:
    header, body = table(TRIALS)
    rows = list(csv.DictReader(csv_text([header, *body]).splitlines()))
    assert [row["status"] for row in rows] == ["finished", "stopped early", "finished", "failed"]
    assert rows[0]["objective"] == "0.2"
    assert rows[1]["samples"] == "8"
    assert rows[3]["objective"] == ""
    assert rows[3]["reason"] == "learning rate of 1e30"


@pytest.mark.parametrize("trials", [TRIALS, TRIALS[:1], TRIALS[1:2]])
def test_plots_are_drawn_with_any_number_of_trials(trials: list[TrialResult]) -> None:
    pictures = draw_all(trials, L1)
    assert set(pictures) == {
        "l1_against_priority_cut.top_k.png",
        "l1_against_variant.png",
        "parallel_coordinates.png",
        "learning_curves.png",
    }
    for png in pictures.values():
        with Image.open(io.BytesIO(png)) as image:
            assert min(image.size) >= 400


def test_plots_leave_out_trials_without_a_dimension() -> None:
    figures = {}
    trials = [
        trial("a", "finished", 0.3, **{"mask": "cutmix"}),
        trial("b", "finished", 0.2, **{"mask": "priority", "top_k": 5.0}),
        trial("c", "stopped early", 0.4, **{"mask": "priority", "top_k": 50.0}),
    ]
    for key in ("mask", "top_k"):
        figures[key] = Figure().subplots()
        against(figures[key], trials, key, L1)
    assert len(figures["mask"].containers) == 3
    assert [bars.lines[0].get_xdata()[0] for bars in figures["top_k"].containers] == [5, 50]
    lines = Figure().subplots()
    parallel_coordinates(lines, trials, ["mask", "top_k"], L1)
    heights = [line.get_ydata() for line in lines.lines[:3]]
    assert [math.isnan(float(height[1])) for height in heights] == [True, False, False]
    assert np.isfinite([[height[0], height[2]] for height in heights]).all()
    assert len(draw_all(trials[:1] + trials[1:2], L1)) == 4


def test_without_reports_there_are_no_plots() -> None:
    assert draw_all(TRIALS[3:], L1) == {}
