"""Which failures are tried again, and how often."""

import re
from dataclasses import dataclass

from prioritycut_ray.errors import ExitCode
from prioritycut_ray.launch.failures import RETRIED, Failure


@dataclass
class RetryPolicy:
    """Decides whether another group of workers is started after a failure.

    Attributes:
        max_failures: groups in a row that may fail without a newer checkpoint to start from.
    """

    max_failures: int
    _in_a_row: int = 0
    _last_start: int = -1
    _last: Failure | None = None

    def ends(self, failure: Failure, started_from: int) -> bool:
        """Whether the run ends with this failure.

        Args:
            failure: the newest.
            started_from: the step that the failed group began at.
        """
        again = self._last is not None and _same(failure, self._last)
        self._last = failure
        if failure.kind is ExitCode.PREEMPTED:
            return False
        if started_from > self._last_start:
            self._in_a_row, self._last_start = 0, started_from
        self._in_a_row += 1
        return failure.kind not in RETRIED or again or self._in_a_row > self.max_failures


def _same(failure: Failure, other: Failure) -> bool:
    """The same error at the same step: it lies in what is computed, not in the surroundings."""
    deterministic = (
        failure.kind in (ExitCode.WORKER_ERROR, ExitCode.OUT_OF_MEMORY) or "crash" in failure.reason
    )
    return (
        deterministic
        and (failure.kind, failure.step) == (other.kind, other.step)
        and re.sub(r"\d+", "", failure.reason) == re.sub(r"\d+", "", other.reason)
    )
