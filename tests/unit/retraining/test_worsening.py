"""The bounds of the gate have the error rates that they claim."""

import numpy as np
import pytest
from scipy.stats import ttest_1samp

from prioritycut_ray.retraining.worsening import alpha_of_night, worsening


def test_with_one_clip_an_identity_it_is_students_t() -> None:
    values = np.random.default_rng(0).normal(0.3, 1, 20)
    found = worsening(values, [f"i{number}" for number in range(20)])
    assert found is not None
    expected = ttest_1samp(values, 0, alternative="less").confidence_interval(0.95)
    assert found.at_most(0.05) == pytest.approx(expected.high)
    assert found.p_value() == pytest.approx(ttest_1samp(values, 0, alternative="greater").pvalue)


@pytest.mark.parametrize("identities", [8, 30])
def test_the_bound_covers_a_mean_over_clips_of_unequal_identities(identities: int) -> None:
    """Identities have 1 to 5 clips each, which are correlated."""
    rng = np.random.default_rng(identities)
    below = 0
    for _ in range(2000):
        counts = rng.integers(1, 6, identities)
        values = np.repeat(rng.normal(0, 1, identities), counts) + rng.normal(0, 1, counts.sum())
        found = worsening(values, np.repeat(np.arange(identities), counts).astype(str))
        assert found is not None
        below += found.at_most(0.05) < 0
    assert 0.03 < below / 2000 < 0.08


def test_clips_of_one_identity_are_no_independent_evidence() -> None:
    one = worsening([0.1, 0.2] * 4, [f"i{number}" for number in range(8)])
    thrice = worsening([0.1, 0.2] * 12, [f"i{number % 8}" for number in range(24)])
    assert one is not None
    assert thrice is not None
    assert one == pytest.approx(thrice)


def test_the_error_rate_is_never_spent() -> None:
    nights = [alpha_of_night(0.05, night) for night in range(1, 10_000)]
    assert sum(nights[:30]) == pytest.approx(0.025)
    assert 0.049 < sum(nights) < 0.05
    assert nights == sorted(nights, reverse=True)


def test_without_clips_there_is_nothing_to_say() -> None:
    assert worsening([], []) is None
