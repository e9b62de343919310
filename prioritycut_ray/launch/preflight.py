"""Checks before the workers start: data and storage, as every node sees them."""

from collections.abc import Callable, Mapping
from typing import Any

from ray.exceptions import RayError, RayTaskError

from prioritycut_ray.config import Config
from prioritycut_ray.data.index import clips_of, read_index
from prioritycut_ray.data.shards import read_clip
from prioritycut_ray.errors import UserError
from prioritycut_ray.ray_cluster.nodes import Node, alive_nodes, on_every_node
from prioritycut_ray.storage.probe import NOT_SHARED, SHARE, has_marker, marker


def check_nodes(config: Config, on_warning: Callable[[str], None]) -> None:
    """Reject a run if its data or storage is not visible from some node.

    Nodes that do not respond are skipped: they may have just died.

    Raises:
        UserError: names the node, the place and the reason.
    """
    if len(alive_nodes()) == 1:
        return
    with marker(config.storage) as name:
        answers = on_every_node(
            _check_node, config.data.url, config.data.split, config.storage, name
        )
    for line in _without_response(answers):
        on_warning(line)
    for node, answer in answers.items():
        if isinstance(answer, RayTaskError):
            raise answer
        if isinstance(answer, UserError):
            raise UserError(f"node {node.address}: {answer}") from answer


def _without_response(answers: Mapping[Node, Any]) -> list[str]:
    return [
        f"node {node.address} does not respond ({type(answer).__name__}); continuing without it"
        for node, answer in answers.items()
        if isinstance(answer, RayError) and not isinstance(answer, RayTaskError)
    ]


def _check_node(data: str, split: str, storage: str, name: str) -> None:
    """Look for the driver's file and read one clip; runs on every node.

    Raises:
        UserError: something is not visible from here.
    """
    if not has_marker(storage, name):
        raise UserError(f"storage={storage}: {NOT_SHARED}; {SHARE}")
    read_clip(data, clips_of(read_index(data), split)[0])
