"""Draining the Ray node of a machine that is about to be removed."""

import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

from prioritycut_ray.errors import UserError, last_line
from prioritycut_ray.ray_cluster.compat import IDLE_PROCESSES
from prioritycut_ray.ray_cluster.session import knock

_POLL_INTERVAL_S = 0.5
_ANSWER_SECONDS = 60


def drain_here(seconds: float) -> bool:
    """Drain the Ray node of this machine and wait until no task or actor of a job runs on it.

    Args:
        seconds: until the machine is removed.

    Returns:
        Whether the node was idle in time.

    Raises:
        UserError: there is no Ray node here, or the cluster rejects the request.
    """
    deadline = time.monotonic() + seconds
    if "RAY_ADDRESS" in os.environ:
        knock(os.environ["RAY_ADDRESS"])  # without a head there is nowhere to move work to
    _drain_node(seconds)
    while any(busy_workers()):
        if time.monotonic() > deadline:
            return False
        time.sleep(_POLL_INTERVAL_S)
    return True


def _drain_node(seconds: float) -> None:
    command = ["ray", "drain-node", "--reason", "DRAIN_NODE_REASON_PREEMPTION"]
    command += ["--reason-message", "the machine is about to be removed"]
    command += ["--deadline-remaining-seconds", str(int(seconds))]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=_ANSWER_SECONDS)
    except subprocess.TimeoutExpired as error:
        raise UserError(f"the Ray cluster did not answer within {_ANSWER_SECONDS} s") from error
    if result.returncode != 0:
        reason = last_line(result.stderr) or f"exit code {result.returncode}"
        raise UserError(f"cannot drain this Ray node: {reason}")


def busy_workers() -> Iterator[str]:
    """Yield the titles of the processes on this machine that run Ray tasks and actors."""
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            title = os.fsdecode(path.read_bytes())
        except OSError:  # it has ended
            continue
        if title.startswith("ray::") and not title.startswith(IDLE_PROCESSES):
            yield title
