"""Frame scores to means over a clip, over clips and over frames, with bootstrap intervals.

Every metric is a function of the ratio of two sums over frames (:class:`Tally`). A frame on which a
metric is not defined (no face was found) counts in neither sum; each mean comes with the number of
frames that count.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict
from scipy.stats import bootstrap
from torch import Tensor

HIGHEST_PSNR = 100.0
"""In dB; replaces the infinite value of identical images, so that means stay finite."""
CONFIDENCE = 0.95
RESAMPLES = 2000


class Metric(BaseModel):
    """Name and meaning of a metric.

    Attributes:
        key: name in files.
        label: name in tables.
        definition: how it is computed, and by which software, in one line.
        decimals: number of decimals to show.
        higher_is_better: the direction of improvement.
    """

    model_config = ConfigDict(frozen=True)

    key: str
    label: str
    definition: str
    decimals: int
    higher_is_better: bool = False


class Tally(NamedTuple):
    """The contribution of each frame to the two sums of a metric, float64 `[T]`."""

    numerator: NDArray[np.float64]
    denominator: NDArray[np.float64]

    def sums(self) -> tuple[float, float]:
        """Return both sums over the frames."""
        return float(self.numerator.sum()), float(self.denominator.sum())

    def frames(self) -> int:
        """Return the number of frames that count."""
        return int(np.count_nonzero(self.denominator))


FrameScores = dict[str, Tally]
"""Tallies by metric key."""


class Estimate(BaseModel):
    """A mean and its interval.

    Attributes:
        value: the mean; None if no frame counts. It is not finite if a prediction is not; JSON
            then contains the text ``NaN`` or ``Infinity``.
        low: lower end of the 95 % interval; None with fewer than two identities, or if the mean is
            not finite.
        high: upper end.
        clips: number of clips that count.
        frames: number of frames that count.
        identities: number of identities that are resampled.
    """

    model_config = ConfigDict(frozen=True, ser_json_inf_nan="strings")

    value: float | None
    low: float | None
    high: float | None
    clips: int
    frames: int
    identities: int


def every_frame(values: Float[Tensor, " T"]) -> Tally:
    """Tally a metric that is defined on every frame."""
    numerator = values.detach().cpu().double().numpy()
    return Tally(numerator, np.ones_like(numerator))


def concatenate(parts: Sequence[FrameScores]) -> FrameScores:
    """Concatenate the frames of several batches."""
    return {
        key: Tally(
            np.concatenate([part[key].numerator for part in parts]),
            np.concatenate([part[key].denominator for part in parts]),
        )
        for key in parts[0]
    }


def mask_not_finite(scores: FrameScores, finite: NDArray[np.bool_]) -> FrameScores:
    """Set every metric of a frame whose prediction is not finite to NaN.

    Some metrics clamp or quantise their input, and would score such a frame like any other.

    Args:
        scores: of a model.
        finite: whether the prediction of each frame is finite, `[T]`.
    """
    return {
        key: Tally(
            np.where(finite, tally.numerator, np.nan),
            np.where(finite, tally.denominator, np.maximum(tally.denominator, 1)),
        )
        for key, tally in scores.items()
    }


def value_of(key: str, tally: Tally) -> float | None:
    """Return a metric over the frames of a tally; None if it is defined on none of them."""
    numerator, denominator = tally.sums()
    if denominator == 0:
        return None
    return float(_finish(key, np.float64(numerator / denominator)))


def mean_over_clips(key: str, tallies: Sequence[Tally], identities: Sequence[str]) -> Estimate:
    """Return the mean of the clips' values: short and long clips have the same weight."""
    return _estimate_over_clips(key, [(tally,) for tally in tallies], identities)


def mean_over_frames(key: str, tallies: Sequence[Tally], identities: Sequence[str]) -> Estimate:
    """Return the metric over all frames together, as First Order Motion reports it."""
    return _estimate_over_frames(key, [(tally,) for tally in tallies], identities)


def difference_over_clips(
    key: str, pairs: Sequence[tuple[Tally, Tally]], identities: Sequence[str]
) -> Estimate:
    """Return the mean over clips of first − second, on the frames that count in both."""
    return _estimate_over_clips(key, [_in_both(*pair) for pair in pairs], identities)


def difference_of_clip(key: str, first: Tally, second: Tally) -> float | None:
    """Return first − second of one clip, on the frames that count in both; None without any."""
    return _value_of_group(key, _in_both(first, second))


def difference_over_frames(
    key: str, pairs: Sequence[tuple[Tally, Tally]], identities: Sequence[str]
) -> Estimate:
    """Return first − second over all frames together that count in both."""
    return _estimate_over_frames(key, [_in_both(*pair) for pair in pairs], identities)


def _in_both(first: Tally, second: Tally) -> tuple[Tally, Tally]:
    both = (first.denominator > 0) & (second.denominator > 0)
    return Tally(*(a[both] for a in first)), Tally(*(a[both] for a in second))


Group = tuple[Tally, ...]
"""The tally of a clip for one model, or for two models that are compared."""


def _value_of_group(key: str, group: Group) -> float | None:
    """Return the value of a clip for one model, or first − second of two models."""
    values = [value_of(key, tally) for tally in group]
    if values[0] is None:
        return None
    return values[0] if len(values) == 1 else values[0] - (values[1] or 0.0)


def _estimate_over_clips(key: str, groups: Sequence[Group], identities: Sequence[str]) -> Estimate:
    """Average the values of the clips."""
    sums: dict[str, list[float]] = {}
    frames = 0
    for group, identity in zip(groups, identities, strict=True):
        value = _value_of_group(key, group)
        if value is None:
            continue
        total = sums.setdefault(identity, [0.0, 0.0])
        total[0] += value
        total[1] += 1
        frames += group[0].frames()

    def statistic(total: Any, count: Any, axis: int = -1) -> Any:
        return total.sum(axis) / count.sum(axis)

    return _bootstrapped(statistic, sums, _number_of_clips(groups), frames)


def _estimate_over_frames(key: str, groups: Sequence[Group], identities: Sequence[str]) -> Estimate:
    """Sum over all frames, then divide and finish."""
    sums: dict[str, list[float]] = {}
    frames = 0
    for group, identity in zip(groups, identities, strict=True):
        parts = [part for tally in group for part in tally.sums()]
        if parts[1] == 0:
            continue
        total = sums.setdefault(identity, [0.0] * len(parts))
        total[:] = [a + b for a, b in zip(total, parts, strict=True)]
        frames += group[0].frames()

    def statistic(*totals: Any, axis: int = -1) -> Any:
        ratios = [
            _finish(key, totals[i].sum(axis) / totals[i + 1].sum(axis))
            for i in range(0, len(totals), 2)
        ]
        return ratios[0] if len(ratios) == 1 else ratios[0] - ratios[1]

    return _bootstrapped(statistic, sums, _number_of_clips(groups), frames)


def _number_of_clips(groups: Sequence[Group]) -> int:
    return sum(group[0].sums()[1] > 0 for group in groups)


def _bootstrapped(
    statistic: Any, sums: Mapping[str, Sequence[float]], clips: int, frames: int
) -> Estimate:
    """Resample identities with all their clips: clips of one person are not independent."""
    counts = {"clips": clips, "frames": frames, "identities": len(sums)}
    if not sums:
        return Estimate(value=None, low=None, high=None, **counts)
    data = tuple(np.array(column) for column in zip(*sums.values(), strict=True))
    value = float(statistic(*data))
    if len(sums) < 2 or not math.isfinite(value):
        return Estimate(value=value, low=None, high=None, **counts)
    interval = bootstrap(
        data,
        statistic,
        n_resamples=RESAMPLES,
        vectorized=True,
        paired=True,
        confidence_level=CONFIDENCE,
        method="percentile",
        rng=np.random.default_rng(0),
    ).confidence_interval
    return Estimate(value=value, low=float(interval.low), high=float(interval.high), **counts)


def _finish(key: str, ratio: Any) -> Any:
    """Convert the mean squared error to PSNR (dB, for values in [0, 1]); keep other ratios."""
    if key != "psnr":
        return ratio
    return -10 * np.log10(np.maximum(ratio, 10 ** (-HIGHEST_PSNR / 10)))


def is_better(metric: Metric, difference: Estimate) -> bool | None:
    """Return whether first − second is an improvement; None if the interval contains zero.

    A difference that is not finite is never an improvement.
    """
    low, high = difference.low, difference.high
    if low is None or high is None or not math.isfinite(low) or not math.isfinite(high):
        return None
    if low <= 0 <= high:
        return None
    return (low > 0) == metric.higher_is_better
