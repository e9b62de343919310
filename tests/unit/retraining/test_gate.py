"""The decision of the gate, from differences with and without intervals."""

import math

import pytest

from prioritycut_ray.errors import UserError
from prioritycut_ray.metrics.aggregate import Estimate, Metric
from prioritycut_ray.retraining.gate import judge
from prioritycut_ray.retraining.settings import Gate

L1 = Metric(key="l1", label="L1", definition="", decimals=4)
PSNR = Metric(key="psnr", label="PSNR", definition="", decimals=2, higher_is_better=True)
GATE = Gate(target="l1", tolerances={"l1": 0.01, "psnr": 0.5})


def estimate(value: float | None, width: float | None = 0.0) -> Estimate:
    low = high = None
    if value is not None and width is not None:
        low, high = value - width, value + width
    return Estimate(value=value, low=low, high=high, clips=3, frames=30, identities=3)


def differences(
    fixed: tuple[Estimate, Estimate], new: tuple[Estimate, Estimate], everywhere: Estimate
) -> dict[str, dict[str, Estimate]]:
    return {
        "fixed": dict(zip(("l1", "psnr"), fixed, strict=True)),
        "new": dict(zip(("l1", "psnr"), new, strict=True)),
        "all": {"l1": everywhere, "psnr": estimate(0.0)},
    }


BETTER = (estimate(-0.02), estimate(1.0))


@pytest.mark.parametrize(
    ("fixed", "new", "everywhere", "reason"),
    [
        (BETTER, BETTER, estimate(-0.02), ""),
        ((estimate(0.005), estimate(0.0)), BETTER, estimate(-0.01), ""),
        ((estimate(0.02), estimate(0.0)), BETTER, estimate(-0.01), "L1 on the fixed holdout"),
        (BETTER, (estimate(0.0), estimate(-1.0)), estimate(-0.01), "PSNR on the new holdout"),
        # Too uncertain to rule a regression out.
        ((estimate(0.0, 0.02), estimate(0.0)), BETTER, estimate(-0.01), "far end"),
        (BETTER, BETTER, estimate(0.001), "target L1"),
        ((estimate(0.02, None), estimate(0.0)), BETTER, estimate(0.0), "without an interval"),
        ((estimate(None), estimate(0.0)), BETTER, estimate(0.0), "undefined on every frame"),
        (BETTER, BETTER, estimate(None), "undefined on every frame"),
    ],
)
def test_the_gate(
    fixed: tuple[Estimate, Estimate],
    new: tuple[Estimate, Estimate],
    everywhere: Estimate,
    reason: str,
) -> None:
    verdict = judge(differences(fixed, new, everywhere), [L1, PSNR], GATE)
    assert verdict.promote == (reason == "")
    assert reason in verdict.reason
    assert len(verdict.checks) == 5


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_metric_that_is_not_finite_is_never_promoted(value: float) -> None:
    bad = estimate(value)
    for fixed, everywhere in [((bad, estimate(1.0)), estimate(-0.02)), (BETTER, bad)]:
        verdict = judge(differences(fixed, BETTER, everywhere), [L1, PSNR], GATE)
        assert not verdict.promote
        assert "not finite" in verdict.reason
        assert "nan" not in verdict.reason
        assert "inf" not in verdict.reason.replace("finite", "")


def test_a_rule_for_an_unmeasured_metric_is_rejected() -> None:
    with pytest.raises(UserError, match=r"gate: akd is not measured; use one of l1, psnr"):
        judge(differences(BETTER, BETTER, estimate(0.0)), [L1, PSNR], Gate(target="akd"))
