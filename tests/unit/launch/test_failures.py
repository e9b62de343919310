"""Diagnosis of failures from the messages of Ray, torch, CUDA and the system."""

import errno
import shlex
import sys
from collections.abc import Callable

import pytest
import torch
from ray.exceptions import OutOfMemoryError, RayActorError
from ray.train.v2._internal.exceptions import (
    BroadcastCollectiveTimeoutError,
    WorkerHealthCheckTimeoutError,
)

from prioritycut_ray.errors import DataError, ExitCode, NotFiniteError, Preempted, UserError
from prioritycut_ray.launch import failures
from prioritycut_ray.launch.crash_evidence import CrashEvidence
from prioritycut_ray.launch.failures import (
    Failure,
    diagnose,
    diagnose_controller,
    explain,
)
from prioritycut_ray.launch.heartbeat import Heartbeat, ReceivedHeartbeat
from prioritycut_ray.launch.retry import FailureDecision, FailurePolicy

TIMEOUT = 600.0
GLOO_CLOSED = RuntimeError(
    "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:534] Connection closed by peer "
    "[10.0.0.2]:17453"
)
GLOO_TIMEOUT = RuntimeError(
    "[/pytorch/third_party/gloo/gloo/transport/tcp/unbound_buffer.cc:81] Timed out waiting "
    "600000ms for recv operation to complete"
)


CUDA_ADVICE = (
    "\nSearch for `cudaErrorX' in https://docs.nvidia.com/cuda/cuda-runtime-api/"
    "group__CUDART__TYPES.html for more information."
    "\nCUDA kernel errors might be asynchronously reported at some other API call, so the "
    "stacktrace below might be incorrect."
    "\nFor debugging consider passing CUDA_LAUNCH_BLOCKING=1"
    "\nCompile with `TORCH_USE_CUDA_DSA` to enable device-side assertions.\n"
)
CPP_FRAMES = (
    "\nException raised from checkForNCCLErrors at /pytorch/c10d/ProcessGroupNCCL.cpp:2363 (most "
    "recent call first):\nframe #0: c10::Error::Error + 0x98 (0x7f in libc10.so)\n"
)


def cuda(words: str) -> Exception:
    """Return torch's error for the CUDA runtime: the cause comes first."""
    return torch.AcceleratorError(f"CUDA error: {words}{CUDA_ADVICE}")


def nccl(category: str, last: str = "") -> Exception:
    return torch.distributed.DistBackendError(
        "NCCL error in: /pytorch/torch/csrc/distributed/c10d/NCCLUtils.cpp:77, "
        f"{category}, NCCL version 2.30.7\nncclX: A call failed.\nLast error:\n{last}{CPP_FRAMES}"
    )


UNHANDLED_CUDA = "unhandled cuda error (run with NCCL_DEBUG=INFO for details)"
UNHANDLED_SYSTEM = "unhandled system error (run with NCCL_DEBUG=INFO for details)"
REMOTE = "remote process exited or there was a network error"
INVALID_USAGE = "invalid usage (run with NCCL_DEBUG=WARN for details)"


class HealthCheckFailed(Exception):
    """Like Ray Train's wrapper of an error that a health check met."""

    def __init__(self, failure: Exception) -> None:
        super().__init__("A worker health check failed.")
        self.health_check_failure = failure


def died(words: str = "", preempted: bool = False) -> HealthCheckFailed:
    message = f"The actor died unexpectedly before finishing this task. {words}"
    return HealthCheckFailed(RayActorError(error_msg=message, preempted=preempted))


def received(
    rank: int, step: int = 7, phase: str = "generator step", age_s: float = 0.3
) -> ReceivedHeartbeat:
    heartbeat = Heartbeat(
        rank, f"node{rank}", f"10.0.0.{rank}", 100 + rank, "", 0, step, phase, 1.0, 5
    )
    return ReceivedHeartbeat(heartbeat, age_s)


def found(evidence: CrashEvidence | None) -> Callable[[Heartbeat], CrashEvidence | None]:
    return lambda heartbeat: evidence


GONE = found(CrashEvidence(alive=False, crash="", oom_kills=5))
ALIVE = found(CrashEvidence(alive=True, crash="", oom_kills=5))
SEGFAULT = found(CrashEvidence(False, "Fatal Python error: Segmentation fault\n\nThread 0x1:", 5))
OOM_KILL = found(CrashEvidence(alive=False, crash="", oom_kills=6))
OUT_OF_SPACE = OSError(errno.ENOSPC, "No space left on device", "/runs/vox")


@pytest.mark.parametrize(
    ("error", "inspect", "kind", "words"),
    [
        (died(), GONE, ExitCode.WORKER_KILLED, "process 101 got signal 9 (SIGKILL)"),
        (died(), SEGFAULT, ExitCode.WORKER_KILLED, "process 101 crashed by signal 11 (SIGSEGV)"),
        (died(), OOM_KILL, ExitCode.OUT_OF_MEMORY, "the kernel killed process 101"),
        (died(), found(None), ExitCode.LOST_NODE, "does not respond"),
        (
            died("The actor died because its node has died."),
            GONE,
            ExitCode.LOST_NODE,
            "node is gone",
        ),
        (died("The process receives a SIGTERM."), GONE, ExitCode.PREEMPTED, "was terminated"),
        (died(preempted=True), GONE, ExitCode.PREEMPTED, "was terminated"),
        (
            HealthCheckFailed(OutOfMemoryError("low")),
            GONE,
            ExitCode.OUT_OF_MEMORY,
            "memory monitor",
        ),
        (MemoryError("array"), ALIVE, ExitCode.OUT_OF_MEMORY, "MemoryError: array"),
        (torch.OutOfMemoryError("CUDA out of memory."), ALIVE, ExitCode.OUT_OF_MEMORY, "CUDA out"),
        (OUT_OF_SPACE, ALIVE, ExitCode.DISK_FULL, "/runs/vox: no space left"),
        (
            RuntimeError("PytorchStreamWriter failed writing file"),
            ALIVE,
            ExitCode.DISK_FULL,
            "failed",
        ),
        (DataError("data: 8 clips"), ALIVE, ExitCode.BAD_DATA, "data: 8 clips"),
        (NotFiniteError("10 updates"), ALIVE, ExitCode.NOT_FINITE, "10 updates"),
        (Preempted("saved at step 7"), ALIVE, ExitCode.PREEMPTED, "saved at step 7"),
        (UserError("wrong key"), ALIVE, ExitCode.USER_ERROR, "wrong key"),
        (ValueError("first\nlast"), ALIVE, ExitCode.WORKER_ERROR, "ValueError: last"),
    ],
)
def test_kinds_are_distinguished(
    error: Exception,
    inspect: Callable[[Heartbeat], CrashEvidence | None],
    kind: ExitCode,
    words: str,
) -> None:
    """Also the rank that failed first is named, not one that only lost the connection to it."""
    errors = {0: GLOO_CLOSED, 1: error}
    failure = diagnose(errors, {0: received(0), 1: received(1)}, TIMEOUT, inspect)
    assert (failure.kind, failure.rank, failure.address) == (kind, 1, "10.0.0.1")
    assert failure.step == 7
    assert words in failure.reason
    assert "\n" not in failure.reason


@pytest.mark.parametrize(
    ("error", "kind", "words"),
    [
        (cuda("out of memory"), ExitCode.OUT_OF_MEMORY, "CUDA error: out of memory"),
        (
            torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has"),
            ExitCode.OUT_OF_MEMORY,
            "Tried to allocate 2.00 GiB",
        ),
        (
            torch.OutOfMemoryError("Allocation on device 0 would exceed memory. (out of memory)"),
            ExitCode.OUT_OF_MEMORY,
            "would exceed",
        ),
        (RuntimeError("CUDA driver error: out of memory"), ExitCode.OUT_OF_MEMORY, "driver error"),
        (RuntimeError("Triton Error [CUDA]: out of memory"), ExitCode.OUT_OF_MEMORY, "Triton"),
        (
            RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(h)`"),
            ExitCode.OUT_OF_MEMORY,
            "CUBLAS_STATUS_ALLOC_FAILED",
        ),
        (
            RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
            ExitCode.OUT_OF_MEMORY,
            "CUDNN_STATUS_ALLOC_FAILED",
        ),
        (
            RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED\nYou"),
            ExitCode.OUT_OF_MEMORY,
            "DEVICE_ALLOCATION_FAILED",
        ),
        (
            RuntimeError("cusolver error: CUSOLVER_STATUS_ALLOC_FAILED, when calling `x`"),
            ExitCode.OUT_OF_MEMORY,
            "cusolver error",
        ),
        (RuntimeError("cuFFT error: CUFFT_ALLOC_FAILED"), ExitCode.OUT_OF_MEMORY, "cuFFT error"),
        (
            RuntimeError("FIND was unable to find an engine to execute this computation"),
            ExitCode.OUT_OF_MEMORY,
            "FIND was unable",
        ),
        (
            nccl(UNHANDLED_CUDA, "Failed to CUDA calloc 6291456 bytes"),
            ExitCode.OUT_OF_MEMORY,
            "unhandled cuda error",
        ),
        (
            nccl(UNHANDLED_CUDA, "Failed to CUDA calloc async 24 bytes"),
            ExitCode.OUT_OF_MEMORY,
            "Failed to CUDA calloc async",
        ),
        (
            nccl(UNHANDLED_CUDA, "Failed to CUDA host alloc 24 bytes"),
            ExitCode.OUT_OF_MEMORY,
            "host alloc",
        ),
        (nccl(UNHANDLED_SYSTEM, "Failed to malloc 24 bytes"), ExitCode.OUT_OF_MEMORY, "malloc"),
        (
            nccl(UNHANDLED_CUDA, "Cuda failure 2 'out of memory'"),
            ExitCode.OUT_OF_MEMORY,
            "'out of memory'",
        ),
        (
            RuntimeError(
                "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate "
                "memory: you tried to allocate 8 bytes. Error code 12 (Cannot allocate memory)"
            ),
            ExitCode.OUT_OF_MEMORY,
            "DefaultCPUAllocator",
        ),
        (RuntimeError("std::bad_alloc"), ExitCode.OUT_OF_MEMORY, "bad_alloc"),
        (
            cuda("an illegal memory access was encountered"),
            ExitCode.WORKER_ERROR,
            "AcceleratorError: CUDA error: an illegal memory access was encountered",
        ),
        (cuda("device-side assert triggered"), ExitCode.WORKER_ERROR, "device-side assert"),
        (cuda("unspecified launch failure"), ExitCode.WORKER_ERROR, "launch failure"),
        (
            cuda("the launch timed out and was terminated"),
            ExitCode.WORKER_ERROR,
            "the launch timed out",
        ),
        (
            RuntimeError(
                "CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasSgemm(h)`"
            ),
            ExitCode.WORKER_ERROR,
            "EXECUTION_FAILED",
        ),
        (
            RuntimeError(
                "cuDNN error: CUDNN_STATUS_EXECUTION_FAILED\nYou can try to repro this exception "
                "using the following code snippet.\n\nimport torch\ntorch.cuda.synchronize()"
            ),
            ExitCode.WORKER_ERROR,
            "RuntimeError: cuDNN error: CUDNN_STATUS_EXECUTION_FAILED",
        ),
        (
            nccl(UNHANDLED_CUDA, "Cuda failure 700 'an illegal memory access was encountered'"),
            ExitCode.WORKER_ERROR,
            "illegal memory access",
        ),
        (
            nccl(INVALID_USAGE, "Duplicate GPU detected : rank 1 and rank 0 both on CUDA device 0"),
            ExitCode.WORKER_ERROR,
            "Duplicate GPU",
        ),
        (
            cuda("uncorrectable ECC error encountered"),
            ExitCode.GPU_FAULT,
            "CUDA error: uncorrectable",
        ),
        (
            cuda("uncorrectable NVLink error detected during the execution"),
            ExitCode.GPU_FAULT,
            "NVLink error",
        ),
        (cuda("hardware stack error"), ExitCode.GPU_FAULT, "hardware stack error"),
        (
            cuda("CUDA-capable device(s) is/are busy or unavailable"),
            ExitCode.GPU_FAULT,
            "busy or unavailable",
        ),
        (
            nccl(UNHANDLED_CUDA, "Cuda failure 214 'uncorrectable ECC error encountered'"),
            ExitCode.GPU_FAULT,
            "unhandled cuda error",
        ),
        (
            RuntimeError(
                "InvalidCxxCompiler: No working C++ compiler found in cpp.cxx: (None, 'g++')\n\n"
                "Set TORCHDYNAMO_VERBOSE=1 for the internal stack trace (please do this ...)"
            ),
            ExitCode.WORKER_ERROR,
            "No working C++ compiler",
        ),
        (
            nccl(UNHANDLED_SYSTEM, "Call to posix_fallocate failed : No space left on device"),
            ExitCode.DISK_FULL,
            "posix_fallocate",
        ),
    ],
)
def test_errors_of_gpus_and_their_libraries_are_distinguished(
    error: Exception, kind: ExitCode, words: str
) -> None:
    failure = diagnose({0: error}, {0: received(0), 1: received(1)}, TIMEOUT, ALIVE)
    assert failure.kind is kind
    assert words in failure.reason
    assert "DSA" not in failure.reason
    assert "frame #" not in failure.reason
    assert "\n" not in failure.reason
    assert not failures.is_caused_by_peer(error)


@pytest.mark.parametrize(
    "error",
    [
        GLOO_TIMEOUT,
        RuntimeError("Application timeout caused pair closure"),
        RuntimeError("[/pytorch/gloo/transport/tcp/buffer.cc:70] Read timeout /10.0.0.2:17453"),
        RuntimeError("Connect timeout [10.0.0.2]:17453"),
        RuntimeError("Wait timeout"),
        RuntimeError("[Rank 0]: Ranks 1 failed to pass monitoredBarrier in 60000 ms"),
        RuntimeError("Rank 1 timed out in monitoredBarrier after 60000 ms."),
        torch.distributed.DistStoreError("Socket Timeout"),
        torch.distributed.DistStoreError("wait timeout after 300000ms, keys: /default_pg/0//cuda"),
        torch.distributed.DistStoreError("Timed out after 61 seconds waiting for clients. 1/2"),
        torch.distributed.DistNetworkError(
            "The client socket has timed out after 60000ms while trying to connect to (h, 29500)."
        ),
        torch.distributed.DistBackendError(
            "[Rank 0] Watchdog caught collective operation timeout: WorkNCCL(SeqNum=7, "
            "OpType=ALLREDUCE, NumelIn=1, NumelOut=1, Timeout(ms)=600000) ran for 600014 "
            f"milliseconds before timing out.{CPP_FRAMES}"
        ),
        torch.distributed.DistBackendError(
            "[PG ID 0 PG GUID 0(default_pg) Rank 1] Work WorkNCCL(SeqNum=7, OpType=ALLREDUCE, "
            "Timeout(ms)=600000) timed out in blocking wait."
        ),
        torch.distributed.DistBackendError(
            "NCCL timeout when waiting for nonblocking call to become successful."
        ),
        RuntimeError("[Rank 0] ProcessGroupNCCL's watchdog got stuck for 480 seconds"),
        BroadcastCollectiveTimeoutError(61.0, [1], 60.0),
        WorkerHealthCheckTimeoutError("A worker health check has been hanging for 600 seconds."),
    ],
)
def test_every_timeout_is_a_collective_timeout(error: Exception) -> None:
    """Also the rank that hangs is named, not the one that reported it."""
    heartbeats = {0: received(0), 1: received(1, age_s=500)}
    failure = diagnose({0: error}, heartbeats, TIMEOUT, ALIVE)
    assert (failure.kind, failure.rank) == (ExitCode.HANG, 1)
    assert failures.is_caused_by_peer(error)


@pytest.mark.parametrize(
    "error",
    [
        GLOO_CLOSED,
        RuntimeError("[/pytorch/gloo/transport/tcp/pair.cc:446] writev [10.0.0.2]:1: Broken pipe"),
        RuntimeError("readv [10.0.0.2]:17453: Connection reset by peer"),
        RuntimeError("readv [10.0.0.2]:17453: Connection timed out"),
        torch.distributed.DistNetworkError("failed to recv, got 0 bytes"),
        nccl(REMOTE, "socketProgress: Connection closed by remote peer host<4711>"),
        nccl(REMOTE, "Consider a larger NCCL_IB_TIMEOUT"),
        nccl(UNHANDLED_SYSTEM, "socketStartConnect: Connect to 10.0.0.2<1> failed"),
        torch.distributed.DistBackendError("NCCL communicator was aborted on rank 1."),
    ],
)
def test_a_lost_peer_is_not_the_failure_itself(error: Exception) -> None:
    errors = {0: error, 1: ValueError("shape")}
    failure = diagnose(errors, {0: received(0), 1: received(1)}, TIMEOUT, ALIVE)
    assert (failure.kind, failure.rank) == (ExitCode.WORKER_ERROR, 1)
    assert failures.is_caused_by_peer(error)


@pytest.mark.parametrize(
    ("error", "kind", "words"),
    [
        (
            RayActorError(error_msg="The actor died"),
            ExitCode.WORKER_KILLED,
            "run's controller is gone",
        ),
        (OutOfMemoryError("low"), ExitCode.OUT_OF_MEMORY, "killed the run's controller"),
        (MemoryError("array"), ExitCode.OUT_OF_MEMORY, "MemoryError: array"),
        (UserError("no such bucket"), ExitCode.USER_ERROR, "no such bucket"),
        (ValueError("first\nlast"), ExitCode.WORKER_ERROR, "ValueError: last"),
    ],
)
def test_the_end_of_the_controller_is_explained(
    error: Exception, kind: ExitCode, words: str
) -> None:
    failure = diagnose_controller(error, 7)
    assert (failure.kind, failure.rank, failure.step) == (kind, None, 7)
    assert words in failure.reason


def test_a_lost_connection_leads_to_the_rank_that_is_gone() -> None:
    both = {0: received(0), 1: received(1)}
    assert diagnose({0: GLOO_CLOSED}, both, TIMEOUT, GONE)[:3] == (
        ExitCode.WORKER_KILLED,
        "process 101 got signal 9 (SIGKILL)",
        1,
    )
    assert diagnose({0: GLOO_CLOSED}, both, TIMEOUT, found(None)).kind is ExitCode.LOST_NODE
    failure = diagnose({0: GLOO_CLOSED}, both, TIMEOUT, ALIVE)
    assert failure.kind is ExitCode.WORKER_ERROR
    assert "Connection closed by peer" in failure.reason


@pytest.mark.parametrize(
    ("ranks", "name"),
    [
        (
            [received(0), received(1, phase="waiting for data")],
            "rank 1 hangs at 'waiting for data'",
        ),
        (
            [received(0), received(1, age_s=500)],
            "rank 1 hangs at 'generator step', its process has been silent",
        ),
        ([received(0, phase="validating"), received(1)], "rank 0 hangs at 'validating'"),
        ([received(0, step=6), received(1)], "rank 0 hangs"),
        ([received(0), received(1)], "rank 0 hangs at 'generator step'; so do ranks 1"),
    ],
)
def test_a_timeout_names_the_rank_that_hangs(ranks: list[ReceivedHeartbeat], name: str) -> None:
    heartbeats = {h.heartbeat.rank: h for h in ranks}
    failure = diagnose({0: GLOO_TIMEOUT}, heartbeats, TIMEOUT, ALIVE)
    assert failure.kind is ExitCode.HANG
    assert failure.reason.startswith(name)


def test_a_rank_that_ended_itself_because_it_hung_is_a_timeout() -> None:
    heartbeat = received(1).heartbeat._replace(phase_seconds=TIMEOUT)
    failure = diagnose(
        {1: died()}, {0: received(0), 1: ReceivedHeartbeat(heartbeat, 0.1)}, TIMEOUT, GONE
    )
    assert failure.kind is ExitCode.HANG


def a(kind: ExitCode, step: int, reason: str = "reason") -> Failure:
    return Failure(kind, reason, 1, "10.0.0.1", step)


def ends(policy: FailurePolicy, failure: Failure, started_from: int) -> bool:
    return policy.make_decision(failure, started_from) is FailureDecision.RAISE


@pytest.mark.parametrize(
    "kind",
    [
        ExitCode.USER_ERROR,
        ExitCode.BAD_DATA,
        ExitCode.DISK_FULL,
        ExitCode.HANG,
        ExitCode.NOT_FINITE,
        ExitCode.SUPERSEDED,
    ],
)
def test_what_would_fail_again_is_not_retried(kind: ExitCode) -> None:
    assert ends(FailurePolicy(max_failures=3), a(kind, 5), started_from=0)


def test_the_same_error_at_the_same_step_is_not_retried_forever() -> None:
    policy = FailurePolicy(max_failures=100)
    assert not ends(policy, a(ExitCode.WORKER_ERROR, 5, "ValueError: at 0x123"), started_from=0)
    assert ends(policy, a(ExitCode.WORKER_ERROR, 5, "ValueError: at 0x456"), started_from=0)
    policy = FailurePolicy(max_failures=100)
    for step in (5, 6, 7):
        assert not ends(policy, a(ExitCode.WORKER_ERROR, step), started_from=0)
    for _ in range(3):
        assert not ends(policy, a(ExitCode.WORKER_KILLED, 7), started_from=0), (
            "a signal comes from outside"
        )


def test_errors_of_a_gpu_are_the_same_only_if_their_texts_are() -> None:
    def failure(words: str) -> Failure:
        return diagnose({0: cuda(words)}, {0: received(0)}, TIMEOUT, ALIVE)

    illegal, ecc = "an illegal memory access was encountered", "uncorrectable ECC error encountered"
    policy = FailurePolicy(max_failures=100)
    assert not ends(policy, failure(illegal), started_from=0)
    assert not ends(policy, failure(ecc), started_from=0)
    assert not ends(policy, failure(ecc), started_from=0), "another GPU may do better"
    assert not ends(policy, failure(illegal), started_from=0)
    assert ends(policy, failure(illegal), started_from=0)


def test_failures_without_progress_are_counted_and_preemptions_never() -> None:
    policy = FailurePolicy(max_failures=2)
    for start in range(0, 100, 10):
        assert not ends(policy, a(ExitCode.WORKER_KILLED, start + 5), started_from=start)
    for _ in range(10):
        assert not ends(policy, a(ExitCode.PREEMPTED, 95), started_from=90)
    assert not ends(policy, a(ExitCode.LOST_NODE, 95), started_from=90)
    assert ends(policy, a(ExitCode.LOST_NODE, 96), started_from=90)
    assert ends(FailurePolicy(max_failures=0), a(ExitCode.WORKER_KILLED, 1), started_from=0)


def test_the_explanation_is_one_line_with_the_command_that_resumes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    words = ["train", "my config.yaml", "name=vox", "train.workers=1..4"]
    monkeypatch.setattr(sys, "argv", ["/opt/venv/bin/prioritycut", *words])
    error = explain("vox", a(ExitCode.OUT_OF_MEMORY, 480, "killed"), "/runs/vox/step_0000400")
    message = str(error)
    assert message.startswith(
        "run 'vox' ended: out of memory: killed (rank 1, node 10.0.0.1, step 480); "
    )
    assert "train.batch_size" in message
    assert "last checkpoint: /runs/vox/step_0000400; resume with: prioritycut train " in message
    assert "\n" not in message
    command = message.partition("resume with: ")[2]
    assert shlex.split(command) == ["prioritycut", *words]
    assert error.exit_code == 71
