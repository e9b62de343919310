"""Attempts that save one checkpoint after another, as processes of their own: tests kill them.

``python -m tests.saving URL`` takes a run over and saves until it is killed or loses the run; it
prints every step that is committed. ``python -m tests.saving URL every-line`` saves in forked
processes that are killed at the first, the second, ... line that writing executes.
"""

import os
import signal
import sys
import threading
from functools import partial
from itertools import count
from pathlib import Path
from types import FrameType
from typing import Any

from prioritycut_ray import run_storage, run_writer
from prioritycut_ray.errors import Superseded
from prioritycut_ray.run_storage import Lease, Retention, RunStorage, claim
from prioritycut_ray.run_writer import RunWriter

FILES = 6


def fill(directory: Path, attempt: int) -> None:
    """Files that say who wrote them."""
    for number in range(FILES):
        (directory / f"{number}.bin").write_bytes(attempt.to_bytes(4, "big") * 5000)


def authors(directory: Path) -> set[bytes]:
    """Who wrote the files of a checkpoint."""
    return {path.read_bytes()[:4] for path in directory.glob("*.bin")}


def attempt_of(url: str, launch: str) -> tuple[Lease, int]:
    """Take a run over; the lease and the step to start from."""
    storage = RunStorage(url)
    lease = claim(storage, launch, first=True)
    return lease, max(storage.steps(), default=0)


def save_steps(url: str, steps: int | None = None) -> None:
    """Save so many steps, or until this process is killed or has lost the run."""
    lease, start = attempt_of(url, str(os.getpid()))
    numbers = count(start + 1) if steps is None else range(start + 1, start + steps + 1)
    with RunWriter(lease, start=start, retention=Retention(2, 0, 0), metric="loss") as writer:
        for step in numbers:
            writer.log({"step": step, "loss": 0.5})
            writer.save(step, {"loss": 0.5}, partial(fill, attempt=lease.attempt.number))
            writer.wait()
            sys.stdout.write(f"{step}\n")
            sys.stdout.flush()


class Killer:
    """Kills this process at the n-th line that the modules under test execute, in any thread."""

    def __init__(self, line: int) -> None:
        self._left = line
        self._files = {run_storage.__file__, run_writer.__file__}

    def __call__(self, frame: FrameType, event: str, argument: Any) -> Any:
        code = frame.f_code
        if code.co_filename not in self._files or code.co_name.startswith("<"):  # comprehensions
            return None
        if event == "line":
            self._left -= 1
            if self._left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
        return self


def killed_at_every_line(url: str) -> int:
    """Fork savers and kill each one line later than the one before; gives the number of lines.

    After each, everything that can be seen is whole, and nothing that was committed is lost.
    """
    save_steps(url, steps=2)
    storage, folder = RunStorage(url), Path(url)
    for line in count(1):
        before = max(storage.steps())
        child = os.fork()
        if child == 0:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            killer = Killer(line)
            threading.settrace(killer)
            sys.settrace(killer)
            save_steps(url, steps=1)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        found = storage.newest_good(folder)
        assert found is not None
        assert found[0] in (before, before + 1), f"line {line}: {found[0]} after {before}"
        for step in storage.steps():
            storage.fetch(step, folder)  # raises if it is damaged
        if os.waitstatus_to_exitcode(status) == 0:
            return line
        assert os.waitstatus_to_exitcode(status) == -signal.SIGKILL
    raise AssertionError


def main() -> None:
    if sys.argv[2:] == ["every-line"]:
        lines = killed_at_every_line(sys.argv[1])
        save_steps(sys.argv[1], steps=1)
        left = [path.name for path in Path(sys.argv[1]).rglob(".*")]
        assert left == [], left
        sys.stdout.write(f"{lines}\n")
        return
    try:
        save_steps(sys.argv[1])
    except Superseded as error:
        sys.exit(f"{error.exit_code} {error}")


if __name__ == "__main__":
    main()
