"""Plots of a search: objective against each dimension, parallel coordinates, learning curves."""

import io
import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import partial
from statistics import fmean
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from prioritycut_ray.metrics.aggregate import Metric
from prioritycut_ray.search.results import TrialResult

_COLOURS = colormaps["viridis"]


def draw_all(trials: Sequence[TrialResult], metric: Metric) -> dict[str, bytes]:
    """Return the plots as PNG by file name."""
    reported = [trial for trial in trials if trial.last and math.isfinite(trial.last.value)]
    if not reported:
        return {}
    dimensions = list(dict.fromkeys(key for trial in reported for key in trial.parameters))
    pictures = {
        f"{metric.key}_against_{key}.png": _picture(
            partial(against, trials=reported, key=key, metric=metric)
        )
        for key in dimensions
    }
    pictures["parallel_coordinates.png"] = _picture(
        partial(parallel_coordinates, trials=reported, dimensions=dimensions, metric=metric),
        width=10,
    )
    pictures["learning_curves.png"] = _picture(
        partial(learning_curves, trials=reported, metric=metric), width=10
    )
    return pictures


def against(axes: Axes, trials: Sequence[TrialResult], key: str, metric: Metric) -> None:
    """Plot the objective against one dimension, with 95 % intervals and the mean of each value.

    Only finished trials are comparable; the others are drawn hollow. Trials without the dimension
    are not drawn.
    """
    trials = [trial for trial in trials if key in trial.parameters]
    place, ticks = _scale([trial.parameters[key] for trial in trials])
    means: dict[float, list[float]] = defaultdict(list)
    for trial in trials:
        last = trial.last
        assert last is not None
        x, whole = place(trial.parameters[key]), trial.status == "finished"
        low = last.value if last.low is None else last.low
        high = last.value if last.high is None else last.high
        axes.errorbar(
            x,
            last.value,
            # A percentile interval does not always contain the mean.
            yerr=[[max(last.value - low, 0)], [max(high - last.value, 0)]],
            fmt="o",
            color="#3b82f6" if whole else "#9ca3af",
            markerfacecolor="#3b82f6" if whole else "none",
            alpha=0.8,
            capsize=3,
        )
        if whole:
            means[x].append(last.value)
    xs = sorted(means)
    axes.plot(xs, [fmean(means[x]) for x in xs], color="#f97316", lw=1.5, label="mean, finished")
    if xs:
        axes.legend(frameon=False, fontsize="small")
    if ticks:
        axes.set_xticks(range(len(ticks)), ticks, rotation=20, ha="right")
    elif _spans_magnitudes([float(trial.parameters[key]) for trial in trials]):
        axes.set_xscale("log")
    axes.set_xlabel(key)
    axes.set_ylabel(_label(metric))


def parallel_coordinates(
    axes: Axes, trials: Sequence[TrialResult], dimensions: Sequence[str], metric: Metric
) -> None:
    """Plot one line per trial through its values and the objective, coloured by the objective.

    A line has a gap where its trial is without a dimension.
    """
    values = [trial.last.value for trial in trials if trial.last]
    colour = Normalize(min(values), max(values))
    columns: list[tuple[str, list[float], list[str]]] = []
    for key in dimensions:
        place, ticks = _scale([t.parameters[key] for t in trials if key in t.parameters])
        given = [
            place(trial.parameters[key]) if key in trial.parameters else math.nan
            for trial in trials
        ]
        columns.append((key, given, ticks))
    columns.append((_label(metric), values, []))
    for number, (_, column, ticks) in enumerate(columns):
        low, high = _ends(column)
        ends = [(low, f"{low:.4g}"), (high, f"{high:.4g}")]
        marks = [(float(place), text) for place, text in enumerate(ticks)] or ends
        for height, text in marks:
            axes.annotate(text, (number, _share(height, low, high)), fontsize="x-small", ha="left")
    for index, trial in enumerate(trials):
        heights = [_share(column[index], *_ends(column)) for _, column, _ in columns]
        axes.plot(
            range(len(columns)),
            heights,
            color=_COLOURS(colour(values[index])),
            ls="-" if trial.status == "finished" else ":",
            marker=".",
            alpha=0.8,
        )
    axes.set_xticks(range(len(columns)), [name for name, _, _ in columns], rotation=15, ha="right")
    axes.set_yticks([])
    for number in range(len(columns)):
        axes.axvline(number, color="#9ca3af", lw=0.8)


def learning_curves(axes: Axes, trials: Sequence[TrialResult], metric: Metric) -> None:
    """Plot the objective at each report; a cross marks a trial that was stopped early or failed."""
    for trial in trials:
        xs = [point.samples for point in trial.points]
        ys = [point.value for point in trial.points]
        (line,) = axes.plot(xs, ys, marker=".", lw=1.2, label=trial.key)
        if trial.status in ("stopped early", "failed"):
            axes.plot(xs[-1], ys[-1], marker="x", ms=9, color=line.get_color())
    axes.set_xlabel("frame pairs seen (× = ended early)")
    axes.set_ylabel(_label(metric))
    if len(trials) <= 12:
        axes.legend(frameon=False, fontsize="x-small")


def _scale(values: Sequence[Any]) -> tuple[Callable[[Any], float], list[str]]:
    """Return where to draw a value, and tick labels: numbers as they are, others by their order."""
    if all(isinstance(value, int | float) and not isinstance(value, bool) for value in values):
        return float, []
    names = list(dict.fromkeys(str(value) for value in values))
    return lambda value: float(names.index(str(value))), names


def _ends(column: Sequence[float]) -> tuple[float, float]:
    """Return the least and the greatest value of a column, without gaps."""
    known = [value for value in column if not math.isnan(value)]
    return min(known), max(known)


def _spans_magnitudes(values: Sequence[float]) -> bool:
    return min(values) > 0 and max(values) / min(values) > 20


def _share(value: float, low: float, high: float) -> float:
    if math.isnan(value):
        return value
    return float(np.interp(value, [low, high], [0, 1])) if high > low else 0.5


def _label(metric: Metric) -> str:
    return f"{metric.label} {'↑' if metric.higher_is_better else '↓'}"


def _picture(draw: Callable[[Axes], None], width: float = 6.5) -> bytes:
    figure = Figure(figsize=(width, 4), layout="constrained")
    draw(figure.subplots())
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=110)
    return image.getvalue()
