"""What driver, controller and workers of a run tell each other, through one small actor.

Workers beat: they say what they are doing, and hear in answer whether to stop. Whatever they have
to say reaches the driver as a message. The actor is restarted if it dies: what it had heard comes
again with the next beat, and nobody waits for it.
"""

import faulthandler
import os
import threading
import time
from collections.abc import Iterable
from typing import Any, NamedTuple

import ray
import ray.train.torch
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from prioritycut_ray.errors import ExitCode
from prioritycut_ray.launch.crash_evidence import crash_file, oom_kills
from prioritycut_ray.training.worker import WorkerStatus

BEAT_SECONDS = 0.5
SILENT_AFTER_S = 10.0
"""A rank that has not beaten for so long is frozen, dead or cut off."""
_ANSWER_SECONDS = 10.0


class Heartbeat(NamedTuple):
    """What a rank says of itself.

    Attributes:
        rank: from 0.
        node: Ray's id of the node, in hex.
        address: of the node.
        pid: of the worker process.
        group: Ray's id of the placement group that it runs in, in hex.
        started_from: step that this process began at, 0 until it has.
        step: optimiser steps taken.
        phase: one of :data:`~prioritycut_ray.training.worker.PHASES`.
        still_for: seconds since the phase began.
        oom_kills: see :class:`CrashEvidence`.
    """

    rank: int
    node: str
    address: str
    pid: int
    group: str
    started_from: int
    step: int
    phase: str
    still_for: float
    oom_kills: int


class ReceivedHeartbeat(NamedTuple):
    """A beat, and how many seconds ago it came."""

    beat: Heartbeat
    ago: float


class _Monitor:
    """The actor; every method answers at once."""

    def __init__(self) -> None:
        self._messages: list[Any] = []
        self._beats: dict[int, tuple[Heartbeat, float]] = {}
        self._stop = False
        self._draining: dict[str, int] = {}
        self._looked_at = 0.0

    def tell(self, message: Any) -> None:
        """Leave a message for the driver."""
        self._messages.append(message)

    def take(self) -> list[Any]:
        """All messages since the last call."""
        messages, self._messages = self._messages, []
        return messages

    def beat(self, beat: Heartbeat) -> bool:
        """Note what a rank does; whether it is to stop."""
        now = time.monotonic()
        self._beats[beat.rank] = (beat, now)
        if now - self._looked_at > BEAT_SECONDS:
            self._draining, self._looked_at = _draining_nodes(), now
        return self._stop or beat.node in self._draining

    def heard(self) -> dict[int, ReceivedHeartbeat]:
        """The last beat of every rank since the workers started."""
        now = time.monotonic()
        return {rank: ReceivedHeartbeat(beat, now - at) for rank, (beat, at) in self._beats.items()}

    def forget(self) -> None:
        """Other workers will start: their ranks may be fewer."""
        self._beats = {}

    def stop(self) -> None:
        """Ask all ranks to save and end."""
        self._stop = True

    def stops(self) -> bool:
        """Whether all ranks were asked to save and end."""
        return self._stop


def _draining_nodes() -> dict[str, int]:
    """Nodes that are about to be taken away; Ray has no public call for it."""
    return ray._private.state.state.get_draining_nodes() or {}


def start_monitor() -> Any:
    """Start the actor on the driver's node; it ends with the driver."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
    actor = ray.remote(num_cpus=0, max_restarts=-1)(_Monitor)
    return actor.options(scheduling_strategy=here).remote()


def ask(reference: Any, default: Any) -> Any:
    """The monitor's answer, or a default while it is being restarted."""
    try:
        return ray.get(reference, timeout=_ANSWER_SECONDS)
    except RayError:
        return default


class HeartbeatThread:
    """Beats for a rank from a thread of its own, while the body runs.

    Args:
        monitor: the actor.
        status: of the training thread; its ``stop`` is set when the monitor says so.
        rank: from 0.
        timeout_s: a training thread that is still for longer ends this process: it hangs.
    """

    def __init__(self, monitor: Any, status: WorkerStatus, rank: int, timeout_s: float) -> None:
        context = ray.get_runtime_context()
        self._monitor, self._status, self._rank = monitor, status, rank
        self._node, self._address = context.get_node_id(), ray.util.get_node_ip_address()
        self._group = ray.util.get_current_placement_group().id.hex()
        self._timeout_s = timeout_s
        self._finished = threading.Event()
        self._thread = threading.Thread(target=self._run, name="heart", daemon=True)

    def __enter__(self) -> "HeartbeatThread":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._finished.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._finished.wait(BEAT_SECONDS):
            beat = self._beat()
            if ask(self._monitor.beat.remote(beat), default=False) or terminated.is_set():
                self._status.stop = True
            if beat.still_for > self._timeout_s:
                faulthandler.dump_traceback(crash_file(os.getpid()).open("a"))
                os._exit(ExitCode.HANG)

    def _beat(self) -> Heartbeat:
        status = self._status
        return Heartbeat(
            self._rank,
            self._node,
            self._address,
            os.getpid(),
            self._group,
            status.started_from,
            status.step,
            status.phase,
            time.monotonic() - status.since,
            oom_kills(),
        )


terminated = threading.Event()
"""Set in a worker process that got SIGTERM: its place is about to be taken away."""


def all_beats(monitor: Any) -> list[Heartbeat]:
    """The last beat of every rank."""
    heard: dict[int, ReceivedHeartbeat] = ask(monitor.heard.remote(), {})
    return [h.beat for h in heard.values()]


def furthest_step(beats: Iterable[Heartbeat]) -> int:
    """The last step that any rank has reached."""
    return max((beat.step for beat in beats), default=0)


def started_from(beats: Iterable[Heartbeat]) -> int:
    """The step that the ranks started from."""
    return max((beat.started_from for beat in beats), default=0)
