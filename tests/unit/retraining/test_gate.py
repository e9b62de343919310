"""The decision of the gate, from the differences of clips."""

import math
from collections.abc import Sequence

import numpy as np
import pytest

from prioritycut_ray.errors import UserError
from prioritycut_ray.metrics.aggregate import Metric
from prioritycut_ray.retraining.comparison import ClipChange
from prioritycut_ray.retraining.gate import Verdict, judge
from prioritycut_ray.retraining.settings import Gate

L1 = Metric(key="l1", label="L1", definition="", decimals=4)
PSNR = Metric(key="psnr", label="PSNR", definition="", decimals=2, higher_is_better=True)
GATE = Gate(target="l1", tolerances={"l1": 0.01, "psnr": 0.5})
ROOTS = np.random.default_rng(0).normal(size=30)
SPREAD = (ROOTS - ROOTS.mean()) / ROOTS.std(ddof=1)
"""Of 30 identities, with mean 0 and standard deviation 1."""


def changes(
    l1: Sequence[float | None],
    psnr: Sequence[float | None] | float = 1.0,
    anchor: float | None = None,
    holdout: str = "fixed",
) -> list[ClipChange]:
    """One clip an identity; without ``anchor``, the anchor is the current model."""
    gains = [psnr] * len(l1) if isinstance(psnr, float) else psnr
    return [
        ClipChange(
            key=f"{holdout}{number}",
            identity=f"{holdout}{number}",
            holdout=holdout,
            slices={},
            since_current={"l1": loss, "psnr": gain},
            since_anchor={"l1": loss if anchor is None else anchor, "psnr": gain},
        )
        for number, (loss, gain) in enumerate(zip(l1, gains, strict=True))
    ]


def judged(*holdouts: list[ClipChange], night: int = 1) -> Verdict:
    return judge([change for own in holdouts for change in own], [L1, PSNR], GATE, night)


BETTER = changes([-0.02, -0.03])
NEW = changes([-0.02], holdout="new")


@pytest.mark.parametrize(
    ("fixed", "new", "reason"),
    [
        (BETTER, NEW, ""),
        (BETTER, [], ""),
        # Nothing changed: no worse.
        (changes([0.0, 0.0], 0.0), changes([0.0], 0.0, holdout="new"), ""),
        (changes([0.02, -0.05]), NEW, "by +0.02 for the worst of 2 identities (tolerance 0.01)"),
        (BETTER, changes([-0.02], -1.0, holdout="new"), "PSNR on the new holdout is worse"),
        (BETTER, changes([0.02], holdout="new"), "without an interval (one identity)"),
        (changes([0.005, -0.02]), NEW, "target L1 on all held-out clips is better"),
        (changes([-0.02, -0.02], anchor=0.02), NEW, "is worse than the anchor's by 0.0"),
        (changes([None, None]), NEW, "L1 is undefined on every frame of the fixed holdout"),
        (changes([None, -0.03]), NEW, ""),
    ],
)
def test_few_identities_are_judged_by_the_worst(
    fixed: list[ClipChange], new: list[ClipChange], reason: str
) -> None:
    verdict = judged(fixed, new)
    assert verdict.promote == (reason == "")
    assert reason in verdict.reason
    assert len(verdict.checks) == (7 if new else 5)


@pytest.mark.parametrize(
    ("mean", "reason"),
    [
        # The standard error is 0.001; Student's t with 29 degrees of freedom has 1.70 at 5 %.
        (-0.0018, ""),
        (-0.0016, "target L1 on all held-out clips is better than the current model's by 0.0016"),
        (0.0082, "far end of the interval (must be better)"),
        (0.0084, "L1 on the fixed holdout is worse"),
    ],
)
def test_many_identities_are_judged_by_the_far_end(mean: float, reason: str) -> None:
    values = mean + 0.001 * math.sqrt(30) * SPREAD
    verdict = judged(changes([*values]))
    assert verdict.promote == (reason == "")
    assert reason in verdict.reason


def test_the_anchor_needs_more_evidence_night_after_night() -> None:
    """Promoted on the first night, the same figures do not suffice after many looks."""
    values = -0.002 + 0.001 * math.sqrt(30) * SPREAD
    own = changes([*values])
    own = [
        change.model_copy(update={"since_anchor": {"l1": value + 0.008, "psnr": 1.0}})
        for change, value in zip(own, values, strict=True)
    ]
    assert judged(own, night=1).promote
    late = judged(own, night=90)
    assert not late.promote
    assert "than the anchor's" in late.reason
    assert late.night == 90


def test_a_refusal_says_what_would_have_to_change() -> None:
    values = -0.001 + 0.001 * math.sqrt(30) * SPREAD
    (failed,) = [c for c in judged(changes([*values])).checks if not c.passed]
    assert "it would pass on the same 30 identities if it were better by 0.0017 or more" in (
        failed.way_out
    )
    number = int(failed.way_out.split(" on ")[-1].split()[0])
    for count, passes in ((number, True), (number - 2, False)):
        spread = np.resize(SPREAD, count)
        spread = (spread - spread.mean()) / spread.std(ddof=1)
        again = changes([*(-0.001 + 0.001 * math.sqrt(30) * spread)])
        assert judged(again).promote == passes


def test_a_loss_that_more_data_cannot_excuse_is_not_promised_a_way_out() -> None:
    values = 0.02 + 0.001 * SPREAD
    for check in judged(changes([*values])).checks:
        assert "identities" not in check.way_out.replace("the same 30 identities", "")


def sliced(by: dict[str, list[float]], key: str = "source") -> list[ClipChange]:
    """Clips by the value of a slice; one clip an identity unless the identity is the slice."""
    return [
        change.model_copy(
            update={
                "key": f"{value}{change.key}",
                "identity": value if key == "identity" else f"{value}{change.identity}",
                "slices": {key: value},
            }
        )
        for value, losses in by.items()
        for change in changes(losses)
    ]


WORSE = [*(0.02 + 0.002 * SPREAD[:10])]
GOOD = [*(-0.02 + 0.002 * SPREAD)]


@pytest.mark.parametrize(
    ("key", "by", "refused"),
    [
        ("source", {"web": GOOD, "studio": WORSE}, "studio"),
        ("identity", {"ann": GOOD, "bob": WORSE, **{f"i{n}": GOOD for n in range(8)}}, "bob"),
        ("source", {"web": GOOD, "studio": GOOD[:10]}, ""),
        # Too noisy to be called worse, and too small to be tested.
        ("source", {"web": GOOD, "studio": [0.3, -0.25, 0.05]}, ""),
        ("source", {"web": GOOD, "studio": [0.05]}, ""),
    ],
)
def test_a_slice_that_became_worse_refuses_by_name(
    key: str, by: dict[str, list[float]], refused: str
) -> None:
    gate = Gate(tolerances={"l1": 10.0}, slices={key: {"l1": 0.01}})
    verdict = judge(sliced(by, key), [L1, PSNR], gate, 1)
    failed = [check.text for check in verdict.checks if not check.passed and "slice" in check.text]
    assert [f"L1 on the slice {key}={refused} is worse by 0.0" in text for text in failed] == (
        [True] if refused else []
    )
    summaries = [check.text for check in verdict.checks if "slices is worse" in check.text]
    assert len(summaries) == (not refused)
    if len(by.get("studio", WORSE)) == 1:
        assert "none of 1 slices" in summaries[0]
        assert "1 of one identity or clip cannot be tested" in summaries[0]


def test_slices_of_one_clip_alone_cannot_be_tested() -> None:
    gate = Gate(tolerances={}, slices={"source": {"l1": 0.01}})
    checks = judge(sliced({"web": [0.3]}), [L1, PSNR], gate, 1).checks
    assert "none of 0 slices" in checks[0].text
    assert "1 of one identity or clip cannot be tested" in checks[0].text


def test_the_error_rate_is_shared_by_all_slices() -> None:
    """With 40 unchanged slices, one candidate in twenty is refused, not nearly all."""
    rng = np.random.default_rng(0)
    gate = Gate(tolerances={}, slices={"source": {"l1": 0.0}})
    refusals = 0
    for _ in range(200):
        values = {f"s{n}": [*rng.normal(0, 0.01, 5)] for n in range(40)}
        checks = judge(sliced(values), [L1, PSNR], gate, 1).checks
        refusals += any("the slice" in check.text for check in checks)
    assert refusals / 200 < 0.12


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_metric_that_is_not_finite_is_never_promoted(value: float) -> None:
    for fixed in (changes([value, -0.02]), changes([-0.02, -0.02], [value, 1.0])):
        verdict = judged(fixed, NEW)
        assert not verdict.promote
        assert "not finite" in verdict.reason
        assert "nan" not in verdict.reason
        assert "inf" not in verdict.reason.replace("finite", "")


def test_a_rule_for_an_unmeasured_metric_is_rejected() -> None:
    with pytest.raises(UserError, match=r"gate: akd is not measured; use one of l1, psnr"):
        judge(BETTER, [L1, PSNR], Gate(target="akd"), 1)
    with pytest.raises(UserError, match=r"gate: aed is not measured"):
        judge(BETTER, [L1, PSNR], GATE.model_copy(update={"slices": {"identity": {"aed": 0}}}), 1)
