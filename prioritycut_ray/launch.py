"""Ray Train around the trainer: the same run on a laptop and on a cluster."""

import logging
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray
import ray.train.torch
from ray.exceptions import RayError
from ray.train import (
    Checkpoint,
    CheckpointConfig,
    FailureConfig,
    LoggingConfig,
    RunConfig,
    ScalingConfig,
    UserCallback,
    WorkerGroupError,
)
from ray.train.torch import TorchConfig, TorchTrainer
from ray.util.queue import Empty, Queue

from prioritycut_ray.checkpoint import (
    STEP_FORMAT,
    find_checkpoint,
    has_checkpoint,
    read_config,
    save_checkpoint,
)
from prioritycut_ray.config import Config, changed_keys, parse_config
from prioritycut_ray.data.shards import clips_of, read_index
from prioritycut_ray.errors import UserError
from prioritycut_ray.ray_session import start_ray
from prioritycut_ray.state import TrainState
from prioritycut_ray.trainer import train
from prioritycut_ray.worker import Worker

Progress = Callable[[Mapping[str, float]], None]

_COLLECTIVE_TIMEOUT_S = 600


def launch(config: Config, on_progress: Progress, on_warning: Callable[[str], None]) -> Path:
    """Train by Ray Train, resuming the run of the same name if there is one.

    Args:
        config: the resolved configuration, with absolute paths.
        on_progress: called in this process with every report's metrics.
        on_warning: called in this process with every warning of a worker.

    Returns:
        The folder of the run.

    Raises:
        UserError: the data, the configuration or an older run of this name does not fit.
    """
    run = Path(config.storage) / config.name
    clips_of(read_index(config.data.url), config.data.split)
    if has_checkpoint(run):
        check_resumable(config, run)
    start_ray()
    check_capacity(config)
    queue = Queue(actor_options={"num_cpus": 0})
    trainer = TorchTrainer(
        _train_on_worker,
        train_loop_config={"config": config.model_dump(mode="json"), "queue": queue},
        scaling_config=ScalingConfig(
            num_workers=config.train.workers,
            use_gpu=uses_gpu(config),
            resources_per_worker={"CPU": config.train.cpus_per_worker},
        ),
        torch_config=TorchConfig(
            backend="nccl" if uses_gpu(config) else "gloo", timeout_s=_COLLECTIVE_TIMEOUT_S
        ),
        run_config=RunConfig(
            name=config.name,
            storage_path=config.storage,
            failure_config=FailureConfig(max_failures=config.train.max_failures),
            checkpoint_config=CheckpointConfig(num_to_keep=config.train.keep_checkpoints),
            callbacks=[_ForwardReports(queue)],
            logging_config=LoggingConfig(log_level="WARNING"),
        ),
    )
    try:
        with _forwarding(queue, on_progress, on_warning):
            trainer.fit()
    except WorkerGroupError as error:
        raise _as_user_error(error, config) from error
    finally:
        queue.shutdown()
    return run


def check_capacity(config: Config) -> None:
    """Refuse a run that would wait for ever for more CPUs than the cluster has.

    Raises:
        UserError: saying what is asked for and what there is.
    """
    wanted = config.train.workers * config.train.cpus_per_worker
    available = int(ray.cluster_resources().get("CPU", 0))
    if wanted > available:
        raise UserError(
            f"train.workers={config.train.workers} × train.cpus_per_worker="
            f"{config.train.cpus_per_worker} needs {wanted} CPUs, the cluster has {available}: "
            "lower one of them or join a larger cluster with RAY_ADDRESS"
        )


def uses_gpu(config: Config) -> bool:
    """Whether the workers train on GPUs: as asked for, or if there are enough.

    Raises:
        UserError: GPUs were asked for and the cluster lacks them.
    """
    available = int(ray.cluster_resources().get("GPU", 0))
    if config.train.use_gpu == "yes" and available < config.train.workers:
        raise UserError(
            f"train.use_gpu=yes with train.workers={config.train.workers}, but the cluster has "
            f"{available} GPUs: lower train.workers or set train.use_gpu=auto"
        )
    return config.train.use_gpu != "no" and available >= config.train.workers


def check_resumable(config: Config, run: Path) -> None:
    """Refuse to continue a run under a configuration that would change what it computes.

    A run that was imported and has not trained yet may be trained in any way that fits it.

    Raises:
        UserError: naming the keys that differ.
    """
    directory = find_checkpoint(run)
    changed = changed_keys(read_config(directory), config)
    if directory.name == STEP_FORMAT.format(0):
        changed = [key for key in changed if key.startswith(_NETWORKS)]
    changed = [key for key in changed if not key.startswith(_MAY_CHANGE)]
    if changed:
        raise UserError(
            f"{run}: the run exists with other values of {', '.join(changed)}; give those back to "
            "resume it, or another name=... to start afresh"
        )


_NETWORKS = ("model.", "discriminator.", "data.size")
"""Keys that determine the shapes of the weights."""
_MAY_CHANGE = (
    "data.loader_workers",
    "train.samples",
    "train.workers",
    "train.cpus_per_worker",
    "train.use_gpu",
    "train.log_every",
    "train.image_every",
    "train.checkpoint_every",
    "train.keep_checkpoints",
    "train.max_failures",
)
"""Keys that a resumed run may change: its length, its rhythm, and where it runs."""


def _train_on_worker(arguments: dict[str, Any]) -> None:
    """The train function of every Ray Train worker."""
    config = parse_config(arguments["config"], "train_loop_config")
    context = ray.train.get_context()
    worker = Worker(
        rank=context.get_world_rank(),
        world_size=context.get_world_size(),
        device=ray.train.torch.get_device(),
    )

    handler = _ForwardWarnings(arguments["queue"], worker.rank)
    logging.getLogger("prioritycut_ray").addHandler(handler)

    def report(metrics: Mapping[str, float], state: TrainState | None) -> None:
        if state is None or worker.rank != 0:
            name = None if state is None else STEP_FORMAT.format(state.step)
            ray.train.report(dict(metrics), checkpoint_dir_name=name)
            return
        with tempfile.TemporaryDirectory() as folder:
            save_checkpoint(state, config, Path(folder))
            ray.train.report(
                dict(metrics),
                checkpoint=Checkpoint.from_directory(folder),
                checkpoint_dir_name=STEP_FORMAT.format(state.step),
            )

    run = Path(config.storage, config.name)
    train(
        config,
        read_index(config.data.url),
        worker=worker,
        tensorboard=run / "tensorboard",
        checkpoint=find_checkpoint(run) if has_checkpoint(run) else None,
        report=report,
    )


class _ForwardWarnings(logging.Handler):
    """Passes a worker's warnings to the driver."""

    def __init__(self, queue: Queue, rank: int) -> None:
        super().__init__(logging.WARNING)
        self._queue, self._rank = queue, rank

    def emit(self, record: logging.LogRecord) -> None:
        """Called by the logger."""
        self._queue.put_nowait(f"rank {self._rank}: {record.getMessage()}")


class _ForwardReports(UserCallback):  # type: ignore[misc]  # ray is untyped
    """Passes rank 0's metrics from Ray's controller process to the driver."""

    def __init__(self, queue: Queue) -> None:
        self._queue = queue

    def after_report(
        self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Checkpoint | None
    ) -> None:
        """Called by Ray when all workers have reported."""
        self._queue.put_nowait(metrics[0])


@contextmanager
def _forwarding(
    queue: Queue, on_progress: Progress, on_warning: Callable[[str], None]
) -> Iterator[None]:
    """Pass on what arrives on the queue, metrics and warnings, while the body runs."""
    finished = threading.Event()

    def forward() -> None:
        while True:
            last_round = finished.is_set()
            try:
                while True:
                    item = queue.get(timeout=0.5)
                    if isinstance(item, str):
                        on_warning(item)
                    else:
                        on_progress(item)
            except Empty:
                if last_round:
                    return
            except RayError:  # the cluster is gone; fit() says why
                return

    thread = threading.Thread(target=forward, name="progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        finished.set()
        thread.join()


def _as_user_error(error: WorkerGroupError, config: Config) -> UserError:
    """One line on why a run failed, and how to go on."""
    rank, cause = min(error.worker_failures.items(), key=lambda item: item[0])
    for other_rank, failure in error.worker_failures.items():
        if isinstance(failure, UserError):
            rank, cause = other_rank, failure
    lines = str(cause).strip().splitlines() or [type(cause).__name__]
    reason = str(cause) if isinstance(cause, UserError) else f"{type(cause).__name__}: {lines[-1]}"
    return UserError(
        f"run {config.name!r} failed on rank {rank}: {reason}; the same command resumes it from "
        f"its last checkpoint in {Path(config.storage) / config.name}"
    )
