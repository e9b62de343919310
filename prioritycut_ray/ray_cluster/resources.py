"""What a cluster has, and whether a run fits on it."""

import time

import ray
import ray.train.torch
from ray.autoscaler.v2.sdk import get_cluster_status

from prioritycut_ray.config import Config
from prioritycut_ray.errors import UserError


def check_capacity(config: Config) -> None:
    """Refuse a run that would wait for ever for more CPUs than the cluster has.

    Raises:
        UserError: saying what is asked for and what there is.
    """
    wanted = config.train.worker_range[0] * config.train.cpus_per_worker
    available = int(total_resource("CPU"))
    if wanted > available and not has_autoscaler():
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
    available, wanted = int(total_resource("GPU")), config.train.worker_range[0]
    if config.train.use_gpu == "yes" and available < wanted:
        if has_autoscaler():
            return True
        raise UserError(
            f"train.use_gpu=yes with train.workers={config.train.workers}, but the cluster has "
            f"{available} GPUs: lower train.workers or set train.use_gpu=auto"
        )
    return config.train.use_gpu != "no" and available >= wanted


_AUTOSCALER_SECONDS = 20.0
"""For an autoscaler that starts with its cluster to be heard of for the first time."""


def total_resource(resource: str) -> float:
    """How much of a resource, ``CPU`` or ``GPU``, the nodes of the cluster have in all."""
    return float(ray.cluster_resources().get(resource, 0))


def has_autoscaler() -> bool:
    """Whether an autoscaler adds nodes when something waits for room.

    How many it may add is not known here: Ray's autoscalers do not tell.
    """
    deadline = time.monotonic()
    if total_resource("CPU") == 0:  # nobody starts such a cluster, unless it is to grow
        deadline += _AUTOSCALER_SECONDS
    while not _reports_autoscaler():
        if time.monotonic() >= deadline:
            return False
        time.sleep(1)
    return True


def _reports_autoscaler() -> bool:
    status = get_cluster_status(ray.get_runtime_context().gcs_address)
    return status.stats.autoscaler_version not in (None, "", "0")
