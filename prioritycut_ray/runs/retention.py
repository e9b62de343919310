"""Which checkpoints are kept."""

import math
from collections.abc import Mapping
from typing import NamedTuple


class Retention(NamedTuple):
    """Which checkpoints are kept.

    Attributes:
        newest: so many of the newest, at least 1.
        best: so many of the best by a metric, lower being better.
        every: those at multiples of so many steps; 0 = none.
    """

    newest: int
    best: int
    every: int


def expendable(scores: Mapping[int, float | None], retention: Retention) -> list[int]:
    """Steps whose checkpoints need not be kept.

    Args:
        scores: the metric of every checkpoint, by step; None where it is unknown.
        retention: which are kept.
    """
    steps = sorted(scores)
    kept = {0, *steps[-retention.newest :]}  # 0: weights that were imported, not trained here
    if retention.every:
        kept |= {step for step in steps if step % retention.every == 0}
    scored = sorted(
        (score, -step)
        for step, score in scores.items()
        if score is not None and math.isfinite(score)
    )
    kept |= {-step for _, step in scored[: retention.best]}
    return [step for step in steps if step not in kept]
