"""Decide which checkpoints are kept."""

import math
from collections.abc import Mapping
from typing import NamedTuple


class Retention(NamedTuple):
    """Which checkpoints are kept.

    Attributes:
        newest: number of newest checkpoints that are kept, at least 1.
        best: number of best checkpoints by a metric that are kept; lower is better.
        every: keep those at multiples of this many steps; 0 = none.
    """

    newest: int
    best: int
    every: int


def expendable(scores: Mapping[int, float | None], retention: Retention) -> list[int]:
    """Return the steps whose checkpoints need not be kept.

    Args:
        scores: metric of every checkpoint, by step; None if it is unknown.
        retention: which checkpoints are kept.
    """
    steps = sorted(scores)
    kept = {0, *steps[-retention.newest :]}  # 0: imported weights, not trained here
    if retention.every:
        kept |= {step for step in steps if step % retention.every == 0}
    scored = sorted(
        (score, -step)
        for step, score in scores.items()
        if score is not None and math.isfinite(score)
    )
    kept |= {-step for _, step in scored[: retention.best]}
    return [step for step in steps if step not in kept]
