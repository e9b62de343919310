"""Ray tasks with results in the order of their inputs and limited concurrency."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import ray
from ray.exceptions import RayTaskError, WorkerCrashedError

from prioritycut_ray.errors import UserError
from prioritycut_ray.ray_cluster.resources import has_autoscaler, total_resource
from prioritycut_ray.ray_cluster.session import start_ray

Item = TypeVar("Item")
Result = TypeVar("Result")


def map_tasks(
    function: Callable[[Item], Result], items: Sequence[Item], *, workers: int | None
) -> Iterator[Result]:
    """Apply a function to every item in Ray tasks; yields results in the order of the items.

    A task takes one CPU, and one GPU if the cluster has any. A task whose process or node dies is
    retried up to three times (Ray's default).

    Args:
        function: pure and picklable.
        items: picklable.
        workers: number of concurrent tasks; defaults to what the cluster has room for.

    Raises:
        UserError: the cluster has less room than requested, a task raised it, or an item crashed
            its process in every attempt.
    """
    start_ray()
    gpus = int(total_resource("GPU"))
    resource = "GPU" if gpus else "CPU"
    if workers is not None and workers > total_resource(resource) and not has_autoscaler():
        raise UserError(
            f"--workers {workers}: the cluster has room for {int(total_resource(resource))} "
            f"(one {resource} each); request fewer, or join a larger cluster with RAY_ADDRESS"
        )
    # By name, or a task of a trial of a search would be limited to what the trial reserves.
    task = ray.remote(num_cpus=1, num_gpus=min(gpus, 1), scheduling_strategy="DEFAULT")(function)
    running: dict[Any, int] = {}
    finished: dict[int, Result] = {}
    started = given = 0
    while given < len(items):
        at_once = workers or max(1, int(total_resource(resource)))  # the cluster may have grown
        while started < len(items) and len(running) < at_once:
            running[task.remote(items[started])] = started
            started += 1
        (reference,), _ = ray.wait(list(running))
        index = running.pop(reference)
        finished[index] = _result(items[index], reference)
        while given in finished:
            yield finished.pop(given)
            given += 1


def _result(item: Any, reference: Any) -> Any:
    try:
        return ray.get(reference)
    except RayTaskError as error:
        if isinstance(error.cause, UserError):
            raise error.cause from error
        raise
    except WorkerCrashedError as error:
        raise UserError(f"{item}: crashed its worker process in every attempt") from error
