"""Statistics of paired differences: the same seeds and the same identities in both rows.

A table of differences has a row for each seed and a column for each identity, ``[S, N]``. Seeds and
identities are both samples of what a claim is about, so the bootstrap resamples both, independently
(the pigeonhole bootstrap; Owen, "The pigeonhole bootstrap", Annals of Applied Statistics, 2007).
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.stats import t

CONFIDENCE = 0.95
RESAMPLES = 10_000

Differences = NDArray[np.float64]
"""``[S, N]``: negative where the first row has the lower error."""


class Effect(NamedTuple):
    """What a table of differences says.

    Attributes:
        mean: over seeds and identities.
        low: lower end of the 95 % interval of the mean, over seeds and identities.
        high: upper end.
        p: two-sided p value of the same bootstrap; NaN with one seed.
        improved: probability of improvement, the share of pairs with a negative difference; equal
            pairs count half.
        improved_low: lower end of its interval.
        improved_high: upper end.
        seeds: number of seeds; with one, only identities are resampled.
        identities: number of identities.
    """

    mean: float
    low: float
    high: float
    p: float
    improved: float
    improved_low: float
    improved_high: float
    seeds: int
    identities: int

    @property
    def half_width(self) -> float:
        """Half the width of the interval of the mean."""
        return (self.high - self.low) / 2


def effect(differences: Differences, resamples: int = RESAMPLES) -> Effect:
    """Summarise a table of differences; the same table gives the same numbers.

    Raises:
        ValueError: the table is empty, or a difference is not finite.
    """
    if differences.size == 0 or not np.isfinite(differences).all():
        raise ValueError("differences must be finite, and there must be at least one")
    seeds, identities = differences.shape
    better = np.where(differences < 0, 1.0, np.where(differences == 0, 0.5, 0.0))
    weights = _weights(seeds, identities, resamples)
    means, shares = (_resampled(table, *weights) for table in (differences, better))
    low, high = _ends(means)
    improved_low, improved_high = _ends(shares)
    return Effect(
        mean=float(differences.mean()),
        low=low,
        high=high,
        p=_p_value(means) if seeds > 1 else math.nan,
        improved=float(better.mean()),
        improved_low=improved_low,
        improved_high=improved_high,
        seeds=seeds,
        identities=identities,
    )


def _weights(seeds: int, identities: int, resamples: int) -> tuple[Differences, Differences]:
    """Return how often each seed and each identity is drawn, as shares: ``[R, S]``, ``[R, N]``."""
    rng = np.random.default_rng(0)
    by_seed = rng.multinomial(seeds, np.full(seeds, 1 / seeds), size=resamples) / seeds
    by_identity = rng.multinomial(identities, np.full(identities, 1 / identities), size=resamples)
    return by_seed, by_identity / identities


def _resampled(table: Differences, seeds: Differences, identities: Differences) -> Differences:
    means: Differences = np.einsum("rs,rs->r", seeds, identities @ table.T)
    return means


def _ends(values: Differences) -> tuple[float, float]:
    low, high = np.quantile(values, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return float(low), float(high)


def _p_value(means: Differences) -> float:
    """Twice the smaller share of resamples on either side of zero; never 0."""
    fewer = min(int((means <= 0).sum()), int((means >= 0).sum()))
    return min(1.0, 2 * (fewer + 1) / (len(means) + 1))


def holm(p_values: Sequence[float]) -> list[float]:
    """Correct p values for their number (Holm, 1979): the chance of any false claim stays p."""
    order = np.argsort(p_values)
    factors = len(p_values) - np.arange(len(p_values))
    corrected = np.minimum(1, np.maximum.accumulate(factors * np.asarray(p_values)[order]))
    return [float(p) for p in corrected[np.argsort(order)]]


def seeds_for(half_width: float, deviation: float) -> int:
    """Return how many seeds a 95 % interval of Student's t over seeds takes for a half-width.

    Args:
        half_width: the goal, in the unit of ``deviation``.
        deviation: standard deviation over seeds of the paired difference.
    """
    needed = (
        n
        for n in range(2, 10_000)
        if t.ppf((1 + CONFIDENCE) / 2, n - 1) * deviation <= half_width * math.sqrt(n)
    )
    return next(needed, 10_000)
