"""The nodes of a cluster, and function calls on each of them."""

from collections.abc import Callable
from typing import Any, NamedTuple

import ray
from ray.exceptions import RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from prioritycut_ray.errors import UserError

_ANSWER_SECONDS = 60.0


class Node(NamedTuple):
    """A node of the cluster."""

    id: str
    address: str


def alive_nodes() -> list[Node]:
    """Return the nodes that Ray considers alive; one that has just died may be among them."""
    return [Node(n["NodeID"], n["NodeManagerAddress"]) for n in ray.nodes() if n["Alive"]]


def on_every_node(
    function: Callable[..., Any], *arguments: Any, seconds: float = _ANSWER_SECONDS
) -> dict[Node, Any | RayError | UserError]:
    """Call a function once on every node.

    Returns:
        By node: the result, or the UserError that the function raised, or RayTaskError for any
        other error that it raised, or another RayError if the node did not respond in time.
    """
    task = ray.remote(num_cpus=0, max_retries=0)(function)
    running = {}
    for node in alive_nodes():
        there = NodeAffinitySchedulingStrategy(node.id, soft=False)
        running[node] = task.options(scheduling_strategy=there).remote(*arguments)
    ray.wait(list(running.values()), num_returns=len(running), timeout=seconds)
    return {node: _result(reference) for node, reference in running.items()}


def _result(reference: Any) -> Any:
    try:
        return ray.get(reference, timeout=0.1)
    except RayTaskError as error:
        if isinstance(error.cause, UserError):
            return error.cause
        return error
    except RayError as error:
        return error
