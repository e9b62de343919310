"""Ray Train around the trainer: the same run on a laptop and on a cluster."""

import logging
import os
import signal
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import ray
import ray.train.torch
from pyarrow.fs import FSSpecHandler, PyFileSystem
from ray import PlacementGroupID
from ray.exceptions import RayError
from ray.train import (
    Checkpoint,
    ControllerError,
    FailureConfig,
    LoggingConfig,
    RunConfig,
    ScalingConfig,
    UserCallback,
)
from ray.train.collective import barrier, broadcast_from_rank_zero
from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.v2._internal.execution.callback import WorkerCallback
from ray.util.placement_group import PlacementGroup, remove_placement_group

from prioritycut_ray.checkpoint import (
    find_checkpoint,
    has_checkpoint,
    read_config,
    read_progress,
    take_snapshot,
    write_snapshot,
)
from prioritycut_ray.config import NETWORK_KEYS, Config, changed_keys, parse_config
from prioritycut_ray.data.shards import clips_of, read_index
from prioritycut_ray.errors import NotFiniteError, Preempted, UserError
from prioritycut_ray.failures import (
    Failure,
    Kind,
    RetryPolicy,
    RunEnded,
    diagnose,
    diagnose_controller,
    examine,
    explain,
    is_of_a_peer,
)
from prioritycut_ray.interrupts import StopSignals
from prioritycut_ray.monitor import (
    Beat,
    Heard,
    Heart,
    ask,
    record_crashes,
    start_monitor,
    terminated,
)
from prioritycut_ray.preflight import check_nodes
from prioritycut_ray.ray_session import grows, room, start_ray
from prioritycut_ray.run_storage import STEP_FORMAT, Retention, RunStorage, claim
from prioritycut_ray.run_writer import RunWriter
from prioritycut_ray.state import TrainState
from prioritycut_ray.worker import Pulse, Worker

Progress = Callable[[Mapping[str, float]], None]

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
_SECONDS_BETWEEN_RESIZES = 15.0
_PATIENCE_WITH_PEERS_S = 5.0
"""A rank that lost its peers waits so long, for the dead one's own story to come first."""
_HANG_MARGIN_S = 30.0
"""The collectives of the other ranks time out first; what is still then ends itself."""
_SECONDS_BETWEEN_LOOKS = 5.0
_SECONDS_BEFORE_WAITING_IS_TOLD = 60.0


def launch(config: Config, on_progress: Progress, on_warning: Callable[[str], None]) -> str:
    """Train by Ray Train, resuming the run of the same name if there is one.

    Args:
        config: the resolved configuration, with absolute paths.
        on_progress: called in this process with every report's metrics.
        on_warning: called in this process with every warning of a worker.

    Returns:
        Path or URL of the run's folder.

    SIGTERM or Ctrl-C makes the workers save at the step they are in and end; a second Ctrl-C, or
    the end of ``train.grace_seconds``, ends the run at once. A second SIGTERM changes nothing:
    Kubernetes sends two to a job that it deletes.

    Raises:
        UserError: the data, the configuration or an older run of this name does not fit.
        RunFailed: the run ended before its time; says why and how to resume.
    """
    index = read_index(config.data.index or config.data.url)
    clips_of(index, config.data.split)
    if has_checkpoint(config.run):
        check_resumable(config, index.fingerprint)
    start_ray()
    check_capacity(config)
    check_nodes(config, on_warning)
    monitor, launch_id = start_monitor(), take_over(config)
    policy = RetryPolicy(config.train.max_failures)
    with StopSignals() as signals:
        while True:
            fit = _Fit(_trainer(config, monitor, launch_id))
            fit.start()
            try:
                _accompany(fit, monitor, config, signals, on_progress, on_warning)
                return config.run
            except (RayError, ControllerError) as error:
                beats = _beats(monitor)
                failure = _failure(error, beats)
                # The controller decides what is tried again, unless it is what died.
                decided = isinstance(error, ControllerError) or bool(signals.received)
                if decided or policy.ends(failure, _started_from(beats)):
                    raise explain(config.name, failure, _last_checkpoint(config)) from error
                on_warning(f"{failure}; starting again from the last checkpoint")
                _free_room(beats)
                monitor.forget.remote()


def take_over(config: Config) -> str:
    """Make an older attempt that still trains this run stop; gives the id of this launch."""
    launch = uuid.uuid4().hex
    claim(RunStorage(config.run), launch, first=True)
    return launch


def _trainer(config: Config, monitor: Any, launch: str) -> TorchTrainer:
    fewest, most = config.train.worker_range
    folder, filesystem = ray_storage(RunStorage(config.storage))
    # Ray watches the whole process: a frozen one is as dead as one whose training thread hangs.
    patience = str(config.train.collective_timeout_s + 2 * _HANG_MARGIN_S)
    os.environ["RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S"] = patience
    return TorchTrainer(
        _train_on_worker,
        train_loop_config={
            "config": config.model_dump(mode="json"),
            "monitor": monitor,
            "launch": launch,
        },
        scaling_config=ScalingConfig(
            num_workers=fewest if fewest == most else (fewest, most),
            use_gpu=uses_gpu(config),
            resources_per_worker={"CPU": config.train.cpus_per_worker},
            elastic_resize_monitor_interval_s=_SECONDS_BETWEEN_RESIZES,
        ),
        torch_config=TorchConfig(
            backend="nccl" if uses_gpu(config) else "gloo",
            timeout_s=config.train.collective_timeout_s,
        ),
        run_config=RunConfig(
            name=config.name,
            storage_path=folder,
            storage_filesystem=filesystem,
            # Which failures are tried again is decided by _Supervisor.
            failure_config=FailureConfig(max_failures=-1),
            callbacks=[_Supervisor(monitor, config), _NoteSigterm()],
            logging_config=LoggingConfig(log_level="WARNING"),
            worker_runtime_env={"env_vars": worker_environment(config)},
        ),
    )


def worker_environment(config: Config) -> dict[str, str]:
    """Variables that must be there before a worker starts."""
    return KEEP_FREED_MEMORY | (DETERMINISTIC_CUBLAS if config.train.deterministic else {})


def ray_storage(storage: RunStorage) -> tuple[str, PyFileSystem | None]:
    """A folder as Ray takes it: the path, and its file system unless that is of this machine."""
    if storage.local is not None:
        return str(storage.local), None
    return storage.root, PyFileSystem(FSSpecHandler(storage.fs))


def check_capacity(config: Config) -> None:
    """Refuse a run that would wait for ever for more CPUs than the cluster has.

    Raises:
        UserError: saying what is asked for and what there is.
    """
    wanted = config.train.worker_range[0] * config.train.cpus_per_worker
    available = int(room("CPU"))
    if wanted > available and not grows():
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
    available, wanted = int(room("GPU")), config.train.worker_range[0]
    if config.train.use_gpu == "yes" and available < wanted:
        if grows():
            return True
        raise UserError(
            f"train.use_gpu=yes with train.workers={config.train.workers}, but the cluster has "
            f"{available} GPUs: lower train.workers or set train.use_gpu=auto"
        )
    return config.train.use_gpu != "no" and available >= wanted


def check_resumable(config: Config, data: str) -> None:
    """Refuse to continue a run under a configuration or on data that would change its result.

    A run that was imported and has not trained yet may be trained in any way that fits it.

    Args:
        config: resolved.
        data: fingerprint of the data set.

    Raises:
        UserError: naming the keys that differ.
    """
    directory, run = find_checkpoint(config.run), config.run
    trained_on = read_progress(directory).data
    if trained_on not in ("", data):
        raise UserError(
            f"{run}: the run was trained on other clips (fingerprint {trained_on[:12]}) than those "
            f"at data.url={config.data.url} (fingerprint {data[:12]}); give that data back to "
            "resume it, or another name=... to start afresh"
        )
    before = read_config(directory).model_dump(mode="json")
    changed = changed_keys(before, config.model_dump(mode="json"))
    if directory.name == STEP_FORMAT.format(0):
        changed = [key for key in changed if key.startswith(NETWORK_KEYS)]
    changed = [key for key in changed if not key.startswith(MAY_CHANGE)]
    if changed:
        raise UserError(
            f"{run}: the run exists with other values of {', '.join(changed)}; give those back to "
            "resume it, or another name=... to start afresh"
        )


MAY_CHANGE = (
    "storage",
    "data.url",
    "data.loader_workers",
    "data.decoder",
    "data.cache_dir",
    "data.cache_gb",
    "train.samples",
    "train.workers",
    "train.cpus_per_worker",
    "train.use_gpu",
    "train.log_every",
    "train.image_every",
    "train.checkpoint_every",
    "train.keep_",
    "train.best_metric",
    "train.max_failures",
    "train.grace_seconds",
    "train.collective_timeout_s",
)
"""Begins of keys that a resumed run may change: its length, its rhythm, and where things are."""


def _train_on_worker(arguments: dict[str, Any]) -> None:
    """The train function of every Ray Train worker."""
    # Here, for driver and controller need neither torchvision nor timm: seconds of imports each.
    from prioritycut_ray.trainer import train

    config = parse_config(arguments["config"], "train_loop_config")
    context = ray.train.get_context()
    worker = Worker(
        rank=context.get_world_rank(),
        world_size=context.get_world_size(),
        device=ray.train.torch.get_device(),
    )
    monitor, pulse = arguments["monitor"], Pulse()
    logging.getLogger("prioritycut_ray").addHandler(_ForwardWarnings(monitor, worker.rank))
    record_crashes()

    index = read_index(config.data.index or config.data.url)
    with tempfile.TemporaryDirectory(prefix="prioritycut-") as scratch:
        patience = config.train.collective_timeout_s + _HANG_MARGIN_S
        with Heart(monitor, pulse, worker.rank, patience):
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
                        pulse=pulse,
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
    storage = RunStorage(config.run)
    if rank != 0:
        step = broadcast_from_rank_zero(None)
        return None, None if step is None else storage.fetch(step, scratch)
    lease = claim(storage, launch, first=False)
    step, checkpoint = storage.newest_good(scratch) or (None, None)
    options = config.train
    writer = RunWriter(
        lease,
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


class _NoteSigterm(WorkerCallback):  # type: ignore[misc]  # ray is untyped
    """Lets a worker that is told to go save first; the train function's thread cannot listen."""

    def after_init_train_context(self) -> None:
        """Called by Ray in the main thread of every worker."""
        signal.signal(signal.SIGTERM, lambda *_: terminated.set())


class _Supervisor(UserCallback):  # type: ignore[misc]  # ray is untyped
    """In Ray's controller process: passes metrics on, and decides which failures end the run."""

    def __init__(self, monitor: Any, config: Config) -> None:
        self._monitor = monitor
        self._policy = RetryPolicy(config.train.max_failures)
        self._timeout_s = float(config.train.collective_timeout_s)
        self._heard: dict[int, Heard] = {}

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
        failure = diagnose(worker_exceptions, heard, self._timeout_s, examine)
        ends = self._policy.ends(failure, _started_from(h.beat for h in heard.values()))
        if ends or ask(self._monitor.stops.remote(), default=False):
            raise RunEnded(failure)
        self._monitor.tell.remote(f"{failure}; starting again from the last checkpoint")
        self._monitor.forget.remote()


class _Fit(threading.Thread):
    """Ray's blocking call in a thread of its own: the main thread minds signals and messages."""

    def __init__(self, trainer: TorchTrainer) -> None:
        super().__init__(name="fit", daemon=True)
        self._trainer = trainer
        self.error: BaseException | None = None

    def run(self) -> None:
        """Called by the thread."""
        try:
            self._trainer.fit()
        except BaseException as error:
            self.error = error


def _accompany(
    fit: _Fit,
    monitor: Any,
    config: Config,
    signals: StopSignals,
    on_progress: Progress,
    on_warning: Callable[[str], None],
) -> None:
    """Pass on messages and stop signals until the run has ended.

    Raises:
        RunEnded: the workers did not save within the grace period, or Ctrl-C came twice.
        Exception: what Ray ended with.
    """
    deadline = float("inf")
    waiting = _Waiting(config, on_warning)
    while fit.is_alive():
        fit.join(0.2)
        _deliver(monitor, on_progress, on_warning)
        waiting.look(monitor)
        if not signals.received:
            continue
        monitor.stop.remote()  # again and again: it may have been restarted meanwhile
        if deadline == float("inf"):
            deadline = time.monotonic() + config.train.grace_seconds
            first = signals.received[0]
            on_warning(f"{first}: saving at this step; a second Ctrl-C stops without saving")
        impatient = signals.received.count("SIGINT") > 1
        if impatient or time.monotonic() > deadline:
            why = "a second Ctrl-C" if impatient else "the grace period is over"
            raise _preempted(f"stopped without saving ({why})", monitor)
    _deliver(monitor, on_progress, on_warning)
    if fit.error is not None:
        raise fit.error


def _preempted(reason: str, monitor: Any) -> ControllerError:
    step = _furthest(_beats(monitor))
    return ControllerError(RunEnded(Failure(Kind.PREEMPTED, reason, None, "", step)))


def _deliver(monitor: Any, on_progress: Progress, on_warning: Callable[[str], None]) -> None:
    for message in ask(monitor.take.remote(), []):
        if isinstance(message, str):
            on_warning(message)
        else:
            on_progress(message)


class _Waiting:
    """Says it when no worker has run for a minute: the cluster may be too small now."""

    def __init__(self, config: Config, on_warning: Callable[[str], None]) -> None:
        self._config, self._on_warning = config, on_warning
        self._heard = self._looked = time.monotonic()

    def look(self, monitor: Any) -> None:
        """To be called often; asks the monitor every few seconds."""
        now = time.monotonic()
        if now - self._looked < _SECONDS_BETWEEN_LOOKS:
            return
        self._looked = now
        if ask(monitor.heard.remote(), {"unknown": None}):
            self._heard = now
        elif now - self._heard > _SECONDS_BEFORE_WAITING_IS_TOLD:
            self._heard = now
            free = ray.available_resources().get("CPU", 0)
            train = self._config.train
            self._on_warning(
                f"waiting for workers: {train.worker_range[0]} × {train.cpus_per_worker} CPUs are "
                f"wanted, {free:g} are free"
            )


def _failure(error: RayError | ControllerError, beats: Iterable[Beat]) -> Failure:
    """What Ray's controller ended with, or of, in our terms."""
    cause = getattr(error, "controller_failure", error)
    if isinstance(cause, RunEnded):
        return cause.failure
    return diagnose_controller(cause, _furthest(beats))


def _beats(monitor: Any) -> list[Beat]:
    heard: dict[int, Heard] = ask(monitor.heard.remote(), {})
    return [h.beat for h in heard.values()]


def _furthest(beats: Iterable[Beat]) -> int:
    return max((beat.step for beat in beats), default=0)


def _started_from(beats: Iterable[Beat]) -> int:
    return max((beat.started_from for beat in beats), default=0)


def _free_room(beats: Iterable[Beat]) -> None:
    """Give back what a dead controller held for these ranks.

    Ray leaves that to an actor which gives up where it meets a second Ray on its machine.
    """
    for group in {beat.group for beat in beats}:
        remove_placement_group(PlacementGroup(PlacementGroupID(bytes.fromhex(group))))


def _last_checkpoint(config: Config) -> str:
    try:
        return f"{config.run}/{find_checkpoint(config.run).name}"
    except UserError:
        return "none yet"
