"""Every use of a private part of Ray, with its reason. Checked with Ray 2.60.0.

No other module of the package reaches into Ray; tests/unit/ray_cluster/test_compat.py verifies
that, and has a test for each use below, which fails when a release of Ray changes what it relies
on. Ray Train and Ray Tune are imported inside functions: packing needs neither of them.
"""

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import ray
from ray import PlacementGroupID
from ray._common.utils import get_system_memory
from ray._private import ray_constants, worker
from ray._private.utils import get_used_memory
from ray.exceptions import AuthenticationError, OutOfMemoryError, RayActorError
from ray.util.placement_group import PlacementGroup, remove_placement_group

CHECKED_WITH = "2.60.0"

# Environment variables. Ray reads them when it starts something, not when it is imported.

CORE_ENVIRONMENT = {"RAY_USAGE_STATS_ENABLED": "0"}
"""Read by ``ray.init`` and by the dashboard that it starts. Ray collects usage data by default."""

LOCAL_ENVIRONMENT = {"RAY_gcs_rpc_server_reconnect_timeout_s": "10"}
"""Read by ``ray.init`` and by the processes that it starts, for a Ray on this machine alone.

A signal to the whole process group (``timeout``, SLURM, systemd) ends Ray before this process,
whose calls would wait 60 s for Ray to come back. Only the head of a cluster can come back.
"""

TRAIN_ENVIRONMENT = {
    # Else every line that a worker prints appears twice.
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    # With the default of 2 s, short runs take longer and dead workers are noticed later.
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    # Our monitor tells the workers of a draining node; Ray's watcher would wait, and count twice.
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    # A node that has just died still counts as ready: request other places soon.
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "30",
}
"""Read by Ray Train's controller and workers, to which ``fit`` passes them on."""

HEALTH_CHECK_TIMEOUT = "RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S"
"""Read like those above."""

TUNE_ENVIRONMENT = {
    # The only way to silence Tune's own output.
    "RAY_AIR_NEW_OUTPUT": "0",
    # The search reports in one line why a trial failed; the traceback is in its error.txt.
    "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",
}
"""Read by Ray Tune in the process that calls ``Tuner.fit``."""

JOB_STOP_WAIT = "RAY_JOB_STOP_WAIT_TIME_S"
"""Read by the supervisor of a Ray job: seconds between SIGTERM and SIGKILL (default 3)."""


def set_core_environment(*, local: bool) -> None:
    """Set what ``ray.init`` reads, unless the user has set it.

    Args:
        local: whether it starts Ray on this machine, rather than connecting to a cluster.
    """
    for name, value in (CORE_ENVIRONMENT | (LOCAL_ENVIRONMENT if local else {})).items():
        os.environ.setdefault(name, value)


def set_train_environment(health_check_timeout_s: float) -> None:
    """Set what ``TorchTrainer.fit`` reads; only the timeout replaces what the user has set.

    Args:
        health_check_timeout_s: how long Ray Train waits for a worker that does not respond.
    """
    for name, value in TRAIN_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    os.environ[HEALTH_CHECK_TIMEOUT] = str(health_check_timeout_s)


def set_tune_environment() -> None:
    """Set what ``Tuner.fit`` reads."""
    os.environ.update(TUNE_ENVIRONMENT)


# The node that this process runs on.


class Memory(NamedTuple):
    """Memory of a node, in bytes."""

    used: int
    total: int


def node_memory() -> Memory:
    """Return what Ray's memory monitor compares with its limit.

    Ray has no public call for it, and psutil does not know the limits of containers.
    """
    return Memory(get_used_memory(), get_system_memory())


def session_folder() -> Path:
    """Return the folder of this Ray session on this node, which has no public name."""
    return Path(worker.global_worker.node.get_session_dir_path())


IDLE_PROCESSES = (
    ray_constants.WORKER_PROCESS_TYPE_IDLE_WORKER,
    *ray_constants.AGENT_PROCESS_LIST,
    "ray::_AutoscalingCoordinatorActor",
)
"""Titles of Ray's own processes, which outlive every job, start with these.

A machine that is being drained reads the titles of its processes, without connecting to Ray.
"""


# The cluster.

_print_to_stdstream = worker.print_to_stdstream


def print_cluster_messages_to_stderr() -> None:
    """Make Ray print messages of the cluster to stderr; stdout is for the result of a command."""

    def print_to_stderr(data: dict[str, Any], *, ignore_prefix: bool) -> None:
        _print_to_stdstream({**data, "is_err": True}, ignore_prefix=ignore_prefix)

    worker.print_to_stdstream = print_to_stderr


def draining_nodes() -> set[str]:
    """Return the ids, in hex, of nodes that are about to be removed; there is no public call."""
    return set(ray._private.state.state.get_draining_nodes() or ())


def reports_autoscaler() -> bool:
    """Return whether an autoscaler has reported to this cluster; there is no public call."""
    from ray.autoscaler.v2.sdk import get_cluster_status

    status = get_cluster_status(ray.get_runtime_context().gcs_address)
    return status.stats.autoscaler_version not in (None, "", "0")


def remove_placement_group_by_id(group: str) -> None:
    """Remove a placement group whose handle is lost; ``get_placement_group`` needs a name.

    Args:
        group: its id, in hex.
    """
    remove_placement_group(PlacementGroup(PlacementGroupID(bytes.fromhex(group))))


JOB_LOGGER = "ray.dashboard.modules.job.sdk"
"""Logs the end of every log that is followed, among the job's own lines."""


# Errors. Ray's public modules do not export all of their types, and one type has many causes.


def health_check_cause(error: BaseException) -> BaseException:
    """Return the error behind Ray Train's "worker health check failed", or the error itself."""
    cause: BaseException = getattr(error, "health_check_failure", error)
    return cause


def is_train_timeout(error: BaseException) -> bool:
    """Return whether Ray Train gave up waiting for a rank."""
    return type(error).__name__ in (
        "CollectiveTimeoutError",
        "BroadcastCollectiveTimeoutError",
        "WorkerHealthCheckTimeoutError",
    )


def token_rejection(error: BaseException) -> str:
    """Return why a cluster rejected the authentication token; empty if it did not.

    ``ray.init`` may raise a ConnectionError that names the AuthenticationError in its cause's text.
    """
    if isinstance(error, AuthenticationError):
        return str(error)
    return str(error.__cause__ or error.__context__).partition("AuthenticationError: ")[2]


def killed_by_memory_monitor(error: BaseException) -> bool:
    """Return whether Ray's memory monitor ended a process; for actors only the text says so."""
    return isinstance(error, OutOfMemoryError) or "node running low on memory" in str(error)


def was_terminated(error: RayActorError) -> bool:
    """Return whether an actor was preempted or got SIGTERM."""
    return bool(error.preempted) or "SIGTERM" in str(error)


def lost_its_node(error: RayActorError) -> bool:
    """Return whether an actor died with its node."""
    text = str(error)
    return re.search(r"node (has died|is dead|was terminated)|node died", text) is not None


def failed_to_start(error: BaseException) -> bool:
    """Return whether Ray did not start on this machine in time."""
    return "timed out during startup" in str(error)


def is_not_found(error: RuntimeError) -> bool:
    """Return whether the Jobs API does not know what it was asked for."""
    return "404" in str(error)


# Ray Train.


def call_in_workers(action: Callable[[], None]) -> Any:
    """Return a callback of ``RunConfig`` that calls a function in every worker's main thread.

    The train function runs in another thread, where Python allows no signal handlers, and a
    ``UserCallback`` runs in the controller.

    Args:
        action: called once per worker, before the train function.
    """
    from ray.train.v2._internal.execution.callback import WorkerCallback

    # A lambda: pickled by value, a method would take along what typechecks it under pytest.
    methods = {"after_init_train_context": lambda self: action()}
    return type("CallInWorkers", (WorkerCallback,), methods)()


# Ray Tune.

TUNE_SNAPSHOT = re.compile(r"experiment_state-.*\.json")
"""Files that Tune resumes an experiment from."""


def has_reported(scheduler: Any, trial: Any) -> bool:
    """Return whether a trial of a synchronous ``PopulationBasedTraining`` has ended its round."""
    last: int = scheduler._trial_state[trial].last_train_time
    return bool(last >= scheduler._next_perturbation_sync)


def last_result(scheduler: Any, trial: Any) -> dict[str, Any]:
    """Return what a trial of a ``PopulationBasedTraining`` reported last."""
    return dict(scheduler._trial_state[trial].last_result)


def optuna_study(searcher: Any) -> Any:
    """Return the study of an ``OptunaSearch``; what it restores has another one than it was given.

    Returns:
        An ``optuna.Study``.
    """
    return searcher._ot_study


def optuna_trials(searcher: Any) -> dict[str, Any]:
    """Return the trials that an ``OptunaSearch`` has suggested: ``optuna.Trial`` by Tune's ids."""
    trials: dict[str, Any] = searcher._ot_trials
    return trials


def suggest_again(searcher: Any, trial_id: str, number: int) -> None:
    """Make an ``OptunaSearch`` suggest a trial that is in its study, rather than ask for a new one.

    Args:
        searcher: the searcher.
        trial_id: Tune's id of the trial that it will be suggested to.
        number: of the trial in the study.
    """
    from optuna.trial import Trial

    study = optuna_study(searcher)
    stored = study.get_trials(deepcopy=False)[number]
    optuna_trials(searcher)[trial_id] = Trial(study, stored._trial_id)
