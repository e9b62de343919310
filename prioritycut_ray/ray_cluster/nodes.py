"""The nodes of a cluster, and a call on each of them."""

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
    """Nodes that Ray counts as alive; one that has just died may be among them."""
    return [Node(n["NodeID"], n["NodeManagerAddress"]) for n in ray.nodes() if n["Alive"]]


def on_every_node(
    function: Callable[..., Any], *arguments: Any, seconds: float = _ANSWER_SECONDS
) -> dict[Node, Any | RayError | UserError]:
    """Call a function once on every node.

    Returns:
        Its result by node, the UserError that it raised, RayTaskError if it raised another error,
        or another RayError where the node did not answer in time.
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
