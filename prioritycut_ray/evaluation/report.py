"""An evaluation as files: JSON, CSV, Markdown, and one HTML page that needs nothing beside it."""

import base64
import csv
import io
import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from matplotlib import rc_context
from matplotlib.figure import Figure
from PIL import Image

from prioritycut_ray.evaluation.records import (
    BASELINE,
    ClipScores,
    Evaluation,
    FrameTable,
    IdentityScores,
    ModelScores,
)
from prioritycut_ray.evaluation.showcase import MOST_FRAMES, Showcase
from prioritycut_ray.metrics.aggregate import Estimate, Metric, Tally, is_better, value_of
from prioritycut_ray.visualize import Panel, stack

SHOWN = 3
"""Best clips, and worst clips, that the page shows."""
COLOURS = ("#3b82f6", "#f97316", "#10b981", "#a855f7", "#ec4899", "#14b8a6")
"""Of the runs' lines: told apart on a light and on a dark page."""

NOT_FINITE = "not finite"
"""In the place of a number that is NaN or infinite."""


class Table(NamedTuple):
    """A table of text, for Markdown and HTML alike."""

    title: str
    header: list[str]
    rows: list[list[str]]


def pick_clips(model: ModelScores) -> tuple[list[str], list[str]]:
    """Keys of the clips with the lowest and with the highest L1, none in both.

    Those whose L1 is not finite are the worst.
    """
    ranked = sorted(model.clips, key=lambda clip: (_or_infinite(clip.values["l1"]), clip.key))
    count = min(SHOWN, (len(ranked) + 1) // 2)
    worst = [clip.key for clip in reversed(ranked[count:])]
    return [clip.key for clip in ranked[:count]], worst[:count]


def _or_infinite(value: float | None) -> float:
    return value if value is not None and math.isfinite(value) else math.inf


def write_report(
    folder: Path, evaluation: Evaluation, table: FrameTable, shown: dict[str, dict[str, Showcase]]
) -> list[Path]:
    """Write everything that people look at.

    Args:
        folder: is made where missing.
        evaluation: of one or more runs.
        table: the tallies behind it.
        shown: for the clips of :func:`pick_clips` of the first run, a showcase by run.

    Returns:
        The files.
    """
    folder.mkdir(parents=True, exist_ok=True)
    files = {
        "evaluation.json": evaluation.model_dump_json(indent=1),
        "clips.csv": csv_text(_clip_rows(evaluation)),
        "frames.csv": csv_text(_frame_rows(evaluation, table)),
        "report.md": markdown(evaluation),
        "report.html": html(evaluation, table, shown),
    }
    for name, text in files.items():
        (folder / name).write_text(text, encoding="utf-8")
    first = runs_of(evaluation)[0].name
    panels = [showcases[first].columns for showcases in shown.values()]
    (folder / "columns.png").write_bytes(_png(stack(panels)))
    return [folder / name for name in (*files, "columns.png")]


def runs_of(evaluation: Evaluation) -> list[ModelScores]:
    """The models that are no baseline, the first run first."""
    return [model for model in evaluation.models if model.checkpoint]


# ---------------------------------------------------------------------------------------------
# Tables
# ---------------------------------------------------------------------------------------------


def tables(evaluation: Evaluation) -> list[Table]:
    """All tables of a report."""
    metrics = evaluation.metrics
    several = len(evaluation.protocols) > 1
    labels = [f"{m.label} {'↑' if m.higher_is_better else '↓'}" for m in metrics]

    def means(attribute: str) -> list[list[str]]:
        return [
            [
                *([model.protocol] if several else []),
                model.name,
                *(
                    estimate_text(m, getattr(model, attribute)[m.key], _frames(model))
                    for m in metrics
                ),
            ]
            for model in evaluation.models
        ]

    def differences(attribute: str) -> list[list[str]]:
        return [
            [
                f"{difference.model} − {difference.reference}",
                *(difference_text(m, getattr(difference, attribute)[m.key]) for m in metrics),
            ]
            for difference in evaluation.differences
        ]

    header = [*(["protocol"] if several else []), "model", *labels]
    made = [
        Table("Mean over clips", header, means("mean_over_clips")),
        Table("Mean over frames, as First Order Motion reports", header, means("mean_over_frames")),
        Table(
            "Paired differences, mean over clips",
            ["model − reference", *labels],
            differences("mean_over_clips"),
        ),
        Table(
            "Paired differences, mean over frames",
            ["model − reference", *labels],
            differences("mean_over_frames"),
        ),
        Table(
            "By identity, mean over its clips",
            ["identity", "clips", "frames", "model", *labels],
            [
                [row.identity, str(row.clips), str(row.frames), model.name]
                + [_number(m, row.values[m.key]) for m in metrics]
                for model, row in _by_key(evaluation.models, lambda m: m.identities, "identity")
            ],
        ),
        Table(
            "By clip",
            ["clip", "identity", "frames", "model", *labels],
            [
                [row.key, row.identity, str(row.frames), model.name]
                + [_counted(m, row.values[m.key], row.counted[m.key], row.frames) for m in metrics]
                for model, row in _by_key(evaluation.models, lambda m: m.clips, "key")
            ],
        ),
    ]
    if evaluation.skipped:
        made.append(Table("Skipped", ["clip", "reason"], [*map(list, evaluation.skipped.items())]))
    return made


Row = TypeVar("Row", ClipScores, IdentityScores)


def _by_key(
    models: Sequence[ModelScores], rows: Callable[[ModelScores], list[Row]], key: str
) -> list[tuple[ModelScores, Row]]:
    """Rows of all models, those of one clip or identity below each other."""
    order = list(dict.fromkeys(getattr(row, key) for model in models for row in rows(model)))
    pairs = [(model, row) for model in models for row in rows(model)]
    return sorted(pairs, key=lambda pair: order.index(getattr(pair[1], key)))


def estimate_text(metric: Metric, estimate: Estimate, frames: int) -> str:
    """``0.0565 [0.0501, 0.0612]``, and on how many frames where not on all."""
    text = _number(metric, estimate.value)
    if estimate.low is not None and estimate.high is not None:
        text += f" [{_number(metric, estimate.low)}, {_number(metric, estimate.high)}]"
    return text if estimate.frames == frames else f"{text} ({estimate.frames} of {frames} frames)"


def difference_text(metric: Metric, estimate: Estimate) -> str:
    """``-0.0021 [-0.0034, -0.0009] better``; "unclear" where the interval holds zero."""
    if estimate.value is None:
        return "none"
    if not math.isfinite(estimate.value):
        return NOT_FINITE
    text = f"{estimate.value:+.{metric.decimals}f}"
    if estimate.low is None or estimate.high is None:
        return text
    verdict = {True: "better", False: "worse", None: "unclear"}[is_better(metric, estimate)]
    low, high = (f"{end:+.{metric.decimals}f}" for end in (estimate.low, estimate.high))
    return f"{text} [{low}, {high}] {verdict}"


def _counted(metric: Metric, value: float | None, counted: int, frames: int) -> str:
    text = _number(metric, value)
    return text if counted == frames else f"{text} ({counted} of {frames} frames)"


def _number(metric: Metric, value: float | None) -> str:
    if value is None:
        return "none"
    return f"{value:.{metric.decimals}f}" if math.isfinite(value) else NOT_FINITE


def _frames(model: ModelScores) -> int:
    return sum(clip.frames for clip in model.clips)


def _clip_rows(evaluation: Evaluation) -> Iterable[Sequence[object]]:
    keys = [metric.key for metric in evaluation.metrics]
    yield ["model", "protocol", "clip", "identity", "frames", *keys, *(f"{k}_frames" for k in keys)]
    for model in evaluation.models:
        for clip in model.clips:
            yield [
                *(model.name, model.protocol, clip.key, clip.identity, clip.frames),
                *(clip.values[key] for key in keys),
                *(clip.counted[key] for key in keys),
            ]


def _frame_rows(evaluation: Evaluation, table: FrameTable) -> Iterable[Sequence[object]]:
    keys = [metric.key for metric in evaluation.metrics]
    yield ["model", "clip", "frame", *keys]
    for model in evaluation.models:
        for clip, scores in table[model.name].items():
            for frame in range(len(scores["l1"].numerator)):
                yield [model.name, clip, frame, *(_at(key, scores[key], frame) for key in keys)]


def _at(key: str, tally: Tally, frame: int) -> float | None:
    return value_of(key, Tally(*(part[frame : frame + 1] for part in tally)))


def csv_text(rows: Iterable[Sequence[object]]) -> str:
    """A table as CSV."""
    text = io.StringIO(newline="")
    csv.writer(text).writerows(rows)
    return text.getvalue()


# ---------------------------------------------------------------------------------------------
# Pages
# ---------------------------------------------------------------------------------------------


def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("prioritycut_ray"),
        autoescape=lambda name: name is not None and ".html" in name,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["cell"] = lambda text: str(text).replace("|", "\\|")
    return environment


def render(template: str, **values: object) -> str:
    """Fill one of the package's templates; values are escaped in HTML ones."""
    return _environment().get_template(template).render(**values)


def markdown(evaluation: Evaluation) -> str:
    """The tables and the protocol as Markdown."""
    return render("report.md.j2", evaluation=evaluation, tables=tables(evaluation))


def html(evaluation: Evaluation, table: FrameTable, shown: dict[str, dict[str, Showcase]]) -> str:
    """One page with everything in it: no file beside it, no request to anywhere."""
    runs = runs_of(evaluation)
    best, worst = pick_clips(runs[0])
    rows = {clip.key: clip for clip in runs[0].clips}
    metric = evaluation.metrics[0]

    def clips(keys: Sequence[str]) -> list[dict[str, object]]:
        return [
            {
                "key": key,
                "identity": rows[key].identity,
                "frames": rows[key].frames,
                "l1": _number(metric, rows[key].values["l1"]),
                "curves": Markup(_curves(evaluation, table, key)),
                "runs": [
                    {
                        "name": name,
                        "video": _data_uri("video/mp4", showcase.video),
                        "columns": _data_uri("image/png", _png(showcase.columns)),
                        "mixes": showcase.mixes,
                    }
                    for name, showcase in shown[key].items()
                ],
            }
            for key in keys
        ]

    return render(
        "report.html.j2",
        evaluation=evaluation,
        runs=runs,
        tables=tables(evaluation),
        sections=[("Best clips", clips(best)), ("Worst clips", clips(worst))],
        most_frames=MOST_FRAMES,
    )


_TEXT_COLOUR = "#010203"
"""Stands for the page's own text colour, which changes with the theme."""


def _curves(evaluation: Evaluation, table: FrameTable, key: str) -> str:
    """L1 of each frame of a clip, a line a model, as SVG in the page's text colour."""
    style: dict[Any, Any] = {
        "svg.fonttype": "none",
        "svg.hashsalt": key,
        "font.family": "sans-serif",
        "text.color": _TEXT_COLOUR,
        "axes.edgecolor": _TEXT_COLOUR,
        "axes.labelcolor": _TEXT_COLOUR,
        "xtick.color": _TEXT_COLOUR,
        "ytick.color": _TEXT_COLOUR,
        "axes.spines.top": False,
        "axes.spines.right": False,
    }
    with rc_context(style):
        figure = Figure(figsize=(7, 2.6), layout="constrained")
        axes = figure.subplots()
        colours = iter(COLOURS)
        for model in evaluation.models:
            if key not in table[model.name]:
                continue
            values = table[model.name][key]["l1"].numerator
            baseline = model.name.startswith(BASELINE)
            colour = "#888888" if baseline else next(colours, "#888888")
            axes.plot(np.arange(len(values)), values, color=colour, label=model.name, lw=1.4)
        axes.set_xlabel("frame")
        axes.set_ylabel("L1")
        axes.set_ylim(bottom=0)
        axes.legend(frameon=False, fontsize="small")
        image = io.StringIO()
        figure.savefig(image, format="svg", transparent=True, metadata={"Date": None})
    svg = image.getvalue()
    return svg[svg.index("<svg") :].replace(_TEXT_COLOUR, "currentColor")


def _png(panel: Panel) -> bytes:
    image = io.BytesIO()
    Image.fromarray(panel.permute(1, 2, 0).numpy()).save(image, format="png")
    return image.getvalue()


def _data_uri(kind: str, data: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"
