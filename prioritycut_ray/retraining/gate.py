"""The decision whether a candidate is promoted: a pure function of paired differences."""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from pydantic import BaseModel

from prioritycut_ray.errors import UserError
from prioritycut_ray.metrics.aggregate import Estimate, Metric
from prioritycut_ray.retraining.settings import Gate

ALL = "all"
"""All held-out clips: the fixed and the new holdout together."""
Differences = Mapping[str, Mapping[str, Estimate]]
"""Candidate − current, by holdout and metric."""


class GateCheck(BaseModel):
    """The outcome of one rule."""

    passed: bool
    text: str


class Verdict(BaseModel):
    """The decision of the gate: the content of ``verdict.json``.

    Attributes:
        promote: whether every check has passed.
        reason: the reason, in one line.
        checks: the outcome of each rule.
    """

    promote: bool
    reason: str
    checks: list[GateCheck]


class _MetricDifference(NamedTuple):
    holdout: str
    metric: Metric
    difference: Estimate


def check_rules(metrics: Sequence[Metric], gate: Gate) -> None:
    """Make sure that all metrics of the rules are measured.

    Raises:
        UserError: a rule names a metric that is not measured.
    """
    known = [metric.key for metric in metrics]
    for key in (gate.target, *gate.tolerances):
        if key not in known:
            raise UserError(f"gate: {key} is not measured; use one of {', '.join(known)}")


def judge(differences: Differences, metrics: Sequence[Metric], gate: Gate) -> Verdict:
    """Decide whether a candidate is promoted.

    Args:
        differences: candidate − current, by holdout and metric; includes :data:`ALL`.
        metrics: the measured metrics.
        gate: the rules.

    Raises:
        UserError: a rule names a metric that is not measured.
    """
    check_rules(metrics, gate)
    known = {metric.key: metric for metric in metrics}
    checks = [
        _regression(_MetricDifference(holdout, known[key], by_metric[key]), tolerance)
        for holdout, by_metric in differences.items()
        if holdout != ALL
        for key, tolerance in gate.tolerances.items()
    ]
    checks.append(
        _target(_MetricDifference(ALL, known[gate.target], differences[ALL][gate.target]))
    )
    failed = [check.text for check in checks if not check.passed]
    return Verdict(
        promote=not failed,
        reason="; ".join(failed) or f"all {len(checks)} checks passed; {checks[-1].text}",
        checks=checks,
    )


def _regression(item: _MetricDifference, tolerance: float) -> GateCheck:
    worse = _worsening(item)
    if worse is None:
        return _undefined(item)
    value, at_most = worse
    text = (
        f"{item.metric.label} on the {item.holdout} holdout is "
        f"{'worse' if value > 0 else 'better'} by {abs(value):.3g}"
        + (
            ", without an interval (one identity)"
            if item.difference.low is None
            else f", by {at_most:+.3g} at the far end of the interval"
        )
        + f" (tolerance {tolerance:g})"
    )
    return GateCheck(passed=at_most <= tolerance, text=text)


def _target(item: _MetricDifference) -> GateCheck:
    worse = _worsening(item)
    if worse is None:
        return _undefined(item)
    return GateCheck(
        passed=worse[0] <= 0,
        text=f"target {item.metric.label} over all held-out clips is "
        f"{'worse' if worse[0] > 0 else 'no worse'} ({item.difference.value:+.3g})",
    )


def _worsening(item: _MetricDifference) -> tuple[float, float] | None:
    """Return how much worse the candidate is (negative: better), and the upper bound of that.

    The upper bound is the far end of the 95 % interval, or the value itself without an interval.
    None if the metric is undefined on every frame, or not finite.
    """
    value, low, high = item.difference.value, item.difference.low, item.difference.high
    if not all(math.isfinite(number) for number in (value, low, high) if number is not None):
        return None
    if value is None:
        return None
    if item.metric.higher_is_better:
        return -value, -(value if low is None else low)
    return value, value if high is None else high


def _undefined(item: _MetricDifference) -> GateCheck:
    """Fail a metric that could not be measured."""
    holdout = f"the {item.holdout} holdout"
    if item.difference.value is None:
        text = f"{item.metric.label} is undefined on every frame of {holdout}"
    else:
        text = f"{item.metric.label} of the candidate or the current model is not finite on "
        text += holdout
    return GateCheck(passed=False, text=text)
