"""Which checkpoints are kept."""

import math

from hypothesis import given
from hypothesis import strategies as st

from prioritycut_ray.runs.retention import Retention, expendable


@given(
    scores=st.dictionaries(st.integers(1, 500), st.none() | st.floats(), min_size=1, max_size=40),
    newest=st.integers(1, 5),
    best=st.integers(0, 5),
    every=st.integers(0, 50),
)
def test_the_newest_the_best_and_every_nth_are_kept(
    scores: dict[int, float | None], newest: int, best: int, every: int
) -> None:
    retention = Retention(newest, best, every)
    removed = set(expendable(scores, retention))
    kept = scores.keys() - removed
    steps = sorted(scores)
    assert kept >= set(steps[-newest:]), "the last one always"
    assert not every or all(step in kept for step in steps if step % every == 0)
    ranked = sorted((s, -i) for i, s in scores.items() if s is not None and math.isfinite(s))
    assert kept >= {-step for _, step in ranked[:best]}
    assert len(kept) <= newest + best + (len(steps) if every else 0)
    after = {step: scores[step] for step in kept}
    assert expendable(after, retention) == [], "removing once is enough"


def test_imported_weights_are_not_removed() -> None:
    assert expendable({0: None, 1: None, 2: None}, Retention(1, 0, 0)) == [1]
