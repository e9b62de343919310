"""Whether a candidate takes the current model's place: a pure function of paired differences."""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from pydantic import BaseModel

from prioritycut_ray.errors import UserError
from prioritycut_ray.metrics.aggregate import Estimate, Metric
from prioritycut_ray.retraining.settings import Gate

ALL = "all"
"""Both holdouts together."""
Differences = Mapping[str, Mapping[str, Estimate]]
"""Candidate − current, by holdout and metric."""


class Check(BaseModel):
    """One thing that the gate looked at, in words."""

    passed: bool
    text: str


class Verdict(BaseModel):
    """What the gate decided.

    Attributes:
        promote: every check passed.
        reason: one line.
        checks: everything that was looked at.
    """

    promote: bool
    reason: str
    checks: list[Check]


class _Named(NamedTuple):
    holdout: str
    metric: Metric
    difference: Estimate


def check_rules(metrics: Sequence[Metric], gate: Gate) -> None:
    """Make sure that the gate can be asked about these metrics.

    Raises:
        UserError: a rule names a metric that is not measured.
    """
    known = [metric.key for metric in metrics]
    for key in (gate.target, *gate.tolerances):
        if key not in known:
            raise UserError(f"gate: {key} is not measured; choose among {', '.join(known)}")


def judge(differences: Differences, metrics: Sequence[Metric], gate: Gate) -> Verdict:
    """Decide on a candidate.

    Args:
        differences: candidate − current, by holdout; :data:`ALL` holds all held-out clips.
        metrics: what the numbers mean.
        gate: the rules.

    Raises:
        UserError: see :func:`check_rules`.
    """
    check_rules(metrics, gate)
    known = {metric.key: metric for metric in metrics}
    checks = [
        _regression(_Named(holdout, known[key], by_metric[key]), tolerance)
        for holdout, by_metric in differences.items()
        if holdout != ALL
        for key, tolerance in gate.tolerances.items()
    ]
    checks.append(_target(_Named(ALL, known[gate.target], differences[ALL][gate.target])))
    failed = [check.text for check in checks if not check.passed]
    return Verdict(
        promote=not failed,
        reason="; ".join(failed) or f"{len(checks)} checks passed, {checks[-1].text}",
        checks=checks,
    )


def _regression(item: _Named, tolerance: float) -> Check:
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
    return Check(passed=at_most <= tolerance, text=text)


def _target(item: _Named) -> Check:
    worse = _worsening(item)
    if worse is None:
        return _undefined(item)
    return Check(
        passed=worse[0] <= 0,
        text=f"target {item.metric.label} over all held-out clips is "
        f"{'worse' if worse[0] > 0 else 'no worse'} ({item.difference.value:+.3g})",
    )


def _worsening(item: _Named) -> tuple[float, float] | None:
    """By how much the candidate is worse (below 0: better), and at most by how much.

    The second is the far end of the 95 % interval; the same as the first where there is none. None
    if the metric is defined on no frame, or is not finite.
    """
    value, low, high = item.difference.value, item.difference.low, item.difference.high
    if not all(math.isfinite(number) for number in (value, low, high) if number is not None):
        return None
    if value is None:
        return None
    if item.metric.higher_is_better:
        return -value, -(value if low is None else low)
    return value, value if high is None else high


def _undefined(item: _Named) -> Check:
    """What nobody could measure is not a reason to promote."""
    holdout = f"the {item.holdout} holdout"
    if item.difference.value is None:
        text = f"{item.metric.label} is defined on no frame of {holdout}"
    else:
        text = f"{item.metric.label} of the candidate or of the current model is not finite on "
        text += holdout
    return Check(passed=False, text=text)
