"""Why a run ended: kinds of failure told apart, whether to try again, and words for people.

docs/failures.md says for each kind and its exit code what to do.
"""

import re
import shlex
import signal
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import ray
from ray.exceptions import OutOfMemoryError, RayActorError, RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from prioritycut_ray.errors import ExitCode, UserError, describe, is_disk_full, without_appendix
from prioritycut_ray.launch.crash_evidence import CrashEvidence, inspect_process
from prioritycut_ray.launch.heartbeat import SILENT_AFTER_S, Heartbeat, ReceivedHeartbeat
from prioritycut_ray.training.worker import PHASES

_INSPECTION_SECONDS = 30.0


ADVICE = {
    ExitCode.GPU_FAULT: "check that node's GPUs (nvidia-smi -q, Xid in dmesg) and take the node "
    "out if it comes again",
    ExitCode.LOST_NODE: "bring the node back or train with fewer train.workers",
    ExitCode.WORKER_ERROR: "report it if it comes again",
    ExitCode.OUT_OF_MEMORY: "lower train.batch_size or data.loader_workers, raise "
    "train.accumulate, or give a node fewer workers",
    ExitCode.WORKER_KILLED: "see who sent the signal; signals 4 to 11 are crashes of native code",
    ExitCode.DISK_FULL: "free space there or lower train.keep_checkpoints",
    ExitCode.HANG: "look at that rank's node, its storage and its network; "
    "train.collective_timeout_s is the patience",
}
RETRIED = (
    ExitCode.GPU_FAULT,
    ExitCode.LOST_NODE,
    ExitCode.WORKER_ERROR,
    ExitCode.OUT_OF_MEMORY,
    ExitCode.WORKER_KILLED,
)
"""Kinds that another attempt may not meet again."""


class Failure(NamedTuple):
    """What ended a group of workers.

    Attributes:
        kind: exit code of the command line.
        reason: one line.
        rank: that it began with, None if unknown.
        address: of that rank's node, empty if unknown.
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
    """Raised in Ray's controller to end a run that is not to be tried again."""

    def __init__(self, failure: Failure) -> None:
        super().__init__(failure)
        self.failure = failure


class RunFailed(UserError):
    """A run that ended before its time, explained; exits with the code of its kind.

    Attributes:
        summary: what happened, without the way to resume.
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
    heard: Mapping[int, ReceivedHeartbeat],
    timeout_s: float,
    inspect_rank: Inspect,
) -> Failure:
    """Find the failure behind what the ranks raised.

    Args:
        errors: by rank; a rank whose process is gone has Ray's error on that.
        heard: the last beats, by rank.
        timeout_s: of collectives.
        inspect_rank: looks for what is left of a rank's process; None if its node does not answer.
    """
    causes = {rank: _cause(error) for rank, error in errors.items()}
    rank = min(causes, key=lambda rank: (_CONSEQUENCES.get(causes[rank][0], 0), rank))
    kind, reason = causes[rank]
    beat = heard[rank].beat if rank in heard else None
    if kind is ExitCode.WORKER_KILLED and beat is not None:
        kind, reason = _death(beat, inspect_rank(beat), timeout_s)
    if kind is None:
        return _lost_connection(reason, errors, heard, inspect_rank)
    if kind is ExitCode.HANG:
        return _hang(heard, timeout_s)
    step = beat.step if beat else max((h.beat.step for h in heard.values()), default=0)
    return Failure(kind, reason, rank, beat.address if beat else "", step)


def diagnose_controller(error: BaseException, step: int) -> Failure:
    """What the end of Ray's controller, the process that directs the ranks, means.

    Args:
        error: what Ray says of it.
        step: that the ranks had reached.
    """
    kind, reason = _cause(error)
    if kind is ExitCode.OUT_OF_MEMORY and isinstance(error, RayError):
        reason = "Ray's memory monitor killed the run's controller: its node was nearly full"
    elif kind is ExitCode.WORKER_KILLED:
        reason = "the process of the run's controller is gone"
    return Failure(kind or ExitCode.WORKER_ERROR, reason, None, "", step)


_CONSEQUENCES: dict[ExitCode | None, int] = {ExitCode.PREEMPTED: 1, ExitCode.HANG: 2, None: 3}
"""What may only follow from another rank's failure; the higher, the less it says."""


def inspect_rank(beat: Heartbeat) -> CrashEvidence | None:
    """What is left of a rank's process, by a Ray task on its node; None if the node is silent."""
    there = NodeAffinitySchedulingStrategy(beat.node, soft=False)
    task = ray.remote(num_cpus=0, max_retries=0)(inspect_process)
    try:
        reference = task.options(scheduling_strategy=there).remote(beat.pid)
        evidence: CrashEvidence = ray.get(reference, timeout=_INSPECTION_SECONDS)
        return evidence
    except RayError:
        return None


def is_of_a_peer(error: BaseException) -> bool:
    """Whether an error only says that another rank is gone or silent."""
    return _cause(error)[0] in (None, ExitCode.HANG)


def _cause(error: BaseException) -> tuple[ExitCode | None, str]:
    """Exit code and reason of what one rank raised; None where it only lost the connection."""
    error = getattr(error, "health_check_failure", error)
    text = str(error).strip()
    reason = describe(error)
    if isinstance(error, UserError):
        return error.exit_code, text
    if isinstance(error, OutOfMemoryError) or "node running low on memory" in text:
        return (
            ExitCode.OUT_OF_MEMORY,
            "Ray's memory monitor killed the worker: its node was nearly full",
        )
    if isinstance(error, RayActorError):
        return _actor_death(error, text)
    if isinstance(error, MemoryError) or _MEMORY.search(text):
        return ExitCode.OUT_OF_MEMORY, reason
    if _GPU_FAULT.search(text):
        return ExitCode.GPU_FAULT, reason
    if is_disk_full(error):
        place = getattr(error, "filename", None)
        return ExitCode.DISK_FULL, f"{place}: no space left" if place else reason
    if type(error).__name__ in _RAY_TIME_OUTS:
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
    # cuDNN's search passes over algorithms whose workspace does not fit; here none was left.
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
    # Not the settings that NCCL prints, and not TCP's word on a host that is gone.
    r"(?<!Connection )timed[ -]out|(?<!_)time-?out(?!\(ms\))|timing out|watchdog got stuck"
    r"|failed to pass monitoredBarrier",
    re.I,
)
_RAY_TIME_OUTS = (
    "CollectiveTimeoutError",
    "BroadcastCollectiveTimeoutError",
    "WorkerHealthCheckTimeoutError",
)
"""Names of Ray Train's errors, which its public modules do not export."""


def _actor_death(error: RayActorError, text: str) -> tuple[ExitCode, str]:
    if error.preempted or "SIGTERM" in text:
        return ExitCode.PREEMPTED, "the worker's place was taken away before it could save"
    if re.search(r"node (has died|is dead|was terminated)|node died", text):
        return ExitCode.LOST_NODE, "the worker's node is gone"
    return ExitCode.WORKER_KILLED, "the worker process is gone"


_CRASHES = {
    "Segmentation fault": signal.SIGSEGV,
    "Aborted": signal.SIGABRT,
    "Bus error": signal.SIGBUS,
    "Floating": signal.SIGFPE,
    "Illegal instruction": signal.SIGILL,
}
"""In the words of Python's faulthandler."""


def _death(
    beat: Heartbeat, evidence: CrashEvidence | None, timeout_s: float
) -> tuple[ExitCode, str]:
    """Why a rank's process is gone, from what it left behind."""
    if evidence is None:
        return ExitCode.LOST_NODE, "the worker's node does not answer"
    still = beat.still_for >= 0.9 * timeout_s
    for words, number in _CRASHES.items():
        if f"Fatal Python error: {words}" in evidence.crash:
            if number == signal.SIGABRT and still:  # what NCCL's watchdog does
                return ExitCode.HANG, ""
            return (
                ExitCode.WORKER_KILLED,
                f"process {beat.pid} crashed by signal {number:d} ({number.name})",
            )
    if still:
        return ExitCode.HANG, ""
    if evidence.oom_kills > beat.oom_kills:
        return (
            ExitCode.OUT_OF_MEMORY,
            f"the kernel killed process {beat.pid}: its node had none left",
        )
    return ExitCode.WORKER_KILLED, f"process {beat.pid} got signal 9 (SIGKILL)"


def _lost_connection(
    reason: str,
    errors: Mapping[int, BaseException],
    heard: Mapping[int, ReceivedHeartbeat],
    inspect_rank: Inspect,
) -> Failure:
    """The ranks that raised only say that another one is gone: look for it."""
    for rank in sorted(heard.keys() - errors.keys()):
        beat = heard[rank].beat
        evidence = inspect_rank(beat)
        if evidence is None or not evidence.alive:
            kind, words = _death(beat, evidence, float("inf"))
            return Failure(kind, words, rank, beat.address, beat.step)
    rank = min(errors)
    address = heard[rank].beat.address if rank in heard else ""
    step = max((h.beat.step for h in heard.values()), default=0)
    return Failure(
        ExitCode.WORKER_ERROR, f"lost the connection to another rank: {reason}", rank, address, step
    )


def _hang(heard: Mapping[int, ReceivedHeartbeat], timeout_s: float) -> Failure:
    """Name the rank that the others wait for: a silent one, or the one that is furthest behind."""
    silent = {rank: h for rank, h in heard.items() if h.ago > SILENT_AFTER_S}
    ranks = silent or heard
    if not ranks:
        return Failure(ExitCode.HANG, f"no rank moved for {timeout_s:g} s", None, "", 0)
    place = {rank: (h.beat.step, PHASES.index(h.beat.phase)) for rank, h in ranks.items()}
    rank = min(place, key=lambda rank: (place[rank], rank))
    beat, ago = ranks[rank]
    level = [str(other) for other in ranks if other != rank and place[other] == place[rank]]
    words = f"rank {rank} hangs at {beat.phase!r}"
    words += f", no sign of life of its process for {ago:.0f} s" if silent else ""
    words += f"; so do ranks {', '.join(level)}" if level else ""
    words += f"; the others waited {timeout_s:g} s" if len(heard) > len(level) + 1 else ""
    return Failure(ExitCode.HANG, words, rank, beat.address, beat.step)


def resume_command() -> str:
    """The user's own command line, quoted for a shell: run again, it resumes."""
    program = Path(sys.argv[0])
    words = ["python", sys.argv[0]] if program.suffix == ".py" else [program.name]
    return shlex.join([*words, *sys.argv[1:]])


def explain(name: str, failure: Failure, last_checkpoint: str) -> RunFailed:
    """One line on a run that ended: cause, rank, node, step, last checkpoint, and how to resume."""
    advice = ADVICE.get(failure.kind)
    parts = [
        f"run {name!r} ended: {failure}",
        *([advice] if advice else []),
        f"last checkpoint: {last_checkpoint}",
        f"resume with: {resume_command()}",
    ]
    return RunFailed("; ".join(parts), failure.kind, parts[0])
