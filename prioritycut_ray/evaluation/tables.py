"""The tables of an evaluation as text, for the terminal, Markdown and HTML alike."""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeVar

from prioritycut_ray.evaluation.records import (
    ClipScores,
    Evaluation,
    IdentityScores,
    ModelScores,
)
from prioritycut_ray.metrics.aggregate import Estimate, Metric, is_better

NOT_FINITE = "not finite"
"""Shown instead of a number that is NaN or infinite."""


class Table(NamedTuple):
    """A table of text."""

    title: str
    header: list[str]
    rows: list[list[str]]


def summary_tables(evaluation: Evaluation) -> list[Table]:
    """Return the means of all models and their paired differences; empty tables are left out."""
    labels = _labels(evaluation)
    protocol = ["protocol"] if len(evaluation.protocols) > 1 else []
    means = [*protocol, "model", *labels]
    pairs = ["model − reference", *labels]
    tables = [
        Table("Mean over clips", means, _means(evaluation, "mean_over_clips")),
        Table(
            "Mean over frames, as First Order Motion reports",
            means,
            _means(evaluation, "mean_over_frames"),
        ),
        Table(
            "Paired differences, mean over clips",
            pairs,
            _differences(evaluation, "mean_over_clips"),
        ),
        Table(
            "Paired differences, mean over frames",
            pairs,
            _differences(evaluation, "mean_over_frames"),
        ),
    ]
    return [table for table in tables if table.rows]


def metric_table(evaluation: Evaluation, title: str) -> Table:
    """Return the means over clips of one run: a row a metric, a column a model.

    The last column is the difference between the run and the baseline.
    """
    (run,) = evaluation.runs
    to_baseline = evaluation.differences[0]
    rows = [
        [
            metric_label(metric),
            *(_mean_of(metric, model) for model in evaluation.models),
            difference_text(metric, to_baseline.mean_over_clips[metric.key]),
        ]
        for metric in evaluation.metrics
    ]
    names = [model.name for model in evaluation.models]
    header = ["", *names, f"{run.name} − {to_baseline.reference}"]
    return Table(title, header, rows)


def _mean_of(metric: Metric, model: ModelScores) -> str:
    """Return the mean of a model; empty if the metric is not measured on it."""
    estimate = model.mean_over_clips.get(metric.key)
    return "" if estimate is None else estimate_text(metric, estimate, estimate.frames)


def detail_tables(evaluation: Evaluation) -> list[Table]:
    """Return the scores by identity and by clip, and the clips that were skipped."""
    tables = [_by_identity(evaluation), _by_clip(evaluation)]
    if evaluation.skipped:
        rows = [list(item) for item in evaluation.skipped.items()]
        tables.append(Table("Skipped", ["clip", "reason"], rows))
    return tables


def _labels(evaluation: Evaluation) -> list[str]:
    return [metric_label(metric) for metric in evaluation.metrics]


def metric_label(metric: Metric) -> str:
    """``L1 ↓``: the name of a metric and its direction of improvement."""
    return f"{metric.label} {'↑' if metric.higher_is_better else '↓'}"


def _means(evaluation: Evaluation, attribute: str) -> list[list[str]]:
    several = len(evaluation.protocols) > 1
    rows = []
    for model in evaluation.models:
        estimates = getattr(model, attribute)
        frames = sum(clip.frames for clip in model.clips)
        texts = [estimate_text(m, estimates[m.key], frames) for m in evaluation.metrics]
        rows.append([*([model.protocol] if several else []), model.name, *texts])
    return rows


def _differences(evaluation: Evaluation, attribute: str) -> list[list[str]]:
    return [
        [
            f"{pair.model} − {pair.reference}",
            *(difference_text(m, getattr(pair, attribute)[m.key]) for m in evaluation.metrics),
        ]
        for pair in evaluation.differences
    ]


def _by_identity(evaluation: Evaluation) -> Table:
    rows = [
        [row.identity, str(row.clips), str(row.frames), model.name]
        + [number_text(m, row.values[m.key]) for m in evaluation.metrics]
        for model, row in _interleaved(evaluation.models, lambda m: m.identities, "identity")
    ]
    header = ["identity", "clips", "frames", "model", *_labels(evaluation)]
    return Table("By identity, mean over its clips", header, rows)


def _by_clip(evaluation: Evaluation) -> Table:
    rows = [
        [row.key, row.identity, str(row.frames), model.name]
        + [
            _with_count(number_text(m, row.values[m.key]), row.counted[m.key], row.frames)
            for m in evaluation.metrics
        ]
        for model, row in _interleaved(evaluation.models, lambda m: m.clips, "key")
    ]
    header = ["clip", "identity", "frames", "model", *_labels(evaluation)]
    return Table("By clip", header, rows)


Row = TypeVar("Row", ClipScores, IdentityScores)


def _interleaved(
    models: Sequence[ModelScores], rows: Callable[[ModelScores], list[Row]], key: str
) -> list[tuple[ModelScores, Row]]:
    """Sort the rows of all models so that those of one clip or identity follow each other."""
    pairs = [(model, row) for model in models for row in rows(model)]
    order = list(dict.fromkeys(getattr(row, key) for _, row in pairs))
    return sorted(pairs, key=lambda pair: order.index(getattr(pair[1], key)))


def estimate_text(metric: Metric, estimate: Estimate, frames: int) -> str:
    """``0.0565 [0.0501, 0.0612]``, and the number of frames unless all of them counted."""
    text = number_text(metric, estimate.value)
    if estimate.low is not None and estimate.high is not None:
        text += f" [{number_text(metric, estimate.low)}, {number_text(metric, estimate.high)}]"
    return _with_count(text, estimate.frames, frames)


def difference_text(metric: Metric, estimate: Estimate) -> str:
    """``-0.0021 [-0.0034, -0.0009] better``; "unclear" where the interval contains zero."""
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


def number_text(metric: Metric, value: float | None) -> str:
    """``0.0565``; "none" where the metric is defined on no frame."""
    if value is None:
        return "none"
    return f"{value:.{metric.decimals}f}" if math.isfinite(value) else NOT_FINITE


def _with_count(text: str, counted: int, frames: int) -> str:
    return text if counted == frames else f"{text} ({counted} of {frames} frames)"
