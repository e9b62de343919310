"""Diagnosis of failures: kind, rank, node and step, and the message that explains them.

A kind is the exit code of the command line; docs/failures.md says for each what to do.
"""

import re
import shlex
import signal
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import ray
from ray.exceptions import RayActorError, RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from prioritycut_ray.errors import ExitCode, UserError, describe, is_disk_full, without_appendix
from prioritycut_ray.launch.crash_evidence import CrashEvidence, inspect_process
from prioritycut_ray.launch.heartbeat import (
    SILENT_AFTER_S,
    Heartbeat,
    ReceivedHeartbeat,
    furthest_step,
)
from prioritycut_ray.ray_cluster.compat import (
    health_check_cause,
    is_train_timeout,
    killed_by_memory_monitor,
    lost_its_node,
    was_terminated,
)
from prioritycut_ray.training.worker import PHASES

_INSPECTION_SECONDS = 30.0


ADVICE = {
    ExitCode.GPU_FAULT: "check that node's GPUs (nvidia-smi -q, Xid in dmesg) and remove the node "
    "if it happens again",
    ExitCode.LOST_NODE: "bring the node back or train with fewer train.workers",
    ExitCode.WORKER_ERROR: "report it if it happens again",
    ExitCode.OUT_OF_MEMORY: "lower train.batch_size or data.loader_workers, raise "
    "train.accumulate, or run fewer workers per node",
    ExitCode.WORKER_KILLED: "find out who sent the signal; 4 to 11 are crashes of native code",
    ExitCode.DISK_FULL: "free space there or lower train.keep_checkpoints",
    ExitCode.HANG: "check that rank's node, storage and network, or raise "
    "train.collective_timeout_s",
}
"""What to do, for kinds whose reason does not say it already."""


class Failure(NamedTuple):
    """What ended a group of workers.

    Attributes:
        kind: exit code of the command line.
        reason: one line.
        rank: that failed first; None if unknown.
        address: of that rank's node; empty if unknown.
        step: that the rank had reached.
    """

    kind: ExitCode
    reason: str
    rank: int | None
    address: str
    step: int

    def __str__(self) -> str:
        who = "" if self.rank is None else f"rank {self.rank}, node {self.address or 'unknown'}, "
        return f"{self.kind.title}: {self.reason} ({who}step {self.step})"


class RunEnded(Exception):
    """Raised in Ray's controller to end a run that is not retried."""

    def __init__(self, failure: Failure) -> None:
        super().__init__(failure)
        self.failure = failure


class RunFailed(UserError):
    """Raised when a run ended early; the exit code is the kind of failure.

    Attributes:
        summary: what happened, without how to resume.
    """

    def __init__(self, message: str, kind: ExitCode, summary: str) -> None:
        super().__init__(message, kind, summary)
        self.exit_code = kind
        self.summary = summary

    def __str__(self) -> str:
        return str(self.args[0])


Inspect = Callable[[Heartbeat], CrashEvidence | None]


def diagnose(
    errors: Mapping[int, BaseException],
    received: Mapping[int, ReceivedHeartbeat],
    timeout_s: float,
    inspect: Inspect,
) -> Failure:
    """Return the failure behind the errors of the ranks.

    Args:
        errors: by rank; for a rank whose process is gone, Ray's error about that.
        received: the last heartbeats, by rank.
        timeout_s: of collectives.
        inspect: returns what is left of a rank's process; None if its node does not respond.
    """
    causes = {rank: _cause(error) for rank, error in errors.items()}
    rank = min(causes, key=lambda rank: (_CONSEQUENCES.get(causes[rank][0], 0), rank))
    kind, reason = causes[rank]
    heartbeat = received[rank].heartbeat if rank in received else None
    if kind is ExitCode.WORKER_KILLED and heartbeat is not None:
        kind, reason = _death(heartbeat, inspect(heartbeat), timeout_s)
    if kind is None:
        return _lost_connection(reason, errors, received, inspect)
    if kind is ExitCode.HANG:
        return _hang(received, timeout_s)
    step = heartbeat.step if heartbeat else furthest_step(received)
    return Failure(kind, reason, rank, heartbeat.address if heartbeat else "", step)


def diagnose_controller(error: BaseException, step: int) -> Failure:
    """Return the failure behind the end of Ray's controller, the process that directs the ranks.

    Args:
        error: that Ray raised.
        step: that the ranks had reached.
    """
    kind, reason = _cause(error)
    if kind is ExitCode.OUT_OF_MEMORY and isinstance(error, RayError):
        reason = "Ray's memory monitor killed the run's controller: its node was nearly full"
    elif kind is ExitCode.WORKER_KILLED:
        reason = "the process of the run's controller is gone"
    return Failure(kind or ExitCode.WORKER_ERROR, reason, None, "", step)


_CONSEQUENCES: dict[ExitCode | None, int] = {ExitCode.PREEMPTED: 1, ExitCode.HANG: 2, None: 3}
"""Kinds that may only follow from another rank's failure; the higher, the less they explain."""


def inspect_rank(heartbeat: Heartbeat) -> CrashEvidence | None:
    """Inspect a rank's process with a Ray task on its node; None if the node does not respond."""
    there = NodeAffinitySchedulingStrategy(heartbeat.node_id, soft=False)
    task = ray.remote(num_cpus=0, max_retries=0)(inspect_process)
    try:
        reference = task.options(scheduling_strategy=there).remote(heartbeat.pid)
        evidence: CrashEvidence = ray.get(reference, timeout=_INSPECTION_SECONDS)
        return evidence
    except RayError:
        return None


def is_caused_by_peer(error: BaseException) -> bool:
    """Return whether an error only says that another rank is gone or silent."""
    return _cause(error)[0] in (None, ExitCode.HANG)


def _cause(error: BaseException) -> tuple[ExitCode | None, str]:
    """Return the kind and reason of one rank's error; None if it only lost a connection."""
    error = health_check_cause(error)
    text = str(error).strip()
    reason = describe(error)
    if isinstance(error, UserError):
        return error.exit_code, text
    if killed_by_memory_monitor(error):
        return (
            ExitCode.OUT_OF_MEMORY,
            "Ray's memory monitor killed the worker: its node was nearly full",
        )
    if isinstance(error, RayActorError):
        return _actor_death(error)
    if isinstance(error, MemoryError) or _MEMORY.search(text):
        return ExitCode.OUT_OF_MEMORY, reason
    if _GPU_FAULT.search(text):
        return ExitCode.GPU_FAULT, reason
    if is_disk_full(error):
        place = getattr(error, "filename", None)
        return ExitCode.DISK_FULL, f"{place}: no space left" if place else reason
    if is_train_timeout(error):
        return ExitCode.HANG, reason
    if isinstance(error, RuntimeError) and not _OWN_GPU.search(reason):
        if _TIMED_OUT.search(without_appendix(text)):
            return ExitCode.HANG, reason
        if _COLLECTIVE.search(reason):
            return None, reason
    return ExitCode.WORKER_ERROR, reason


# The texts below are those of torch 2.11 to 2.14, CUDA 13, cuBLAS, cuDNN 9 and 8, NCCL 2.30, gloo
# and glibc; tests/unit/launch/test_failures.py has examples of each.

_MEMORY = re.compile(
    r"out of memory|can't allocate memory|Cannot allocate memory|std::bad_alloc"
    r"|(CUBLAS|CUDNN|CUSOLVER|CUSPARSE)_STATUS\w*_ALLOC(ATION)?_FAILED|CUFFT_ALLOC_FAILED"
    r"|Failed to (CUDA )?(host )?[cm]?alloc (async )?\d+ bytes"
    # cuDNN's search skips algorithms whose workspace does not fit; here none was left.
    r"|was unable to find an engine|Unable to find a valid cuDNN algorithm",
    re.I,
)
_GPU_FAULT = re.compile(
    r"uncorrectable (ECC|NVLink) error|over nvlink or a hardware error|hardware stack error"
    r"|CUDA-capable device\(s\) is/are busy or unavailable|no CUDA-capable device is detected"
    r"|GPU is lost|fallen off the bus"
)
_OWN_GPU = re.compile(
    r"(CUDA|cuDNN|cusolver|cuFFT|cuSPARSE)( \w+)? error: |NCCL error.*"
    r"(unhandled cuda error|invalid usage|invalid argument)",
    re.I,
)
"""Errors of a rank's own device or of its own use of NCCL: no peer is to blame."""
_COLLECTIVE = re.compile(
    r"gloo|NCCL|ProcessGroup|TCPStore|^Dist|Broken pipe|Socket closed"
    r"|Connection (closed|reset|refused|timed out)",
    re.I,
)
_TIMED_OUT = re.compile(
    # Neither the settings that NCCL prints nor TCP's error for a host that is gone.
    r"(?<!Connection )timed[ -]out|(?<!_)time-?out(?!\(ms\))|timing out|watchdog got stuck"
    r"|failed to pass monitoredBarrier",
    re.I,
)


def _actor_death(error: RayActorError) -> tuple[ExitCode, str]:
    if was_terminated(error):
        return ExitCode.PREEMPTED, "the worker was terminated before it could save"
    if lost_its_node(error):
        return ExitCode.LOST_NODE, "the worker's node is gone"
    return ExitCode.WORKER_KILLED, "the worker process is gone"


_CRASHES = {
    "Segmentation fault": signal.SIGSEGV,
    "Aborted": signal.SIGABRT,
    "Bus error": signal.SIGBUS,
    "Floating": signal.SIGFPE,
    "Illegal instruction": signal.SIGILL,
}
"""As Python's faulthandler names them."""


def _death(
    heartbeat: Heartbeat, evidence: CrashEvidence | None, timeout_s: float
) -> tuple[ExitCode, str]:
    """Return why a rank's process is gone, from what it left behind."""
    if evidence is None:
        return ExitCode.LOST_NODE, "the worker's node does not respond"
    still = heartbeat.phase_seconds >= 0.9 * timeout_s
    for words, number in _CRASHES.items():
        if f"Fatal Python error: {words}" in evidence.crash:
            if number == signal.SIGABRT and still:  # what NCCL's watchdog does
                return ExitCode.HANG, ""
            return (
                ExitCode.WORKER_KILLED,
                f"process {heartbeat.pid} crashed by signal {number:d} ({number.name})",
            )
    if still:
        return ExitCode.HANG, ""
    if evidence.oom_kills > heartbeat.oom_kills:
        return (
            ExitCode.OUT_OF_MEMORY,
            f"the kernel killed process {heartbeat.pid}: its node ran out of memory",
        )
    return ExitCode.WORKER_KILLED, f"process {heartbeat.pid} got signal 9 (SIGKILL)"


def _lost_connection(
    reason: str,
    errors: Mapping[int, BaseException],
    received: Mapping[int, ReceivedHeartbeat],
    inspect: Inspect,
) -> Failure:
    """Find the rank that is gone, when all errors only say that one is."""
    for rank in sorted(received.keys() - errors.keys()):
        heartbeat = received[rank].heartbeat
        evidence = inspect(heartbeat)
        if evidence is None or not evidence.alive:
            kind, words = _death(heartbeat, evidence, float("inf"))
            return Failure(kind, words, rank, heartbeat.address, heartbeat.step)
    rank = min(errors)
    address = received[rank].heartbeat.address if rank in received else ""
    step = furthest_step(received)
    return Failure(
        ExitCode.WORKER_ERROR, f"lost the connection to another rank: {reason}", rank, address, step
    )


def _hang(received: Mapping[int, ReceivedHeartbeat], timeout_s: float) -> Failure:
    """Name the rank that the others wait for: a silent one, or the one furthest behind."""
    silent = {rank: r for rank, r in received.items() if r.age_s > SILENT_AFTER_S}
    ranks = silent or received
    if not ranks:
        return Failure(ExitCode.HANG, f"no rank moved for {timeout_s:g} s", None, "", 0)
    place = {rank: (r.heartbeat.step, PHASES.index(r.heartbeat.phase)) for rank, r in ranks.items()}
    rank = min(place, key=lambda rank: (place[rank], rank))
    heartbeat, age_s = ranks[rank]
    level = [str(other) for other in ranks if other != rank and place[other] == place[rank]]
    words = f"rank {rank} hangs at {heartbeat.phase!r}"
    words += f", its process has been silent for {age_s:.0f} s" if silent else ""
    words += f"; so do ranks {', '.join(level)}" if level else ""
    words += f"; the others waited {timeout_s:g} s" if len(received) > len(level) + 1 else ""
    return Failure(ExitCode.HANG, words, rank, heartbeat.address, heartbeat.step)


def resume_command() -> str:
    """Return the user's own command line, quoted for a shell; run again, it resumes."""
    program = Path(sys.argv[0])
    words = ["python", sys.argv[0]] if program.suffix == ".py" else [program.name]
    return shlex.join([*words, *sys.argv[1:]])


def explain(name: str, failure: Failure, last_checkpoint: str) -> RunFailed:
    """Describe the end of a run: cause, rank, node, step, last checkpoint, and how to resume."""
    advice = ADVICE.get(failure.kind)
    parts = [
        f"run {name!r} ended: {failure}",
        *([advice] if advice else []),
        f"last checkpoint: {last_checkpoint}",
        f"resume with: {resume_command()}",
    ]
    return RunFailed("; ".join(parts), failure.kind, parts[0])
