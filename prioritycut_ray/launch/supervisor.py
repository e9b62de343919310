"""The part of a run in Ray Train's controller: diagnoses failures and decides about retries."""

import time
from typing import Any

from ray.exceptions import RayActorError
from ray.train import Checkpoint, UserCallback

from prioritycut_ray.config import Config
from prioritycut_ray.launch.failures import RunEnded, diagnose, inspect_rank
from prioritycut_ray.launch.heartbeat import (
    HEARTBEAT_SECONDS,
    SILENT_AFTER_S,
    HeartbeatMonitor,
    ReceivedHeartbeat,
    started_from,
)
from prioritycut_ray.launch.retry import FailureDecision, FailurePolicy
from prioritycut_ray.ray_cluster.compat import health_check_cause
from prioritycut_ray.training.worker import SAVED, SAVING

RESCUE_BEGINS_S = 6.0
"""By then a surviving rank has noticed the loss of another one, if it can, and begun to save."""
LONGEST_RESCUE_S = 120.0
"""Survivors that have not saved by then are ended."""


class Supervisor(UserCallback):  # type: ignore[misc]  # ray is untyped
    """Forwards metrics to the driver and decides which failures end the run."""

    def __init__(self, monitor: HeartbeatMonitor, config: Config) -> None:
        self._monitor = monitor
        self._policy = FailurePolicy(config.train.max_failures)
        self._timeout_s = float(config.train.collective_timeout_s)
        self._received: dict[int, ReceivedHeartbeat] = {}

    def after_report(
        self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Checkpoint | None
    ) -> None:
        """Called by Ray when all workers have reported."""
        self._monitor.send_message(metrics[0])
        # Kept here too: when memory is short, Ray may kill the monitor before the worker.
        self._received |= self._monitor.heartbeats()

    def _await_rescue(self, worker_exceptions: dict[int, Exception]) -> None:
        """Let a rank that has lost another one save: Ray ends all ranks after this callback."""
        causes = map(health_check_cause, worker_exceptions.values())
        if not any(isinstance(cause, RayActorError) for cause in causes):
            return  # All processes are alive, so no rank has noticed a loss.
        begin = time.monotonic()
        while (waited := time.monotonic() - begin) < LONGEST_RESCUE_S:
            alive = {
                rank: received.heartbeat.phase
                for rank, received in self._monitor.heartbeats().items()
                if rank not in worker_exceptions and received.age_s < SILENT_AFTER_S
            }
            if not alive or SAVED in alive.values():
                return
            if SAVING not in alive.values() and waited > RESCUE_BEGINS_S:
                return
            time.sleep(HEARTBEAT_SECONDS / 2)

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        """Called by Ray when workers have failed; it starts others unless this raises.

        Raises:
            RunEnded: the failure is not retried.
        """
        self._await_rescue(worker_exceptions)
        received = self._received | self._monitor.heartbeats()
        self._received = {}
        failure = diagnose(worker_exceptions, received, self._timeout_s, inspect_rank)
        decision = self._policy.make_decision(failure, started_from(received))
        if decision is FailureDecision.RAISE or self._monitor.stop_requested():
            raise RunEnded(failure)
        self._monitor.send_message(f"{failure}; restarting from the last checkpoint")
        self._monitor.forget_heartbeats()
