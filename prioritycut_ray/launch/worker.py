"""The worker's side of a run: the train function, and what it reports."""

import logging
import signal
import tempfile
import time
from collections.abc import Mapping
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import ray
import ray.train.torch
from ray.train.collective import barrier, broadcast_from_rank_zero
from ray.train.v2._internal.execution.callback import WorkerCallback

from prioritycut_ray.config import Config, parse_config
from prioritycut_ray.data.shards import read_index
from prioritycut_ray.errors import NotFiniteError, Preempted
from prioritycut_ray.launch.crash_evidence import record_crashes
from prioritycut_ray.launch.failures import (
    is_of_a_peer,
)
from prioritycut_ray.launch.heartbeat import (
    HeartbeatThread,
    terminated,
)
from prioritycut_ray.runs.attempts import claim_run
from prioritycut_ray.runs.checkpoints import fetch, newest_intact
from prioritycut_ray.runs.retention import Retention
from prioritycut_ray.runs.writer import RunWriter
from prioritycut_ray.storage.folder import Folder
from prioritycut_ray.training.checkpoint import take_snapshot, write_snapshot
from prioritycut_ray.training.state import TrainState
from prioritycut_ray.training.worker import Worker, WorkerStatus

KEEP_FREED_MEMORY = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(2**62),
}
"""For glibc of a worker: what is freed serves the next allocation, also in the training thread.

Else a step's large tensors come as new pages from the kernel each time: a seventh of its CPU time.
"""


DETERMINISTIC_CUBLAS = {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
"""For a worker with ``train.deterministic``: eight workspaces of 4 MiB, none shared by streams."""


_PATIENCE_WITH_PEERS_S = 5.0
"""A rank that lost its peers waits so long, for the dead one's own story to come first."""


HANG_MARGIN_S = 30.0
"""The collectives of the other ranks time out first; what is still then ends itself."""


def worker_environment(config: Config) -> dict[str, str]:
    """Variables that must be there before a worker starts."""
    return KEEP_FREED_MEMORY | (DETERMINISTIC_CUBLAS if config.train.deterministic else {})


def train_on_worker(arguments: dict[str, Any]) -> None:
    """The train function of every Ray Train worker."""
    # Here, for driver and controller need neither torchvision nor timm: seconds of imports each.
    from prioritycut_ray.training.trainer import train

    config = parse_config(arguments["config"], "train_loop_config")
    context = ray.train.get_context()
    worker = Worker(
        rank=context.get_world_rank(),
        world_size=context.get_world_size(),
        device=ray.train.torch.get_device(),
    )
    monitor, status = arguments["monitor"], WorkerStatus()
    logging.getLogger("prioritycut_ray").addHandler(_ForwardWarnings(monitor, worker.rank))
    record_crashes()

    index = read_index(config.data.index or config.data.url)
    with tempfile.TemporaryDirectory(prefix="prioritycut-") as scratch:
        patience = config.train.collective_timeout_s + HANG_MARGIN_S
        with HeartbeatThread(monitor, status, worker.rank, patience):
            writer, checkpoint = _begin(config, arguments["launch"], worker.rank, Path(scratch))
            with writer or nullcontext():
                try:
                    train(
                        config,
                        index,
                        worker=worker,
                        writer=writer,
                        checkpoint=checkpoint,
                        report=partial(_report, config, index.fingerprint, writer),
                        status=status,
                    )
                except (Preempted, NotFiniteError):  # raised by all ranks at one step
                    if writer:
                        writer.flush()
                    barrier()  # Ray ends all ranks when one has ended
                    raise
                except Exception as error:
                    if is_of_a_peer(error):
                        time.sleep(_PATIENCE_WITH_PEERS_S)
                    raise


def _begin(
    config: Config, launch: str, rank: int, scratch: Path
) -> tuple[RunWriter | None, Path | None]:
    """Take the run over from older attempts; all ranks begin at the checkpoint that rank 0 finds.

    Returns:
        The hand in the run's folder, on rank 0 alone, and the checkpoint, if there is one.
    """
    storage = Folder(config.run)
    if rank != 0:
        step = broadcast_from_rank_zero(None)
        return None, None if step is None else fetch(storage, step, scratch)
    claim = claim_run(storage, launch, first=False)
    step, checkpoint = newest_intact(storage, scratch) or (None, None)
    options = config.train
    writer = RunWriter(
        claim,
        start=step or 0,
        retention=Retention(options.keep_checkpoints, options.keep_best, options.keep_every),
        metric=options.best_metric,
    )
    broadcast_from_rank_zero(step)
    return writer, checkpoint


def _report(
    config: Config,
    data: str,
    writer: RunWriter | None,
    metrics: Mapping[str, float],
    state: TrainState | None,
) -> None:
    """Begin to write a checkpoint, if there is a state, and hand metrics to Ray.

    Ray is not told of checkpoints. It would list them in the run's folder, and refuse to start
    where one of its list is gone: removed by retention, or by another attempt.
    """
    if state is not None and writer is not None:
        writer.wait()  # before the copy: there are at most two states in memory
        write = partial(write_snapshot, take_snapshot(state, config, data))
        writer.save(state.step, metrics, write)
    ray.train.report(dict(metrics))


class _ForwardWarnings(logging.Handler):
    """Passes a worker's warnings to the driver."""

    def __init__(self, monitor: Any, rank: int) -> None:
        super().__init__(logging.WARNING)
        self._monitor, self._rank = monitor, rank

    def emit(self, record: logging.LogRecord) -> None:
        """Called by the logger."""
        self._monitor.tell.remote(f"rank {self._rank}: {record.getMessage()}")


class NoteSigterm(WorkerCallback):  # type: ignore[misc]  # ray is untyped
    """Lets a worker that is told to go save first; the train function's thread cannot listen."""

    def after_init_train_context(self) -> None:
        """Called by Ray in the main thread of every worker."""
        signal.signal(signal.SIGTERM, lambda *_: terminated.set())
