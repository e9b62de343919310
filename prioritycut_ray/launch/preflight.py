"""What is looked at before workers start: data and storage, as every node sees them."""

from collections.abc import Callable, Mapping
from typing import Any

from ray.exceptions import RayError, RayTaskError

from prioritycut_ray.config import Config
from prioritycut_ray.data.shards import clips_of, read_clip, read_index
from prioritycut_ray.errors import UserError
from prioritycut_ray.ray_cluster.nodes import Node, alive_nodes, on_every_node
from prioritycut_ray.storage.probe import NOT_SHARED, SHARE, has_marker, marker


def check_nodes(config: Config, on_warning: Callable[[str], None]) -> None:
    """Refuse a run whose data or storage some node does not see.

    Nodes that do not answer are passed over: they may have died a moment ago.

    Raises:
        UserError: naming the node, the place and the reason.
    """
    if len(alive_nodes()) == 1:
        return
    with marker(config.storage) as name:
        answers = on_every_node(_look, config.data.url, config.data.split, config.storage, name)
    for line in _unanswered(answers):
        on_warning(line)
    for node, answer in answers.items():
        if isinstance(answer, RayTaskError):
            raise answer
        if isinstance(answer, UserError):
            raise UserError(f"node {node.address}: {answer}") from answer


def _unanswered(answers: Mapping[Node, Any]) -> list[str]:
    return [
        f"node {node.address} does not answer ({type(answer).__name__}); going on without it"
        for node, answer in answers.items()
        if isinstance(answer, RayError) and not isinstance(answer, RayTaskError)
    ]


def _look(data: str, split: str, storage: str, name: str) -> None:
    """Read one clip and find what the driver has written; runs on each node.

    Raises:
        UserError: something is not to be seen from here.
    """
    if not has_marker(storage, name):
        raise UserError(f"storage={storage}: {NOT_SHARED}; {SHARE}")
    read_clip(data, clips_of(read_index(data), split)[0])
