"""What a process that died has left behind."""

import faulthandler
import os
from pathlib import Path
from typing import NamedTuple

import ray


def record_crashes() -> None:
    """Let this process leave a note if it dies of a signal that can be caught."""
    # Kept open: the interpreter writes into it when it is dying.
    faulthandler.enable(crash_file(os.getpid()).open("w"), all_threads=False)


class CrashEvidence(NamedTuple):
    """What a process left behind on its node.

    Attributes:
        alive: it still runs.
        crash: what it wrote when it died, empty if it could not.
        oom_kills: how many processes the node's kernel has killed for want of memory since boot.
    """

    alive: bool
    crash: str
    oom_kills: int


def inspect_process(pid: int) -> CrashEvidence:
    """Look for a process and for its crash note; to be run on its node."""
    try:
        os.kill(pid, 0)
        alive = True
    except ProcessLookupError:
        alive = False
    path = crash_file(pid)
    crash = path.read_text() if path.exists() else ""
    return CrashEvidence(alive, crash, oom_kills())


def oom_kills() -> int:
    """Processes that this machine's kernel has killed for want of memory since boot."""
    try:
        lines = Path("/proc/vmstat").read_text().splitlines()
    except OSError:  # no Linux
        return 0
    return sum(int(line.split()[1]) for line in lines if line.startswith("oom_kill "))


def crash_file(pid: int) -> Path:
    """Where a process of this node writes its traceback when it crashes."""
    session = Path(ray._private.worker.global_worker.node.get_session_dir_path())
    return session / f"prioritycut-crash-{pid}.txt"
