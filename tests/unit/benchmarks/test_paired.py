"""benchmarks/paired.py: intervals over seeds and identities, with known answers."""

import importlib
import math
from typing import Any

import numpy as np
import pytest
from scipy.stats import false_discovery_control, ttest_1samp

from tests.places import ROOT


@pytest.fixture
def paired(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("paired")


def table(
    effect: float, seeds: int, identities: int, *, by_seed: float, by_identity: float, rest: float
) -> Any:
    """Differences with an effect and known deviations over seeds, identities and both."""
    rng = np.random.default_rng([seeds, identities])
    parts = rng.normal(size=(seeds, 1)), rng.normal(size=(1, identities))
    noise = rng.normal(size=(seeds, identities))
    return effect + by_seed * parts[0] + by_identity * parts[1] + rest * noise


def test_a_constant_difference_is_known_exactly(paired: Any) -> None:
    found = paired.effect(np.full((5, 7), -0.25))
    assert found[:3] == pytest.approx((-0.25, -0.25, -0.25))
    assert (found.improved, found.improved_low, found.improved_high) == pytest.approx((1, 1, 1))
    assert found.p == pytest.approx(2 / (paired.RESAMPLES + 1))
    assert (found.seeds, found.identities, found.half_width) == (5, 7, pytest.approx(0))


def test_no_difference_is_no_improvement(paired: Any) -> None:
    found = paired.effect(np.zeros((4, 6)))
    assert (found.mean, found.low, found.high, found.p) == (0, 0, 0, 1)
    assert found.improved == 0.5


def test_with_many_identities_the_interval_is_that_of_the_seeds(paired: Any) -> None:
    many = table(-0.3, 30, 200, by_seed=1, by_identity=0, rest=0.1)
    found = paired.effect(many)
    over_seeds = ttest_1samp(many.mean(1), 0)
    wanted = over_seeds.confidence_interval()
    assert found.half_width == pytest.approx((wanted.high - wanted.low) / 2, rel=0.1)
    assert found.p == pytest.approx(over_seeds.pvalue, rel=0.3)


def test_identities_that_differ_widen_the_interval(paired: Any) -> None:
    """An interval over seeds alone would say that 8 identities stand for all others."""
    few = table(0, 200, 8, by_seed=0.1, by_identity=1, rest=0)
    found = paired.effect(few)
    over_seeds = ttest_1samp(few.mean(1), 0).confidence_interval()
    assert found.half_width > 10 * (over_seeds.high - over_seeds.low)
    assert found.half_width == pytest.approx(1.96 * few.mean(0).std() / math.sqrt(8), rel=0.15)


def test_the_interval_holds_the_truth_about_as_often_as_it_says(paired: Any) -> None:
    rng = np.random.default_rng(0)
    tables = (
        0.2 + rng.normal(size=(17, 1)) + rng.normal(size=(1, 50)) + rng.normal(size=(17, 50))
        for _ in range(100)
    )
    found = [paired.effect(each, resamples=400) for each in tables]
    assert 0.9 <= np.mean([each.low <= 0.2 <= each.high for each in found]) <= 0.99


def test_one_seed_has_an_interval_over_identities_and_no_p_value(paired: Any) -> None:
    found = paired.effect(np.random.default_rng(0).normal(size=(1, 40)))
    assert found.low < found.mean < found.high
    assert math.isnan(found.p)


@pytest.mark.parametrize("wrong", [np.zeros((0, 5)), np.array([[0.0, math.nan]])])
def test_a_difference_that_is_not_finite_is_an_error(paired: Any, wrong: Any) -> None:
    with pytest.raises(ValueError, match="finite"):
        paired.effect(wrong)


def test_holm_is_the_published_procedure(paired: Any) -> None:
    p_values = [0.01, 0.04, 0.03, 0.005]
    assert paired.holm(p_values) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    # Between no correction at all and the stricter Bonferroni; above the false discovery rate.
    for p, corrected, rate in zip(
        p_values, paired.holm(p_values), false_discovery_control(p_values), strict=True
    ):
        assert max(p, rate) <= corrected <= min(1, len(p_values) * p)
    assert paired.holm([0.9, 0.8]) == [1, 1]


def test_the_number_of_seeds_for_a_half_width(paired: Any) -> None:
    needed = paired.seeds_for(0.015, 0.03)
    rng = np.random.default_rng(0)
    for seeds, small_enough in ((needed - 1, False), (needed, True)):
        sample = rng.normal(size=seeds)
        sample = (sample - sample.mean()) / sample.std(ddof=1) * 0.03
        ends = ttest_1samp(sample, 0).confidence_interval()
        assert ((ends.high - ends.low) / 2 <= 0.015) == small_enough
