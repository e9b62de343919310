"""Resources of a cluster, and whether a run fits on it."""

import time

import ray

from prioritycut_ray.config import Config
from prioritycut_ray.errors import UserError
from prioritycut_ray.ray_cluster.compat import reports_autoscaler


def check_capacity(config: Config) -> None:
    """Reject a run that needs more CPUs than the cluster has or can get.

    Raises:
        UserError: names what is needed and what is available.
    """
    wanted = config.train.worker_range[0] * config.train.cpus_per_worker
    available = int(total_resource("CPU"))
    if wanted > available and not has_autoscaler():
        raise UserError(
            f"train.workers={config.train.workers} × train.cpus_per_worker="
            f"{config.train.cpus_per_worker} needs {wanted} CPUs, the cluster has {available}: "
            "lower one of them, or join a larger cluster with RAY_ADDRESS"
        )


def uses_gpu(config: Config) -> bool:
    """Return whether the workers train on GPUs: as requested, or if there are enough.

    Raises:
        UserError: GPUs were requested and the cluster lacks them.
    """
    available, wanted = int(total_resource("GPU")), config.train.worker_range[0]
    if config.train.use_gpu == "yes" and available < wanted:
        if has_autoscaler():
            return True
        raise UserError(
            f"train.use_gpu=yes with train.workers={config.train.workers}, but the cluster has "
            f"{available} GPUs: lower train.workers or set train.use_gpu=auto"
        )
    return config.train.use_gpu != "no" and available >= wanted


_AUTOSCALER_START_S = 20.0
"""How long an autoscaler that starts with its cluster takes to report for the first time."""


def total_resource(resource: str) -> float:
    """Return the total amount of a resource, ``CPU`` or ``GPU``, on all nodes of the cluster."""
    return float(ray.cluster_resources().get(resource, 0))


def has_autoscaler() -> bool:
    """Return whether an autoscaler adds nodes when something waits for resources.

    How many it may add is unknown: Ray's autoscalers do not report it.
    """
    deadline = time.monotonic()
    if total_resource("CPU") == 0:  # only a cluster with an autoscaler is started like that
        deadline += _AUTOSCALER_START_S
    while not reports_autoscaler():
        if time.monotonic() >= deadline:
            return False
        time.sleep(1)
    return True
