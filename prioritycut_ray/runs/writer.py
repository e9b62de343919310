"""Everything that rank 0 writes to the run's folder: in order, fenced, in its own thread."""

import json
import tempfile
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import TypeVar

from prioritycut_ray.errors import DiskFull, UserError, is_disk_full
from prioritycut_ray.runs.checkpoints import clean, prune, steps, write_checkpoint
from prioritycut_ray.runs.retention import Retention
from prioritycut_ray.runs.verdicts import (
    REPORT,
    Verdict,
    checkpoint_scores,
    remove_verdicts_beyond,
    write_verdict,
)
from prioritycut_ray.storage.claims import Claim
from prioritycut_ray.storage.folder import Folder

_ROWS_PER_PART = 64

Result = TypeVar("Result")
Write = Callable[[Path], None]
"""Fills an empty directory with the files of a checkpoint."""


class RunWriter:
    """Writes checkpoints and everything else that rank 0 leaves in the run's folder.

    A context manager; leaving it waits for pending writes. An error of the thread is raised by the
    next call, and nothing is written after it.

    Args:
        claim: the claim of this attempt.
        start: step that the attempt starts from; scalars and verdicts of earlier attempts beyond it
            are dropped.
        retention: which checkpoints are kept.
        metric: name of the scalar that ranks checkpoints; lower is better.

    Raises:
        Superseded: if a newer attempt has taken the run over.
    """

    def __init__(self, claim: Claim, *, start: int, retention: Retention, metric: str) -> None:
        self.folder = claim.folder
        self._claim, self._retention, self._metric = claim, retention, metric
        claim.check()
        clean(claim)
        _drop_rows_beyond(self.folder, start)
        remove_verdicts_beyond(self.folder, start)
        found = [step for step in steps(self.folder) if step <= start]
        self._scores = checkpoint_scores(self.folder, metric, found)
        self._held: set[int] = set()
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

    def submit(self, job: Callable[[], Result]) -> Future[Result]:
        """Run a job after the earlier ones, if this attempt still holds the run.

        Raises:
            Exception: the error of an earlier job.
        """
        if self._error is not None:
            raise self._error
        return self._thread.submit(self._guarded, job)

    def log(self, row: Mapping[str, float]) -> None:
        """Log the scalars of a step as one line of JSON."""
        self.submit(partial(self._append, json.dumps(dict(row)) + "\n"))

    def wait(self) -> None:
        """Wait for the checkpoint that is being written; there is one at a time.

        Raises:
            Exception: the error of an earlier job.
        """
        if self._saving is not None:
            self._saving.result()

    def flush(self) -> None:
        """Wait for all pending writes.

        Raises:
            Exception: the error of an earlier job.
        """
        self.submit(lambda: None).result()

    def save(self, step: int, scalars: Mapping[str, float], write: Write) -> Future[None]:
        """Write a checkpoint in the background and remove those that are no longer kept.

        Args:
            step: step of the checkpoint.
            scalars: scalars at this step.
            write: fills its directory; called later, so it must not depend on the live state.

        Returns:
            A future that is done once the checkpoint is committed.
        """
        self.wait()
        self._saving = self.submit(partial(self._save, step, dict(scalars), write))
        return self._saving

    def hold(self, step: int) -> None:
        """Keep a checkpoint until :meth:`conclude` or :meth:`release`: it is being validated."""
        self.submit(partial(self._held.add, step))

    def release(self, step: int) -> None:
        """Let a checkpoint be removed again: it gets no verdict."""
        self.submit(partial(self._held.discard, step))

    def conclude(self, verdict: Verdict) -> None:
        """Write the verdict on a checkpoint, rank the checkpoint by it, and release it."""
        self.submit(partial(self._conclude, verdict))

    def _conclude(self, verdict: Verdict) -> None:
        write_verdict(self.folder, verdict)
        self._held.discard(verdict.step)
        if self._metric in verdict.scores and verdict.step in self._scores:
            self._scores[verdict.step] = verdict.scores[self._metric]
        self._prune()

    def _prune(self) -> None:
        prune(self._claim, self._scores, self._retention, self._held)

    def _guarded(self, job: Callable[[], Result]) -> Result:
        if self._error is not None:
            raise self._error
        try:
            self._claim.check()
            return job()
        except Exception as error:
            self._error = self._explained(error)
            raise self._error from error

    def _explained(self, error: Exception) -> Exception:
        """Translate an error for the user."""
        if isinstance(error, UserError):
            return error
        try:
            self._claim.check()  # A newer attempt removes what an older one is writing.
        except UserError as superseded:
            return superseded
        except Exception:
            return error
        if is_disk_full(error):
            # An object store does not fill up: there it is the disk that uploads are prepared on.
            place = self.folder.url if self.folder.local else tempfile.gettempdir()
            return DiskFull(
                f"{place}: no space left; the checkpoints in {self.folder.url} are intact"
            )
        return error

    def _save(self, step: int, scalars: dict[str, float], write: Write) -> None:
        def write_all(directory: Path) -> None:
            write(directory)
            report = {"attempt": self._claim.number, "scalars": scalars}
            (directory / REPORT).write_text(json.dumps(report))

        write_checkpoint(self._claim, step, write_all)
        self._scores[step] = scalars.get(self._metric)
        self._prune()

    def _append(self, line: str) -> None:
        if self.folder.local is not None:
            self.folder.append(self._rows_file(), line)
            return
        # Objects cannot be appended to: rewrite a part of bounded size.
        self._rows.append(line)
        self.folder.write(self._rows_file(), "".join(self._rows).encode())
        if len(self._rows) == _ROWS_PER_PART:
            self._rows, self._part = [], self._part + 1

    def _rows_file(self) -> str:
        return f"metrics/{self._claim.number:06d}-{self._part:06d}.jsonl"


def read_rows(lines: str) -> list[dict[str, float]]:
    """Parse a part of the log; a last line that a kill has cut off is dropped."""
    rows = []
    for line in lines.splitlines():
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    return rows


def _drop_rows_beyond(folder: Folder, start: int) -> None:
    """Drop what earlier attempts have logged of steps that this one will repeat."""
    for name in folder.names("metrics"):
        lines = folder.read(f"metrics/{name}").decode()
        kept = "".join(f"{json.dumps(r)}\n" for r in read_rows(lines) if r["step"] <= start)
        if not kept:
            folder.remove(f"metrics/{name}")
        elif kept != lines:
            folder.write(f"metrics/{name}", kept.encode())
