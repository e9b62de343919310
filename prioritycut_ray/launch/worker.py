"""The worker's side of a run: the train function and its reports."""

import math
import signal
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import ray
import ray.train.torch
import torch
from ray.train.collective import barrier, broadcast_from_rank_zero

from prioritycut_ray.config import Config, parse_config
from prioritycut_ray.data.index import ClipIndex, read_index
from prioritycut_ray.errors import NotFiniteError, Preempted
from prioritycut_ray.launch.crash_evidence import record_crashes
from prioritycut_ray.launch.failures import is_caused_by_peer
from prioritycut_ray.launch.heartbeat import HeartbeatMonitor, HeartbeatThread, terminated
from prioritycut_ray.runs.attempts import claim_run
from prioritycut_ray.runs.checkpoints import fetch, steps
from prioritycut_ray.runs.writer import RunWriter
from prioritycut_ray.storage.folder import Folder
from prioritycut_ray.training.run import forwarded_warnings, new_writer, open_run, save_state
from prioritycut_ray.training.state import TrainState
from prioritycut_ray.training.validation import Validator
from prioritycut_ray.training.worker import (
    DETERMINISTIC_CUBLAS,
    SAVED,
    SAVING,
    Worker,
    WorkerStatus,
)

KEEP_FREED_MEMORY = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(2**62),
}
"""Makes glibc keep freed memory for the next allocation, in the training thread too.

Otherwise the kernel provides new pages for the large tensors of every step: a seventh of its CPU
time.
"""

RESCUE_DELAY_S = 3.0
"""A rank whose last heartbeat is older is taken for dead when the state must be saved."""

_PEER_ERROR_DELAY_S = 5.0
"""A rank that lost a peer waits this long, so that the cause is reported before the consequence."""

HANG_MARGIN_S = 30.0
"""Collectives of the other ranks time out first; a rank that still hangs then ends itself."""


def worker_environment(config: Config) -> dict[str, str]:
    """Return the environment variables that a worker needs when it starts."""
    return KEEP_FREED_MEMORY | (DETERMINISTIC_CUBLAS if config.train.deterministic else {})


def train_on_worker(arguments: dict[str, Any]) -> None:
    """The train function of every Ray Train worker."""
    # Not at the top: driver and controller do without torchvision and timm, which take seconds.
    from prioritycut_ray.training.trainer import train

    config = parse_config(arguments["config"], "train_loop_config")
    context = ray.train.get_context()
    worker = Worker(
        rank=context.get_world_rank(),
        world_size=context.get_world_size(),
        device=ray.train.torch.get_device(),
    )
    monitor: HeartbeatMonitor = arguments["monitor"]
    status = WorkerStatus()
    record_crashes()

    index = read_index(config.data.index or config.data.url, cache_dir=config.data.cache_dir)
    with (
        forwarded_warnings(lambda text: monitor.send_message(f"rank {worker.rank}: {text}")),
        tempfile.TemporaryDirectory(prefix="prioritycut-") as scratch,
    ):
        timeout_s = config.train.collective_timeout_s + HANG_MARGIN_S
        with HeartbeatThread(monitor, status, worker.rank, timeout_s):
            writer, checkpoint = _begin(config, arguments["launch"], worker.rank, Path(scratch))
            save = partial(_save_alone, config, index.fingerprint, arguments["launch"], writer)
            rescue = partial(_rescue, monitor, status, worker, save)
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
                        validator=_validator(config, index, worker.device),
                        on_verdict=monitor.send_message,
                        on_failure=rescue,
                    )
                except (Preempted, NotFiniteError):  # raised by all ranks at the same step
                    if writer:
                        writer.flush()
                    barrier()  # Ray ends all ranks when one has ended
                    raise
                except Exception as error:
                    if is_caused_by_peer(error):
                        time.sleep(_PEER_ERROR_DELAY_S)
                    raise


def _begin(
    config: Config, launch: str, rank: int, scratch: Path
) -> tuple[RunWriter | None, Path | None]:
    """Take the run over from older attempts; all ranks start from the checkpoint of rank 0.

    Returns:
        The writer of the run's folder, on rank 0 only, and the checkpoint, if there is one.
    """
    folder = Folder(config.run)
    if rank != 0:
        step = broadcast_from_rank_zero(None)
        return None, None if step is None else fetch(folder, step, scratch)
    claim = claim_run(folder, launch, first=False)
    writer, step, checkpoint = open_run(config, claim, scratch)
    broadcast_from_rank_zero(step)
    return writer, checkpoint


def _report(
    config: Config,
    data: str,
    writer: RunWriter | None,
    metrics: Mapping[str, float],
    state: TrainState | None,
) -> None:
    """Start writing a checkpoint, if there is a state, and report the metrics to Ray.

    Checkpoints are not reported to Ray: it would list them in the run's folder, and refuse to start
    when one on its list has been removed, by retention or by another attempt.
    """
    if state is not None and writer is not None:
        save_state(writer, state, metrics, config, data)
    ray.train.report(dict(metrics))


def _validator(config: Config, index: ClipIndex, device: torch.device) -> Validator | None:
    if not config.train.validate_every:
        return None
    from prioritycut_ray.launch.validation import validator_of  # the metrics take seconds to import

    return validator_of(config, index, device)


def _rescue(
    monitor: HeartbeatMonitor,
    status: WorkerStatus,
    worker: Worker,
    save: Callable[[TrainState], None],
    state: TrainState,
    error: Exception,
) -> None:
    """Save the last whole step if only another rank has failed; every rank has the whole state.

    The lowest rank that is alive saves. On GPUs, NCCL ends the process instead.
    """
    if not is_caused_by_peer(error) or state.step == status.started_from:
        return
    if worker.rank > 0:
        time.sleep(RESCUE_DELAY_S)
        ages = {rank: received.age_s for rank, received in monitor.heartbeats().items()}
        if any(ages.get(rank, math.inf) < RESCUE_DELAY_S for rank in range(worker.rank)):
            return
    status.mark(state.step, SAVING)
    try:
        save(state)
    except Exception as failed:
        monitor.send_message(f"rank {worker.rank}: could not save for a lost rank: {failed}")
        return
    monitor.send_message(f"rank {worker.rank}: saved at step {state.step} for a lost rank")
    status.mark(state.step, SAVED)


def _save_alone(
    config: Config, data: str, launch: str, writer: RunWriter | None, state: TrainState
) -> None:
    """Write a checkpoint, and wait for it; a rank other than 0 first takes the run over."""
    if writer is None:
        writer = new_writer(config, claim_run(Folder(config.run), launch, first=False), state.step)
    if state.step not in steps(writer.folder):
        save_state(writer, state, {}, config, data)
    writer.flush()


def note_sigterm() -> None:
    """Make SIGTERM request a stop; called in a worker's main thread.

    The train function runs in another thread, where Python allows no signal handlers.
    """
    signal.signal(signal.SIGTERM, lambda *_: terminated.set())
