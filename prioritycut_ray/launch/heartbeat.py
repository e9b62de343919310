"""Heartbeats of the workers and messages to the driver, through one small actor.

Every rank reports twice a second what it is doing and learns in reply whether to stop. Warnings
and metrics reach the driver as messages. The actor is restarted if it dies: the ranks report again
with their next heartbeats, messages are sent again, and nobody waits for it.
"""

import faulthandler
import os
import threading
import time
import uuid
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from prioritycut_ray.errors import ExitCode
from prioritycut_ray.launch.crash_evidence import crash_file, oom_kills
from prioritycut_ray.ray_cluster.compat import draining_nodes
from prioritycut_ray.training.worker import WorkerStatus

HEARTBEAT_SECONDS = 0.5
SILENT_AFTER_S = 10.0
"""A rank without a heartbeat for this long is frozen, dead or cut off."""
_ANSWER_SECONDS = 10.0

Message = str | Mapping[str, float]
"""A warning, or the metrics of a report."""


class Heartbeat(NamedTuple):
    """What a rank reports.

    Attributes:
        rank: from 0.
        node_id: Ray's id of the node, in hex.
        address: of the node.
        pid: of the worker process.
        placement_group: Ray's id of the placement group that the rank runs in, in hex.
        started_from: step that this process started from; 0 until the first step.
        step: optimizer steps taken.
        phase: one of :data:`~prioritycut_ray.training.worker.PHASES`.
        phase_seconds: time since the phase began.
        oom_kills: see :class:`~prioritycut_ray.launch.crash_evidence.CrashEvidence`.
    """

    rank: int
    node_id: str
    address: str
    pid: int
    placement_group: str
    started_from: int
    step: int
    phase: str
    phase_seconds: float
    oom_kills: int


class ReceivedHeartbeat(NamedTuple):
    """A heartbeat, and the seconds since it arrived."""

    heartbeat: Heartbeat
    age_s: float


class _MonitorActor:
    """The actor; every method returns at once."""

    def __init__(self) -> None:
        self._messages: dict[str, Message] = {}
        self._heartbeats: dict[int, tuple[Heartbeat, float]] = {}
        self._stop = False
        self._draining: set[str] = set()
        self._updated_at = 0.0

    def send_message(self, name: str, message: Message) -> None:
        self._messages[name] = message

    def messages(self, taken: Collection[str]) -> dict[str, Message]:
        for name in taken:
            self._messages.pop(name, None)
        return self._messages

    def report(self, heartbeat: Heartbeat) -> bool:
        now = time.monotonic()
        self._heartbeats[heartbeat.rank] = (heartbeat, now)
        if now - self._updated_at > HEARTBEAT_SECONDS:
            self._draining, self._updated_at = draining_nodes(), now
        return self._stop or heartbeat.node_id in self._draining

    def heartbeats(self) -> dict[int, ReceivedHeartbeat]:
        now = time.monotonic()
        return {
            rank: ReceivedHeartbeat(heartbeat, now - received)
            for rank, (heartbeat, received) in self._heartbeats.items()
        }

    def forget_heartbeats(self) -> None:
        self._heartbeats = {}

    def request_stop(self) -> None:
        self._stop = True

    def stop_requested(self) -> bool:
        return self._stop


class HeartbeatMonitor:
    """Client of the monitor actor; driver, controller and workers each hold a copy.

    While the actor is being restarted, it answers as if nothing had been reported.

    Args:
        actor: handle of the actor.
    """

    def __init__(self, actor: Any) -> None:
        self._actor = actor
        self._taken: set[str] = set()

    def send_message(self, message: Message) -> None:
        """Leave a message for the driver."""
        # Sent again once an actor that died has been restarted.
        send = self._actor.send_message.options(max_task_retries=-1)
        send.remote(uuid.uuid4().hex, message)

    def take_messages(self) -> list[Message]:
        """Return the messages since the last call.

        The actor keeps them until the next call confirms them: an answer may be lost.
        """
        messages: dict[str, Message] | None = _answer(
            self._actor.messages.remote(self._taken), None
        )
        if messages is None:
            return []
        new = [message for name, message in messages.items() if name not in self._taken]
        self._taken = set(messages)
        return new

    def report(self, heartbeat: Heartbeat) -> bool:
        """Report what a rank is doing; returns whether it should stop."""
        return bool(_answer(self._actor.report.remote(heartbeat), default=False))

    def heartbeats(self) -> dict[int, ReceivedHeartbeat]:
        """Return the last heartbeat of every rank since the workers started."""
        heartbeats: dict[int, ReceivedHeartbeat] = _answer(self._actor.heartbeats.remote(), {})
        return heartbeats

    def has_no_workers(self) -> bool:
        """Return whether no rank has reported since :meth:`forget_heartbeats`."""
        return bool(_answer(self._actor.heartbeats.remote(), None) == {})

    def forget_heartbeats(self) -> None:
        """Forget all ranks: the next group of workers may be smaller."""
        self._actor.forget_heartbeats.remote()

    def request_stop(self) -> None:
        """Ask all ranks to save and stop."""
        self._actor.request_stop.remote()

    def stop_requested(self) -> bool:
        """Return whether all ranks were asked to save and stop."""
        return bool(_answer(self._actor.stop_requested.remote(), default=False))


def _answer(reference: Any, default: Any) -> Any:
    """Wait for an answer of the actor; returns the default while it is being restarted."""
    try:
        return ray.get(reference, timeout=_ANSWER_SECONDS)
    except RayError:
        return default


def start_monitor() -> HeartbeatMonitor:
    """Start the actor on the driver's node; it ends with the driver."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
    actor = ray.remote(num_cpus=0, max_restarts=-1)(_MonitorActor)
    return HeartbeatMonitor(actor.options(scheduling_strategy=here).remote())


class HeartbeatThread:
    """Sends the heartbeats of a rank while the body runs; a context manager.

    Args:
        monitor: receives them.
        status: of the training thread; its ``stop`` is set when the rank should stop.
        rank: from 0.
        timeout_s: ends this process when the training thread stays in one phase for longer.
    """

    def __init__(
        self, monitor: HeartbeatMonitor, status: WorkerStatus, rank: int, timeout_s: float
    ) -> None:
        context = ray.get_runtime_context()
        self._monitor, self._status, self._rank = monitor, status, rank
        self._node_id, self._address = context.get_node_id(), ray.util.get_node_ip_address()
        self._placement_group = ray.util.get_current_placement_group().id.hex()
        self._timeout_s = timeout_s
        self._finished = threading.Event()
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)

    def __enter__(self) -> "HeartbeatThread":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._finished.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._finished.wait(HEARTBEAT_SECONDS):
            heartbeat = self._heartbeat()
            if self._monitor.report(heartbeat) or terminated.is_set():
                self._status.stop = True
            if heartbeat.phase_seconds > self._timeout_s:
                faulthandler.dump_traceback(crash_file(os.getpid()).open("a"))
                os._exit(ExitCode.HANG)

    def _heartbeat(self) -> Heartbeat:
        status = self._status
        return Heartbeat(
            self._rank,
            self._node_id,
            self._address,
            os.getpid(),
            self._placement_group,
            status.started_from,
            status.step,
            status.phase,
            time.monotonic() - status.since,
            oom_kills(),
        )


terminated = threading.Event()
"""Set in a worker process that got SIGTERM: it is about to be removed."""


def furthest_step(received: Mapping[int, ReceivedHeartbeat]) -> int:
    """Return the last step that any rank has reached."""
    return max((r.heartbeat.step for r in received.values()), default=0)


def started_from(received: Mapping[int, ReceivedHeartbeat]) -> int:
    """Return the step that the ranks started from."""
    return max((r.heartbeat.started_from for r in received.values()), default=0)
