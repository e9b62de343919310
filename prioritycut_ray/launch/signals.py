"""SIGTERM and Ctrl-C as requests that the main thread polls, instead of exceptions."""

import signal
import threading
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any

_NUMBERS = (signal.SIGTERM, signal.SIGINT)


class StopSignals:
    """Collects SIGTERM and SIGINT while the body runs; a context manager.

    Python allows signal handlers only in the main thread; in other threads it collects nothing.

    Args:
        on_signal: called with the name of each signal, in the main thread.

    Attributes:
        received: names of the signals, in order of arrival.
    """

    def __init__(self, on_signal: Callable[[str], None] = lambda name: None) -> None:
        self.received: list[str] = []
        self._on_signal = on_signal
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "StopSignals":
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._record) for number in _NUMBERS}
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _record(self, number: int, frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        self.received.append(name)
        self._on_signal(name)
