"""Progress in a terminal: a bar for people, lines for a log."""

import time
from collections.abc import Mapping
from datetime import timedelta
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

_SECONDS_BETWEEN_LINES = 10.0


class ProgressBar:
    """Shows the progress and the ETA of a task; a context manager.

    Args:
        label: what is being done.
        total: number of units.
        console: the console to draw on; standard error by default.
    """

    def __init__(self, label: str, total: float, console: Console | None = None) -> None:
        self._label, self._total = label, total
        self._console = console or Console(stderr=True, highlight=False, soft_wrap=True)
        self._started = time.monotonic()
        self._first: float | None = None
        self._last_line = 0.0
        self._bar: Progress | None = None
        self._task = TaskID(0)

    def __enter__(self) -> "ProgressBar":
        if self._console.is_terminal:
            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                TextColumn("{task.percentage:>3.0f}%"),
                TimeRemainingColumn(),
                TextColumn("{task.fields[note]}"),
                console=self._console,
            )
            self._task = self._bar.add_task(self._label, total=self._total, note="")
            self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def update(self, done: float, note: str) -> None:
        """Show that ``done`` units are finished, with a note beside the bar."""
        if self._bar is not None:
            self._bar.update(self._task, completed=done, note=note)
            return
        now = time.monotonic()
        eta = self._eta(done, now)
        if done < self._total and now - self._last_line < _SECONDS_BETWEEN_LINES:
            return
        self._last_line = now
        percent = 100 * done / self._total
        self._console.print(f"{self._label}: {percent:.0f}% · ETA {eta} · {note}", markup=False)

    def print(self, line: str) -> None:
        """Print a line without disturbing the bar."""
        self._console.print(line, markup=False)

    def _eta(self, done: float, now: float) -> str:
        """Estimate the time left from the speed since the first update of a resumed task."""
        if self._first is None:
            self._first, self._started = done, now
        if done <= self._first:
            return "unknown" if done < self._total else "0:00:00"
        seconds = (now - self._started) / (done - self._first) * (self._total - done)
        return str(timedelta(seconds=max(0, round(seconds))))


def training_note(metrics: Mapping[str, float]) -> str:
    """Format the main metrics of a training run on one line."""
    parts = [f"step {metrics['step']:.0f}", f"{metrics['speed/samples_per_second']:.1f} samples/s"]
    shown = ("generator/perceptual", "generator/adversarial", "discriminator/total")
    parts += [f"{name} {metrics[name]:.3g}" for name in shown if name in metrics]
    if "val/l1" in metrics:
        parts.append(
            f"val/l1 {metrics['val/l1']:.4f} at step {metrics['val/step']:.0f} "
            f"(copied source {metrics['val/copy_source/l1']:.4f})"
        )
    return " · ".join(parts)
