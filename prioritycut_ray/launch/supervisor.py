"""In Ray's controller: what failed, and whether it is tried again."""

from typing import Any

from ray.train import (
    Checkpoint,
    UserCallback,
)

from prioritycut_ray.config import Config
from prioritycut_ray.launch.failures import (
    RunEnded,
    diagnose,
    inspect_rank,
)
from prioritycut_ray.launch.heartbeat import (
    ReceivedHeartbeat,
    ask,
    started_from,
)
from prioritycut_ray.launch.retry import RetryPolicy


class Supervisor(UserCallback):  # type: ignore[misc]  # ray is untyped
    """In Ray's controller process: passes metrics on, and decides which failures end the run."""

    def __init__(self, monitor: Any, config: Config) -> None:
        self._monitor = monitor
        self._policy = RetryPolicy(config.train.max_failures)
        self._timeout_s = float(config.train.collective_timeout_s)
        self._heard: dict[int, ReceivedHeartbeat] = {}

    def after_report(
        self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Checkpoint | None
    ) -> None:
        """Called by Ray when all workers have reported."""
        self._monitor.tell.remote(metrics[0])
        # Kept here too: where memory is short, Ray may kill the monitor before the worker.
        self._heard |= ask(self._monitor.heard.remote(), {})

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        """Called by Ray when workers have failed.

        Raises:
            RunEnded: the run ends with this; otherwise Ray starts other workers.
        """
        heard = self._heard | ask(self._monitor.heard.remote(), {})
        self._heard = {}
        failure = diagnose(worker_exceptions, heard, self._timeout_s, inspect_rank)
        ends = self._policy.ends(failure, started_from(h.beat for h in heard.values()))
        if ends or ask(self._monitor.stops.remote(), default=False):
            raise RunEnded(failure)
        self._monitor.tell.remote(f"{failure}; starting again from the last checkpoint")
        self._monitor.forget.remote()
