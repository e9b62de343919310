"""A Ray node that is about to go away: drain it, and wait until its work has moved."""

import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

from prioritycut_ray.errors import UserError
from prioritycut_ray.ray_cluster.session import knock

_SECONDS_BETWEEN_LOOKS = 0.5
_ANSWER_SECONDS = 60
_AT_REST = (
    b"ray::IDLE",
    b"ray::DashboardAgent",
    b"ray::RuntimeEnvAgent",
    b"ray::_AutoscalingCoordinatorActor",
)
"""Titles of Ray's own processes, which outlive every job, start with these."""


def drain_here(seconds: float) -> bool:
    """Drain the Ray node of this machine and wait until no task or actor of a job runs on it.

    Args:
        seconds: until the machine ends.

    Returns:
        Whether the node came to rest in time.

    Raises:
        UserError: there is no Ray node here, or the cluster rejects the request.
    """
    deadline = time.monotonic() + seconds
    if "RAY_ADDRESS" in os.environ:
        knock(os.environ["RAY_ADDRESS"])  # without its head a node has nothing to move
    _drain_node(seconds)
    while any(_busy_workers()):
        if time.monotonic() > deadline:
            return False
        time.sleep(_SECONDS_BETWEEN_LOOKS)
    return True


def _drain_node(seconds: float) -> None:
    command = ["ray", "drain-node", "--reason", "DRAIN_NODE_REASON_PREEMPTION"]
    command += ["--reason-message", "the machine ends"]
    command += ["--deadline-remaining-seconds", str(int(seconds))]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=_ANSWER_SECONDS)
    except subprocess.TimeoutExpired as error:
        raise UserError(f"the Ray cluster did not answer within {_ANSWER_SECONDS} s") from error
    if result.returncode != 0:
        lines = result.stderr.strip().splitlines() or [f"exit code {result.returncode}"]
        raise UserError(f"this Ray node cannot be drained: {lines[-1]}")


def _busy_workers() -> Iterator[bytes]:
    """Titles of the processes on this machine that Ray tasks and actors run in."""
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            title = path.read_bytes()
        except OSError:  # it has ended
            continue
        if title.startswith(b"ray::") and not title.startswith(_AT_REST):
            yield title
