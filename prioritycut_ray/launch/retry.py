"""Which failures are retried, and how often."""

import re
from dataclasses import dataclass
from enum import Enum, auto

from prioritycut_ray.errors import ExitCode
from prioritycut_ray.launch.failures import Failure

RETRIED = (
    ExitCode.GPU_FAULT,
    ExitCode.LOST_NODE,
    ExitCode.WORKER_ERROR,
    ExitCode.OUT_OF_MEMORY,
    ExitCode.WORKER_KILLED,
)
"""Kinds that may not happen again in another attempt."""


class FailureDecision(Enum):
    """What follows a failure, in the words of Ray Train."""

    RETRY = auto()
    RAISE = auto()


@dataclass
class FailurePolicy:
    """Decides whether another group of workers is started after a failure.

    Attributes:
        max_failures: groups in a row that may fail without a newer checkpoint to start from.
    """

    max_failures: int
    _in_a_row: int = 0
    _last_start: int = -1
    _last: Failure | None = None

    def make_decision(self, failure: Failure, started_from: int) -> FailureDecision:
        """Decide about the newest failure.

        Args:
            failure: what ended the group of workers.
            started_from: the step that this group started from.
        """
        again = self._last is not None and _same(failure, self._last)
        self._last = failure
        if failure.kind is ExitCode.PREEMPTED:
            return FailureDecision.RETRY
        if started_from > self._last_start:
            self._in_a_row, self._last_start = 0, started_from
        self._in_a_row += 1
        if failure.kind not in RETRIED or again or self._in_a_row > self.max_failures:
            return FailureDecision.RAISE
        return FailureDecision.RETRY


def _same(failure: Failure, other: Failure) -> bool:
    """Return whether a deterministic error occurred again at the same step."""
    deterministic = (
        failure.kind in (ExitCode.WORKER_ERROR, ExitCode.OUT_OF_MEMORY) or "crash" in failure.reason
    )
    return (
        deterministic
        and (failure.kind, failure.step) == (other.kind, other.step)
        and re.sub(r"\d+", "", failure.reason) == re.sub(r"\d+", "", other.reason)
    )
