"""Attempts that save one checkpoint after another, in processes of their own that tests kill.

``python -m tests.saving URL`` takes a run over and saves until it is killed or loses the run; it
prints every step that is committed. ``python -m tests.saving FOLDER STRIDE`` saves in forked
processes that are killed at every line that writing executes, or at every STRIDE-th.
"""

import os
import shutil
import signal
import sys
import threading
from functools import partial
from itertools import count
from pathlib import Path
from types import FrameType
from typing import Any

from prioritycut_ray.errors import Superseded
from prioritycut_ray.runs import checkpoints, writer
from prioritycut_ray.runs.attempts import claim_run
from prioritycut_ray.runs.checkpoints import fetch, steps
from prioritycut_ray.runs.retention import Retention
from prioritycut_ray.runs.writer import RunWriter
from prioritycut_ray.storage.claims import Claim
from prioritycut_ray.storage.folder import Folder

FILES = 6


def fill(directory: Path, attempt: int) -> None:
    """Files that say who wrote them."""
    for number in range(FILES):
        (directory / f"{number}.bin").write_bytes(attempt.to_bytes(4, "big") * 5000)


def authors(directory: Path) -> set[bytes]:
    """Return who wrote the files of a checkpoint."""
    return {path.read_bytes()[:4] for path in directory.glob("*.bin")}


def attempt_of(url: str, launch: str) -> tuple[Claim, int]:
    """Take a run over; return the claim and the step to start from."""
    folder = Folder(url)
    claim = claim_run(folder, launch, first=True)
    return claim, max(steps(folder), default=0)


def save_steps(url: str, steps: int | None = None) -> None:
    """Save ``steps`` steps, or until this process is killed or has lost the run."""
    claim, start = attempt_of(url, str(os.getpid()))
    numbers = count(start + 1) if steps is None else range(start + 1, start + steps + 1)
    with RunWriter(claim, start=start, retention=Retention(2, 0, 0), metric="loss") as run:
        for step in numbers:
            run.log({"step": step, "loss": 0.5})
            run.save(step, {"loss": 0.5}, partial(fill, attempt=claim.number))
            run.wait()
            sys.stdout.write(f"{step}\n")
            sys.stdout.flush()


class Killer:
    """Kills this process at the n-th line that the modules under test execute, in any thread."""

    def __init__(self, line: int) -> None:
        self._left = line
        self._files = {checkpoints.__file__, writer.__file__}

    def __call__(self, frame: FrameType, event: str, argument: Any) -> Any:
        code = frame.f_code
        if code.co_filename not in self._files or code.co_name.startswith("<"):  # comprehensions
            return None
        if event == "line":
            self._left -= 1
            if self._left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
        return self


def killed_at_every_line(folder: Path, stride: int) -> int:
    """Fork savers and kill each a few lines later than the one before; return the number of lines.

    After each, every visible checkpoint is intact, and nothing that was committed is lost; every
    tenth time another attempt continues and leaves nothing behind.
    """
    first, run = folder / "first", folder / "run"
    save_steps(str(first), steps=2)
    for line in count(1, stride):
        shutil.rmtree(run, ignore_errors=True)
        shutil.copytree(first, run)
        status = _save_and_die(run, line)
        kept = Folder(run)
        assert steps(kept) in ([1, 2], [1, 2, 3], [2, 3]), f"line {line}: {steps(kept)}"
        for step in steps(kept):
            fetch(kept, step, folder)  # raises if it is damaged
        if status == 0:
            return line
        assert status == -signal.SIGKILL
        if line // stride % 10 == 0:
            save_steps(str(run), steps=1)
            assert [path.name for path in run.rglob(".*")] == []
    raise AssertionError


def _save_and_die(run: Path, line: int) -> int:
    """Save a step in a forked process that is killed at a line; return its exit code."""
    child = os.fork()
    if child == 0:
        killer = Killer(line)
        threading.settrace(killer)
        sys.settrace(killer)
        save_steps(str(run), steps=1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def main() -> None:
    if len(sys.argv) == 3:
        folder, stride = sys.argv[1:]
        sys.stdout.write(f"{killed_at_every_line(Path(folder), int(stride))}\n")
        return
    try:
        save_steps(sys.argv[1])
    except Superseded as error:
        sys.exit(f"{error.exit_code} {error}")


if __name__ == "__main__":
    main()
