"""Rank 0's hand in the run's folder: in order, behind the lease, in a thread of its own."""

import errno
import json
import tempfile
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from types import TracebackType

from prioritycut_ray.errors import DiskFull, UserError
from prioritycut_ray.runs.attempts import Lease
from prioritycut_ray.runs.checkpoints import STEP_FORMAT, clean, prune, steps, write_checkpoint
from prioritycut_ray.runs.retention import Retention

REPORT = "report.json"
"""File of a checkpoint: the attempt that wrote it, and the scalars at its step."""
_ROWS_A_PART = 64

Write = Callable[[Path], None]
"""Fills an empty directory with the files of a checkpoint."""


class RunWriter:
    """Writes checkpoints and whatever else rank 0 leaves in the run's folder.

    A context manager; its end waits for what is still being written. An error of the thread is
    raised by the next call, and nothing is written after it.

    Args:
        lease: of this attempt.
        start: step that the attempt starts from, 0 if afresh; scalars logged beyond it by earlier
            attempts are dropped.
        retention: which checkpoints are kept.
        metric: name of the scalar that ranks checkpoints, lower being better.

    Raises:
        Superseded: a newer attempt has taken the run over.
    """

    def __init__(self, lease: Lease, *, start: int, retention: Retention, metric: str) -> None:
        self.storage = lease.storage
        self._lease, self._retention, self._metric = lease, retention, metric
        lease.check()
        clean(lease)
        self._scores = {step: self._score(step) for step in steps(self.storage) if step <= start}
        _drop_rows_beyond(lease, start)
        self._rows: list[str] = []
        self._part = 0
        self._saving: Future[None] | None = None
        self._error: Exception | None = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="run-writer")

    def __enter__(self) -> "RunWriter":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._thread.shutdown()
        if error is None and self._error is not None:
            raise self._error

    def submit(self, job: Callable[[], None]) -> Future[None]:
        """Run a job after those before it, if this attempt still holds the lease.

        Raises:
            Exception: of an earlier job.
        """
        if self._error is not None:
            raise self._error
        return self._thread.submit(self._guarded, job)

    def log(self, row: Mapping[str, float]) -> None:
        """Keep the scalars of a step as one line of JSON."""
        self.submit(partial(self._append, json.dumps(dict(row)) + "\n"))

    def wait(self) -> None:
        """Wait for the checkpoint that is being written: there is one at a time.

        Raises:
            Exception: of an earlier job.
        """
        if self._saving is not None:
            self._saving.result()

    def flush(self) -> None:
        """Wait for everything that is being written.

        Raises:
            Exception: of an earlier job.
        """
        self.submit(lambda: None).result()

    def save(self, step: int, scalars: Mapping[str, float], write: Write) -> Future[None]:
        """Write a checkpoint in the background and remove those that are no longer kept.

        Args:
            step: of the checkpoint.
            scalars: at this step.
            write: fills its directory; is called later, so it must not depend on the live state.

        Returns:
            Done when the checkpoint is committed.
        """
        self.wait()
        self._saving = self.submit(partial(self._save, step, dict(scalars), write))
        return self._saving

    def _guarded(self, job: Callable[[], None]) -> None:
        if self._error is not None:
            raise self._error
        try:
            self._lease.check()
            job()
        except Exception as error:
            self._error = self._explained(error)
            raise self._error from error

    def _explained(self, error: Exception) -> Exception:
        """What an error means to the user."""
        if isinstance(error, UserError):
            return error
        try:
            self._lease.check()  # a newer attempt removes what an older one is writing
        except UserError as superseded:
            return superseded
        except Exception:
            return error
        if is_disk_full(error):
            # An object store has no end: there it is the disk where files are made for it.
            place = self.storage.url if self.storage.local else tempfile.gettempdir()
            return DiskFull(
                f"{place}: no space left; the checkpoints in {self.storage.url} are intact"
            )
        return error

    def _save(self, step: int, scalars: dict[str, float], write: Write) -> None:
        def write_all(directory: Path) -> None:
            write(directory)
            report = {"attempt": self._lease.attempt.number, "scalars": scalars}
            (directory / REPORT).write_text(json.dumps(report))

        write_checkpoint(self._lease, step, write_all)
        self._scores[step] = scalars.get(self._metric)
        prune(self._lease, self._scores, self._retention)

    def _score(self, step: int) -> float | None:
        """The metric of a checkpoint that an earlier attempt has written."""
        try:
            report = json.loads(self.storage.read(f"{STEP_FORMAT.format(step)}/{REPORT}"))
            return float(report["scalars"][self._metric])
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            return None

    def _append(self, line: str) -> None:
        if self.storage.local is not None:
            self.storage.append(self._rows_file(), line)
            return
        # Nothing can be appended to an object: a part of bounded size is written again.
        self._rows.append(line)
        self.storage.write(self._rows_file(), "".join(self._rows).encode())
        if len(self._rows) == _ROWS_A_PART:
            self._rows, self._part = [], self._part + 1

    def _rows_file(self) -> str:
        return f"metrics/{self._lease.attempt.number:06d}-{self._part:06d}.jsonl"


def is_disk_full(error: BaseException) -> bool:
    """Whether a write failed for want of space, in the words of any of the writers."""
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return True
    text = str(error)
    return "No space left on device" in text or "PytorchStreamWriter failed" in text


def read_rows(lines: str) -> list[dict[str, float]]:
    """Rows of a part of the log; a last line that a kill has cut off is left out."""
    rows = []
    for line in lines.splitlines():
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    return rows


def _drop_rows_beyond(lease: Lease, start: int) -> None:
    """Drop what earlier attempts have logged of steps that this one will take again."""
    storage = lease.storage
    for name in storage.names("metrics"):
        lines = storage.read(f"metrics/{name}").decode()
        kept = "".join(f"{json.dumps(r)}\n" for r in read_rows(lines) if r["step"] <= start)
        if not kept:
            storage.remove(f"metrics/{name}")
        elif kept != lines:
            storage.write(f"metrics/{name}", kept.encode())
