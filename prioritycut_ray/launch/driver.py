"""The driver of a run: starts Ray Train, forwards its messages, and decides how it ends."""

import threading
import time
import uuid
from collections.abc import Callable, Mapping

import ray
from ray.exceptions import RayError
from ray.train import ControllerError, FailureConfig, LoggingConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer

from prioritycut_ray.config import Config
from prioritycut_ray.errors import ExitCode, UserError
from prioritycut_ray.launch.failures import Failure, RunEnded, diagnose_controller, explain
from prioritycut_ray.launch.heartbeat import (
    HeartbeatMonitor,
    ReceivedHeartbeat,
    furthest_step,
    start_monitor,
    started_from,
)
from prioritycut_ray.launch.preflight import check_nodes
from prioritycut_ray.launch.retry import FailureDecision, FailurePolicy
from prioritycut_ray.launch.signals import StopSignals
from prioritycut_ray.launch.supervisor import Supervisor
from prioritycut_ray.launch.worker import (
    HANG_MARGIN_S,
    note_sigterm,
    train_on_worker,
    worker_environment,
)
from prioritycut_ray.ray_cluster.compat import (
    call_in_workers,
    remove_placement_group_by_id,
    set_train_environment,
)
from prioritycut_ray.ray_cluster.filesystem import ray_storage
from prioritycut_ray.ray_cluster.resources import check_capacity, uses_gpu
from prioritycut_ray.ray_cluster.session import start_ray
from prioritycut_ray.runs.attempts import claim_run
from prioritycut_ray.runs.locate import find_checkpoint
from prioritycut_ray.storage.folder import Folder
from prioritycut_ray.training.run import check_run

OnProgress = Callable[[Mapping[str, float]], None]
OnWarning = Callable[[str], None]

_RESIZE_INTERVAL_S = 15.0
_WAIT_CHECK_INTERVAL_S = 5.0
_NOTICE_AFTER_S = 60.0


def launch(config: Config, on_progress: OnProgress, on_warning: OnWarning) -> str:
    """Train with Ray Train, resuming the run of the same name if there is one.

    SIGTERM or Ctrl-C makes the workers finish their step, save and stop. A second Ctrl-C, or the
    end of ``train.grace_seconds``, ends the run at once. A second SIGTERM has no effect: Kubernetes
    sends two when it deletes a job.

    Args:
        config: the resolved configuration, with absolute paths.
        on_progress: called in this process with the metrics of every report, and with the scores
            of every validation (``val/...``).
        on_warning: called in this process with every warning of a worker.

    Returns:
        Path or URL of the run's folder.

    Raises:
        UserError: the data, the configuration or an older run of this name does not fit.
        RunFailed: the run ended early; the message says why and how to resume.
    """
    check_run(config)
    start_ray()
    check_capacity(config)
    check_nodes(config, on_warning)
    monitor, launch_id = start_monitor(), uuid.uuid4().hex
    claim = claim_run(Folder(config.run), launch_id, first=True)
    if config.init is not None:
        from prioritycut_ray.launch.initial_weights import write_initial_weights  # imports torch

        write_initial_weights(config, claim, on_warning)
    policy = FailurePolicy(config.train.max_failures)
    with StopSignals() as signals:
        while True:
            fit = _FitThread(_build_trainer(config, monitor, launch_id))
            fit.start()
            try:
                _wait(fit, monitor, config, signals, on_progress, on_warning)
                return config.run
            except (RayError, ControllerError) as error:
                received = monitor.heartbeats()
                failure = _diagnose(error, received)
                # Supervisor, in the controller, has decided, unless the controller itself died.
                decided = isinstance(error, ControllerError) or bool(signals.received)
                if decided or (
                    policy.make_decision(failure, started_from(received)) is FailureDecision.RAISE
                ):
                    raise explain(config.name, failure, _last_checkpoint(config)) from error
                on_warning(f"{failure}; restarting from the last checkpoint")
                _remove_placement_groups(received)
                monitor.forget_heartbeats()


def _build_trainer(config: Config, monitor: HeartbeatMonitor, launch_id: str) -> TorchTrainer:
    fewest, most = config.train.worker_range
    folder, filesystem = ray_storage(Folder(config.storage))
    # Ray checks the whole process: a frozen one counts like one whose training thread hangs.
    set_train_environment(config.train.collective_timeout_s + 2 * HANG_MARGIN_S)
    return TorchTrainer(
        train_on_worker,
        train_loop_config={
            "config": config.model_dump(mode="json"),
            "monitor": monitor,
            "launch": launch_id,
        },
        scaling_config=ScalingConfig(
            num_workers=fewest if fewest == most else (fewest, most),
            use_gpu=uses_gpu(config),
            resources_per_worker={"CPU": config.train.cpus_per_worker},
            elastic_resize_monitor_interval_s=_RESIZE_INTERVAL_S,
        ),
        torch_config=TorchConfig(
            backend="nccl" if uses_gpu(config) else "gloo",
            timeout_s=config.train.collective_timeout_s,
        ),
        run_config=RunConfig(
            name=config.name,
            storage_path=folder,
            storage_filesystem=filesystem,
            # Supervisor decides which failures are retried.
            failure_config=FailureConfig(max_failures=-1),
            callbacks=[Supervisor(monitor, config), call_in_workers(note_sigterm)],
            logging_config=LoggingConfig(log_level="WARNING"),
            worker_runtime_env={"env_vars": worker_environment(config)},
        ),
    )


class _FitThread(threading.Thread):
    """Runs Ray's blocking ``fit``; the main thread handles signals and messages meanwhile."""

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


def _wait(
    fit: _FitThread,
    monitor: HeartbeatMonitor,
    config: Config,
    signals: StopSignals,
    on_progress: OnProgress,
    on_warning: OnWarning,
) -> None:
    """Forward messages and stop signals until the run has ended.

    Raises:
        ControllerError: the workers did not save within the grace period, or Ctrl-C came twice.
        Exception: the error that ``fit`` raised.
    """
    deadline = float("inf")
    notice = WorkerWaitNotice(config, on_warning)
    while fit.is_alive():
        fit.join(0.2)
        _forward_messages(monitor, on_progress, on_warning)
        notice.update(monitor)
        if not signals.received:
            continue
        monitor.request_stop()  # every time: the actor may have been restarted
        if deadline == float("inf"):
            deadline = time.monotonic() + config.train.grace_seconds
            first = signals.received[0]
            on_warning(f"{first}: saving at this step; a second Ctrl-C stops without saving")
        interrupted_twice = signals.received.count("SIGINT") > 1
        if interrupted_twice or time.monotonic() > deadline:
            why = "a second Ctrl-C" if interrupted_twice else "the grace period is over"
            raise _stopped(f"stopped without saving ({why})", monitor)
    _forward_messages(monitor, on_progress, on_warning)
    if fit.error is not None:
        raise fit.error


def _stopped(reason: str, monitor: HeartbeatMonitor) -> ControllerError:
    step = furthest_step(monitor.heartbeats())
    return ControllerError(RunEnded(Failure(ExitCode.PREEMPTED, reason, None, "", step)))


def _forward_messages(
    monitor: HeartbeatMonitor, on_progress: OnProgress, on_warning: OnWarning
) -> None:
    for message in monitor.take_messages():
        if isinstance(message, str):
            on_warning(message)
        else:
            on_progress(message)


class WorkerWaitNotice:
    """Warns when no worker has run for a minute: the cluster may be too small now."""

    def __init__(self, config: Config, on_warning: OnWarning) -> None:
        self._config, self._on_warning = config, on_warning
        self._running_at = self._checked_at = time.monotonic()

    def update(self, monitor: HeartbeatMonitor) -> None:
        """Ask the monitor, at most every few seconds; call this often."""
        now = time.monotonic()
        if now - self._checked_at < _WAIT_CHECK_INTERVAL_S:
            return
        self._checked_at = now
        if not monitor.has_no_workers():
            self._running_at = now
        elif now - self._running_at > _NOTICE_AFTER_S:
            self._running_at = now
            free = ray.available_resources().get("CPU", 0)
            train = self._config.train
            self._on_warning(
                f"waiting for workers: {train.worker_range[0]} × {train.cpus_per_worker} CPUs are "
                f"needed, {free:g} are free"
            )


def _diagnose(
    error: RayError | ControllerError, received: Mapping[int, ReceivedHeartbeat]
) -> Failure:
    """Describe the error that ended Ray's controller as a failure of the run."""
    cause = error.controller_failure if isinstance(error, ControllerError) else error
    if isinstance(cause, RunEnded):
        return cause.failure
    return diagnose_controller(cause, furthest_step(received))


def _remove_placement_groups(received: Mapping[int, ReceivedHeartbeat]) -> None:
    """Free the resources that a dead controller reserved for these ranks.

    Ray leaves that to an actor, which gives up where a second Ray runs on its machine.
    """
    for group in {r.heartbeat.placement_group for r in received.values()}:
        remove_placement_group_by_id(group)


def _last_checkpoint(config: Config) -> str:
    try:
        return f"{config.run}/{find_checkpoint(config.run).name}"
    except UserError:
        return "none yet"
