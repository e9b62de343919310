"""How much worse a candidate is over the identities of a holdout, with an upper bound.

Clips of one identity are not independent, so an identity is the unit: the mean over clips is a
ratio of two sums over identities, and its standard error is that of a ratio estimator (Cochran,
*Sampling Techniques*, 1977, eq. 6.13). Student's t gives the bound. Below :data:`FEW_IDENTITIES`
no test has a useful level; the bound is then the worst identity.
"""

import math
from collections import defaultdict
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
from scipy.optimize import brentq
from scipy.stats import t as student

FEW_IDENTITIES = 8
"""With fewer, error rates are not known: a candidate is judged by its worst identity."""
FIRST_NIGHTS = 30
"""Half of the error rate is spent on as many comparisons."""
_MOST_IDENTITIES = 1_000_000


class Worsening(NamedTuple):
    """The mean over clips of candidate − reference, signed so that positive is worse.

    Attributes:
        value: the mean.
        error: its standard error over identities; 0 with one identity.
        worst: mean of the identity that became worst.
        identities: number of identities.
    """

    value: float
    error: float
    worst: float
    identities: int

    def at_most(self, alpha: float) -> float:
        """Return an upper bound that the true mean exceeds with a probability of ``alpha``.

        With few identities it is the worst identity, whatever ``alpha``.
        """
        if self.identities < FEW_IDENTITIES:
            return self.worst
        return self.value + _quantile(alpha, self.identities) * self.error

    def p_value(self) -> float:
        """Return the p-value of "no worse than the reference", one-sided; 1 with one identity."""
        if self.identities < 2:
            return 1.0
        if self.error == 0:
            return float(self.value <= 0)
        return float(student.sf(self.value / self.error, self.identities - 1))

    def needed_value(self, limit: float, alpha: float) -> float:
        """Return the mean whose bound is exactly ``limit`` with the same spread."""
        return self.value - (self.at_most(alpha) - limit)

    def needed_identities(self, limit: float, alpha: float) -> int | None:
        """Return how many identities of the same mean and spread bring the bound to ``limit``.

        None if no number does, because the mean itself is beyond the limit.
        """
        if self.value >= limit or self.identities < 2:
            return None
        spread = self.error * math.sqrt(self.identities)

        def excess(count: float) -> float:
            return self.value + _quantile(alpha, count) * spread / math.sqrt(count) - limit

        if excess(FEW_IDENTITIES) <= 0:
            return FEW_IDENTITIES
        if excess(_MOST_IDENTITIES) > 0:
            return None
        return math.ceil(float(brentq(excess, FEW_IDENTITIES, _MOST_IDENTITIES)))


def worsening(values: Iterable[float], units: Iterable[str]) -> Worsening | None:
    """Summarise the worsening of clips.

    Args:
        values: one a clip, positive if the candidate is worse.
        units: the identity of each clip, or whatever else is independent.

    Returns:
        NaN if a value is not finite; None without clips.
    """
    by_unit: dict[str, list[float]] = defaultdict(list)
    for value, unit in zip(values, units, strict=True):
        by_unit[unit].append(value)
    if not by_unit:
        return None
    totals = np.array([sum(own) for own in by_unit.values()])
    counts = np.array([len(own) for own in by_unit.values()])
    number = len(totals)
    if not np.isfinite(totals).all():
        return Worsening(math.nan, math.nan, math.nan, number)
    mean = totals.sum() / counts.sum()
    residuals = totals - mean * counts
    error = 0.0
    if number > 1:
        error = math.sqrt(number / (number - 1) * float((residuals**2).sum())) / counts.sum()
    return Worsening(float(mean), float(error), float((totals / counts).max()), number)


def alpha_of_night(alpha: float, night: int) -> float:
    """Return the error rate that may be spent on one comparison with the anchor.

    All comparisons since the anchor was pinned share ``alpha``: over the first n of them
    ``alpha · n / (n + 30)`` is spent, never all of it. Whatever the dependence between nights, the
    probability of any error is at most their sum (Bonferroni's inequality; spending functions are
    due to Lan and DeMets, Biometrika 70, 1983).

    Args:
        alpha: error rate of all nights together.
        night: number of the comparison since the anchor was pinned, from 1.
    """
    before, after = FIRST_NIGHTS + night - 1, FIRST_NIGHTS + night
    return alpha * FIRST_NIGHTS / (before * after)


def _quantile(alpha: float, identities: float) -> float:
    return float(student.isf(alpha, identities - 1))
