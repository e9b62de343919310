"""Ray Train around the trainer: the same run on a laptop and on a cluster."""

import os
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import ray
import ray.train.torch
from ray import PlacementGroupID
from ray.exceptions import RayError
from ray.train import (
    ControllerError,
    FailureConfig,
    LoggingConfig,
    RunConfig,
    ScalingConfig,
)
from ray.train.torch import TorchConfig, TorchTrainer
from ray.util.placement_group import PlacementGroup, remove_placement_group

from prioritycut_ray.config import Config
from prioritycut_ray.data.shards import clips_of, read_index
from prioritycut_ray.errors import ExitCode, UserError
from prioritycut_ray.launch.failures import (
    Failure,
    RunEnded,
    diagnose_controller,
    explain,
)
from prioritycut_ray.launch.heartbeat import (
    Heartbeat,
    all_beats,
    ask,
    furthest_step,
    start_monitor,
    started_from,
)
from prioritycut_ray.launch.preflight import check_nodes
from prioritycut_ray.launch.retry import RetryPolicy
from prioritycut_ray.launch.signals import StopSignals
from prioritycut_ray.launch.supervisor import Supervisor
from prioritycut_ray.launch.worker import (
    HANG_MARGIN_S,
    NoteSigterm,
    train_on_worker,
    worker_environment,
)
from prioritycut_ray.ray_cluster.filesystem import ray_storage
from prioritycut_ray.ray_cluster.resources import check_capacity, uses_gpu
from prioritycut_ray.ray_cluster.session import start_ray
from prioritycut_ray.runs.attempts import claim_run
from prioritycut_ray.runs.compatibility import check_resumable
from prioritycut_ray.runs.locate import (
    find_checkpoint,
    has_checkpoint,
)
from prioritycut_ray.storage.folder import Folder

Progress = Callable[[Mapping[str, float]], None]

_SECONDS_BETWEEN_RESIZES = 15.0
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
    monitor, launch_id = start_monitor(), uuid.uuid4().hex
    claim_run(Folder(config.run), launch_id, first=True)
    policy = RetryPolicy(config.train.max_failures)
    with StopSignals() as signals:
        while True:
            fit = _Fit(_trainer(config, monitor, launch_id))
            fit.start()
            try:
                _accompany(fit, monitor, config, signals, on_progress, on_warning)
                return config.run
            except (RayError, ControllerError) as error:
                beats = all_beats(monitor)
                failure = _failure(error, beats)
                # The controller decides what is tried again, unless it is what died.
                decided = isinstance(error, ControllerError) or bool(signals.received)
                if decided or policy.ends(failure, started_from(beats)):
                    raise explain(config.name, failure, _last_checkpoint(config)) from error
                on_warning(f"{failure}; starting again from the last checkpoint")
                _free_room(beats)
                monitor.forget.remote()


def _trainer(config: Config, monitor: Any, launch: str) -> TorchTrainer:
    fewest, most = config.train.worker_range
    folder, filesystem = ray_storage(Folder(config.storage))
    # Ray watches the whole process: a frozen one is as dead as one whose training thread hangs.
    patience = str(config.train.collective_timeout_s + 2 * HANG_MARGIN_S)
    os.environ["RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S"] = patience
    return TorchTrainer(
        train_on_worker,
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
            # Which failures are tried again is decided by Supervisor.
            failure_config=FailureConfig(max_failures=-1),
            callbacks=[Supervisor(monitor, config), NoteSigterm()],
            logging_config=LoggingConfig(log_level="WARNING"),
            worker_runtime_env={"env_vars": worker_environment(config)},
        ),
    )


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
    step = furthest_step(all_beats(monitor))
    return ControllerError(RunEnded(Failure(ExitCode.PREEMPTED, reason, None, "", step)))


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


def _failure(error: RayError | ControllerError, beats: Iterable[Heartbeat]) -> Failure:
    """What Ray's controller ended with, or of, in our terms."""
    cause = getattr(error, "controller_failure", error)
    if isinstance(cause, RunEnded):
        return cause.failure
    return diagnose_controller(cause, furthest_step(beats))


def _free_room(beats: Iterable[Heartbeat]) -> None:
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
