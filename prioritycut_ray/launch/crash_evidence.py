"""Evidence that a crashed process leaves on its node."""

import faulthandler
import os
from pathlib import Path
from typing import NamedTuple

from prioritycut_ray.ray_cluster.compat import session_folder


def record_crashes() -> None:
    """Make this process write a traceback when it dies of a signal that can be caught."""
    # Kept open: the interpreter writes to it while it is dying.
    faulthandler.enable(crash_file(os.getpid()).open("w"), all_threads=False)


class CrashEvidence(NamedTuple):
    """What a process left behind on its node.

    Attributes:
        alive: whether it still runs.
        crash: the traceback that it wrote when it died; empty if it could not.
        oom_kills: number of processes that the node's out-of-memory killer has ended since boot.
    """

    alive: bool
    crash: str
    oom_kills: int


def inspect_process(pid: int) -> CrashEvidence:
    """Look for a process and its traceback; runs on its node."""
    try:
        os.kill(pid, 0)
        alive = True
    except ProcessLookupError:
        alive = False
    path = crash_file(pid)
    crash = path.read_text() if path.exists() else ""
    return CrashEvidence(alive, crash, oom_kills())


def oom_kills() -> int:
    """Return how many processes this machine's out-of-memory killer has ended since boot."""
    try:
        lines = Path("/proc/vmstat").read_text().splitlines()
    except OSError:  # not Linux
        return 0
    return sum(int(line.split()[1]) for line in lines if line.startswith("oom_kill "))


def crash_file(pid: int) -> Path:
    """Return the file that a process of this node writes its traceback to when it crashes."""
    return session_folder() / f"prioritycut-crash-{pid}.txt"
