"""The report as one HTML page that embeds its videos and pictures and loads nothing else."""

import base64
import io
from collections.abc import Sequence
from typing import Any

import numpy as np
from markupsafe import Markup
from matplotlib import rc_context
from matplotlib.figure import Figure

from prioritycut_ray.evaluation.records import BASELINE, ClipScores, Evaluation, FrameTable
from prioritycut_ray.evaluation.showcase import (
    MOST_FRAMES,
    Showcase,
    Showcases,
    best_and_worst,
    png_bytes,
)
from prioritycut_ray.evaluation.tables import detail_tables, number_text, summary_tables
from prioritycut_ray.metrics.aggregate import Metric
from prioritycut_ray.templates import render

COLOURS = ("#3b82f6", "#f97316", "#10b981", "#a855f7", "#ec4899", "#14b8a6")
"""Of the runs' lines: distinct on a light and on a dark page."""
_GREY = "#888888"
_TEXT_COLOUR = "#010203"
"""Placeholder for the page's own text colour, which changes with the theme."""
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "text.color": _TEXT_COLOUR,
    "axes.edgecolor": _TEXT_COLOUR,
    "axes.labelcolor": _TEXT_COLOUR,
    "xtick.color": _TEXT_COLOUR,
    "ytick.color": _TEXT_COLOUR,
    "axes.spines.top": False,
    "axes.spines.right": False,
}


def html(evaluation: Evaluation, table: FrameTable, showcases: Showcases) -> str:
    """Return the page.

    Args:
        evaluation: of one or more runs.
        table: the tallies behind it.
        showcases: of the best and worst clips of the first run.
    """
    first = evaluation.runs[0]
    rows = {clip.key: clip for clip in first.clips}

    def clips(keys: Sequence[str]) -> list[dict[str, object]]:
        return [
            _clip(rows[key], evaluation.metrics[0], _curves(evaluation, table, key), showcases[key])
            for key in keys
        ]

    best, worst = best_and_worst(first)
    return render(
        "report.html.j2",
        evaluation=evaluation,
        summaries=summary_tables(evaluation),
        details=detail_tables(evaluation),
        sections=[("Best clips", clips(best)), ("Worst clips", clips(worst))],
        most_frames=MOST_FRAMES,
    )


def _clip(
    row: ClipScores, metric: Metric, curves: str, by_run: dict[str, Showcase]
) -> dict[str, object]:
    """Return what the template shows of a clip."""
    return {
        "key": row.key,
        "identity": row.identity,
        "frames": row.frames,
        "l1": number_text(metric, row.values["l1"]),
        "curves": Markup(curves),
        "runs": [
            {
                "name": name,
                "video": _data_uri("video/mp4", showcase.video),
                "columns": _data_uri("image/png", png_bytes(showcase.columns)),
                "mixes": showcase.mixes,
            }
            for name, showcase in by_run.items()
        ],
    }


def _curves(evaluation: Evaluation, table: FrameTable, key: str) -> str:
    """Plot L1 over the frames of a clip, one line a model, as SVG in the page's text colour."""
    with rc_context(_STYLE | {"svg.hashsalt": key}):
        figure = Figure(figsize=(7, 2.6), layout="constrained")
        axes = figure.subplots()
        colours = iter(COLOURS)
        for model in evaluation.models:
            if key not in table[model.name]:
                continue
            values = table[model.name][key]["l1"].numerator
            colour = _GREY if model.name.startswith(BASELINE) else next(colours, _GREY)
            axes.plot(np.arange(len(values)), values, color=colour, label=model.name, lw=1.4)
        axes.set_xlabel("frame")
        axes.set_ylabel("L1")
        axes.set_ylim(bottom=0)
        axes.legend(frameon=False, fontsize="small")
        image = io.StringIO()
        figure.savefig(image, format="svg", transparent=True, metadata={"Date": None})
    svg = image.getvalue()
    return svg[svg.index("<svg") :].replace(_TEXT_COLOUR, "currentColor")


def _data_uri(kind: str, data: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"
