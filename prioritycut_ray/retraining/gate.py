"""The decision whether a candidate is promoted: a pure function of a comparison.

Four kinds of rules on how much worse the candidate is (:mod:`worsening`):

- *regressions*: on each holdout, no worse than the current model by more than a tolerance;
- *target*: over all held-out clips, better than the current model;
- *slices*: on no slice worse than the current model, by more than a tolerance and by more than
  chance explains. Here, evidence of a loss refuses, rather than a lack of evidence against one, as
  slices are small; the error rate is shared by all slices (Bonferroni).
- *anchor*: over all held-out clips, no worse than the anchor by more than a tolerance. This bound
  shares its error rate with all comparisons since the anchor was pinned, so that small losses do
  not add up over nights.

A candidate must pass them all, so each bound may use the whole error rate: the probability that a
candidate which breaks a rule is promoted is at most that of the one rule (an intersection-union
test: Berger, Technometrics 24, 1982).
"""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from pydantic import BaseModel

from prioritycut_ray.errors import UserError
from prioritycut_ray.metrics.aggregate import Metric
from prioritycut_ray.retraining.comparison import FIXED, NEW, ClipChange
from prioritycut_ray.retraining.settings import Gate
from prioritycut_ray.retraining.worsening import (
    FEW_IDENTITIES,
    Worsening,
    alpha_of_night,
    worsening,
)

EVERYWHERE = "all held-out clips"


class GateCheck(BaseModel):
    """The outcome of one rule.

    Attributes:
        passed: whether it allows the promotion.
        text: the rule, the figures and the outcome, in one line.
        way_out: of a failed check: what would have to change for it to pass; else empty.
    """

    passed: bool
    text: str
    way_out: str = ""


class Verdict(BaseModel):
    """The decision of the gate: the content of ``verdict.json``.

    Attributes:
        promote: whether every check has passed.
        reason: the reason, in one line.
        night: number of the comparison since the anchor was pinned, from 1.
        checks: the outcome of each rule.
    """

    promote: bool
    reason: str
    night: int
    checks: list[GateCheck]


class _Rule(NamedTuple):
    """A bound that the candidate must keep.

    Attributes:
        metric: what is bounded.
        where: on which clips, in words.
        reference: the model that it is compared with, in words.
        limit: how much worse the candidate may be.
        alpha: probability that the bound is too low.
        changes: the clips' differences; None for a clip on which the metric is undefined.
        units: what is independent: the identity of each clip.
        is_target: whether the candidate must be better, rather than within a tolerance.
    """

    metric: Metric
    where: str
    reference: str
    limit: float
    alpha: float
    changes: list[float | None]
    units: list[str]
    is_target: bool = False


def check_rules(metrics: Sequence[Metric], gate: Gate) -> None:
    """Make sure that all metrics of the rules are measured.

    Raises:
        UserError: a rule names a metric that is not measured.
    """
    known = [metric.key for metric in metrics]
    of_slices = [key for tolerances in gate.slices.values() for key in tolerances]
    for key in (gate.target, *gate.tolerances, *of_slices):
        if key not in known:
            raise UserError(f"gate: {key} is not measured; use one of {', '.join(known)}")


def judge(
    changes: Sequence[ClipChange], metrics: Sequence[Metric], gate: Gate, night: int
) -> Verdict:
    """Decide whether a candidate is promoted.

    Args:
        changes: the differences of each held-out clip.
        metrics: the measured metrics.
        gate: the rules.
        night: number of the comparison since the anchor was pinned, from 1.

    Raises:
        UserError: a rule names a metric that is not measured.
    """
    check_rules(metrics, gate)
    checks = [
        *_slice_checks(changes, metrics, gate),
        *(_check(rule) for rule in _rules(changes, metrics, gate, night)),
    ]
    return verdict(night, checks)


def verdict(night: int, checks: list[GateCheck]) -> Verdict:
    """Return the verdict of all checks; the last one is quoted if they have all passed."""
    failed = [check.text for check in checks if not check.passed]
    return Verdict(
        promote=not failed,
        reason="; ".join(failed) or f"all {len(checks)} checks passed; {checks[-1].text}",
        night=night,
        checks=checks,
    )


def _rules(
    changes: Sequence[ClipChange], metrics: Sequence[Metric], gate: Gate, night: int
) -> Iterator[_Rule]:
    """Yield the rules; the target comes last."""
    known = {metric.key: metric for metric in metrics}
    for holdout in (FIXED, NEW):
        own = [change for change in changes if change.holdout == holdout]
        for key, tolerance in gate.tolerances.items() if own else ():
            yield _rule(own, known[key], f"the {holdout} holdout", tolerance, gate.alpha)
    for key, tolerance in gate.tolerances.items():
        spent = alpha_of_night(gate.alpha, night)
        yield _rule(changes, known[key], EVERYWHERE, tolerance, spent, _since_anchor, "the anchor")
    target = _rule(changes, known[gate.target], EVERYWHERE, 0.0, gate.alpha)
    yield target._replace(is_target=True)


def _since_current(change: ClipChange) -> dict[str, float | None]:
    return change.since_current


def _since_anchor(change: ClipChange) -> dict[str, float | None]:
    return change.since_anchor


def _rule(
    changes: Sequence[ClipChange],
    metric: Metric,
    where: str,
    limit: float,
    alpha: float,
    since: Callable[[ClipChange], dict[str, float | None]] = _since_current,
    reference: str = "the current model",
) -> _Rule:
    return _Rule(
        metric=metric,
        where=where,
        reference=reference,
        limit=limit,
        alpha=alpha,
        changes=[since(change)[metric.key] for change in changes],
        units=[change.identity for change in changes],
    )


def _check(rule: _Rule) -> GateCheck:
    """Compare the upper bound of the worsening with the limit."""
    found = _measured(rule)
    if found is None:
        text = f"{rule.metric.label} is undefined on every frame of {rule.where}"
        return GateCheck(passed=False, text=text)
    if not math.isfinite(found.value):
        return _not_finite(rule)
    passed = found.at_most(rule.alpha) <= rule.limit
    return GateCheck(
        passed=passed, text=_text(rule, found), way_out="" if passed else _way_out(rule, found)
    )


def _not_finite(rule: _Rule) -> GateCheck:
    text = f"{rule.metric.label} of the candidate or {rule.reference} is not finite on {rule.where}"
    return GateCheck(passed=False, text=text)


def _measured(rule: _Rule) -> Worsening | None:
    """Return the worsening on the clips of a rule; None if no frame counts."""
    sign = -1.0 if rule.metric.higher_is_better else 1.0
    pairs = zip(rule.changes, rule.units, strict=True)
    known = [(sign * value, unit) for value, unit in pairs if value is not None]
    return worsening([value for value, _ in known], [unit for _, unit in known])


def _slice_checks(
    changes: Sequence[ClipChange], metrics: Sequence[Metric], gate: Gate
) -> list[GateCheck]:
    """Check all slices together; each that is worse is a failed check of its own."""
    known = {metric.key: metric for metric in metrics}
    rules = [
        rule
        for key, tolerances in gate.slices.items()
        for metric, tolerance in tolerances.items()
        for rule in _slice_rules(changes, key, known[metric], tolerance)
    ]
    measured = [(rule, found) for rule in rules if (found := _measured(rule))]
    tested = [(rule, found) for rule, found in measured if found.identities > 1]
    failed = [_not_finite(rule) for rule, found in measured if not math.isfinite(found.value)]
    failed += [
        _slice_failure(rule, found)
        for rule, found in tested
        if found.value > rule.limit and found.p_value() <= gate.alpha / len(tested)
    ]
    if failed or not rules:
        return failed
    text = (
        f"none of {len(tested)} slices is worse by more than its tolerance and by more than chance"
    )
    if len(measured) > len(tested):
        text += f"; {len(measured) - len(tested)} of one identity or clip cannot be tested"
    return [GateCheck(passed=True, text=text)]


def _slice_rules(
    changes: Sequence[ClipChange], key: str, metric: Metric, tolerance: float
) -> Iterator[_Rule]:
    for value in sorted({change.slices[key] for change in changes}):
        own = [change for change in changes if change.slices[key] == value]
        rule = _rule(own, metric, f"the slice {key}={value}", tolerance, 0.0)
        # Within one identity, its clips are all there is to compare.
        one = len(set(rule.units)) == 1
        yield rule._replace(units=[change.key for change in own]) if one else rule


def _slice_failure(rule: _Rule, found: Worsening) -> GateCheck:
    return GateCheck(
        passed=False,
        text=f"{rule.metric.label} on {rule.where} is worse by {found.value:.3g}, which chance "
        f"explains with a probability of {found.p_value():.1g} (tolerance {rule.limit:g})",
        way_out=f"it would pass if it were worse by at most {rule.limit:g}",
    )


def _text(rule: _Rule, found: Worsening) -> str:
    return (
        f"{'target ' if rule.is_target else ''}{rule.metric.label} on {rule.where} is "
        f"{'worse' if found.value > 0 else 'better'} than {rule.reference}'s by "
        f"{abs(found.value):.3g}, {_bound_text(rule, found)} ("
        + ("must be better)" if rule.is_target else f"tolerance {rule.limit:g})")
    )


def _bound_text(rule: _Rule, found: Worsening) -> str:
    bound = found.at_most(rule.alpha)
    if found.identities == 1:
        return "without an interval (one identity)"
    if found.identities < FEW_IDENTITIES:
        return f"by {bound:+.3g} for the worst of {found.identities} identities"
    return f"by {bound:+.3g} at the far end of the interval"


def _way_out(rule: _Rule, found: Worsening) -> str:
    """Say what would have to change for the same data to pass."""
    needed = found.needed_value(rule.limit, rule.alpha)
    effect = f"worse by at most {needed:.3g}" if needed > 0 else f"better by {-needed:.3g} or more"
    same = f"it would pass on the same {found.identities} identities if it were {effect}"
    more = found.needed_identities(rule.limit, rule.alpha)
    return same if more is None else f"{same}, or with the same difference on {more} identities"
