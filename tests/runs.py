"""`prioritycut train` as a process of its own, that tests watch and kill."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file

from prioritycut_ray.runs.locate import find_checkpoint
from tests.hosts import environment
from tests.places import ROOT, TINY

PATIENCE_S = 240.0
"""For anything that should happen, on a busy machine."""
ENVIRON = environment()
STEPS = 24
BATCH = 4
WORDS = [
    f"train.samples={BATCH * STEPS}",
    "train.log_every=5",  # a report takes a second or two
    "train.image_every=1000",
    "train.checkpoint_every=5",
    "train.max_failures=3",
    "train.collective_timeout_s=120",
]


class Rank(NamedTuple):
    """The last heartbeat of a rank."""

    pid: int
    step: int
    started_from: int
    address: str
    node_id: str


def await_truth(condition: Callable[[], Any], what: str, seconds: float = PATIENCE_S) -> Any:
    """Wait until a condition is true and return its value."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, what
        time.sleep(0.2)
    return value


class Training:
    """The command line in a session of its own; a context manager that leaves no process behind.

    Args:
        folder: for its output.
        words: after `prioritycut train`.
        environ: of the process.
    """

    def __init__(self, folder: Path, words: Sequence[str], environ: Mapping[str, str]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._log, self._output = folder / "heartbeats.jsonl", folder / "output.txt"
        self._log.write_text("")
        command = [sys.executable, "-m", "tests.watched", str(self._log), "train", *words]
        with self._output.open("wb") as output:
            self.process = subprocess.Popen(
                command,
                cwd=ROOT,
                env=dict(environ),
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def __enter__(self) -> "Training":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Kill all remaining processes."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        for pid in self.pids():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait(30)

    def output(self) -> str:
        return self._output.read_text(errors="replace")

    def _lines(self) -> list[dict[str, Any]]:
        whole, _, _ = self._log.read_text().rpartition("\n")
        return [json.loads(line) for line in whole.splitlines()]

    def pids(self) -> set[int]:
        """Return the pids of all ranks so far."""
        return {line["pid"] for line in self._lines() if "pid" in line}

    def starts(self) -> list[int]:
        """Return the steps that groups of workers started from, in order."""
        starts = [line["started_from"] for line in self._lines() if line.get("step", 0) > 0]
        return [s for i, s in enumerate(starts) if i == 0 or s != starts[i - 1]]

    def actor(self, name: str) -> int:
        """Return the last known pid of the monitor or of Ray's controller."""
        return int([line[name] for line in self._lines() if line.get(name)][-1])

    def ranks(self) -> dict[int, Rank]:
        """Return the ranks with a heartbeat in the last two seconds."""
        recent = [line for line in self._lines() if line.get("at", 0) > time.time() - 2]
        return {line["rank"]: Rank(*(line[name] for name in Rank._fields)) for line in recent}

    def at_step(self, step: int, workers: int = 2, seconds: float = PATIENCE_S) -> dict[int, Rank]:
        """Wait until this number of ranks has reached a step."""

        def reached() -> dict[int, Rank]:
            assert self.process.poll() is None, self.output()
            ranks = self.ranks()
            there = len(ranks) == workers and all(rank.step >= step for rank in ranks.values())
            return ranks if there else {}

        try:
            ranks: dict[int, Rank] = await_truth(reached, f"step {step}", seconds)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.output()}") from None
        return ranks

    def await_output(self, words: str) -> None:
        """Wait until the command has printed something."""

        def printed() -> bool:
            assert self.process.poll() is None, self.output()
            return words in self.output()

        await_truth(printed, f"{words!r} is printed")

    def end(self, seconds: float = 2 * PATIENCE_S) -> int:
        """Wait until all processes have ended and return the exit code."""
        try:
            code = self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still running after {seconds} s\n{self.output()}") from None
        self.assert_no_orphan()
        return code

    def assert_no_orphan(self, seconds: float = PATIENCE_S) -> None:
        """Wait until all ranks, and everything else in the process group, are gone."""

        def left() -> list[int]:
            return [pid for pid in self.pids() if _exists(os.kill, pid)]

        await_truth(lambda: not left(), f"orphans {left()}", seconds)
        pgid = self.process.pid
        await_truth(lambda: not _exists(os.killpg, pgid), f"group {pgid} is running", seconds)


class Start:
    """Starts trainings of one configuration in one folder."""

    def __init__(self, shards: Path, folder: Path) -> None:
        self.run = folder / "runs" / "tiny"
        self.words = [f"data.url={shards}", f"storage={self.run.parent}", *WORDS]
        self._folder, self._count = folder, 0

    def __call__(self, *words: str, **environ: str) -> Training:
        self._count += 1
        folder = self._folder / f"attempt{self._count}"
        return Training(folder, [str(TINY), *self.words, *words], {**ENVIRON, **environ})


def _exists(kill: Callable[[int, int], None], number: int) -> bool:
    try:
        kill(number, 0)
    except ProcessLookupError:
        return False
    return True


def assert_same_weights(run: Path, other: str | Path) -> None:
    """Assert that the last checkpoints of two runs are of the same step and bit-identical."""
    expected, found = find_checkpoint(run), find_checkpoint(other)
    assert found.name == expected.name
    names = {path.name for path in expected.glob("*.safetensors")}
    assert {path.name for path in found.glob("*.safetensors")} == names
    for name in names:
        tensors = load_file(expected / name)
        for key, tensor in load_file(found / name).items():
            assert torch.equal(tensor, tensors[key]), f"{name}: {key}"
