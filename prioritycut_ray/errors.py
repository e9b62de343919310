"""Exit codes, the errors that carry them, and the words for any error; the lowest module of all."""

import errno
import re
from enum import IntEnum


class ExitCode(IntEnum):
    """How a command ended; docs/failures.md says for each code what to do.

    Attributes:
        title: the cause, in the words of messages and of the documentation.
    """

    title: str

    def __new__(cls, code: int, title: str) -> "ExitCode":
        """Create a member from its code and title."""
        member = int.__new__(cls, code)
        member._value_ = code
        member.title = title
        return member

    OK = 0, "success"
    USER_ERROR = 1, "cannot continue"
    USAGE = 2, "wrong usage"
    BAD_DATA = 65, "bad data"
    GPU_FAULT = 68, "GPU fault"
    LOST_NODE = 69, "lost node"
    WORKER_ERROR = 70, "error in a worker"
    OUT_OF_MEMORY = 71, "out of memory"
    WORKER_KILLED = 72, "worker killed"
    DISK_FULL = 73, "disk full"
    HANG = 74, "collective timeout"
    PREEMPTED = 75, "preempted"
    NOT_FINITE = 76, "loss not finite"
    SUPERSEDED = 77, "superseded"
    LEASE_HELD = 78, "already in use"
    DETACHED = 130, "detached"


class UserError(Exception):
    """A problem in the user's input or environment, described on one line.

    The message names the thing (file, key, run), the reason, and the way out. The command line
    prints it without a traceback and exits with ``exit_code``; ``--debug`` adds the traceback.
    """

    exit_code = ExitCode.USER_ERROR


class DataError(UserError):
    """Raised when too many clips cannot be read; a retry would fail in the same way."""

    exit_code = ExitCode.BAD_DATA


class NotFiniteError(UserError):
    """Raised when losses or gradients stay infinite or NaN; a retry would fail in the same way."""

    exit_code = ExitCode.NOT_FINITE


class Preempted(UserError):
    """Raised when a run was asked to stop and has saved its state; it can be resumed."""

    exit_code = ExitCode.PREEMPTED


class Superseded(UserError):
    """Raised when a newer process has taken over and this one must not write any more."""

    exit_code = ExitCode.SUPERSEDED


class DiskFull(UserError):
    """Raised when there is no space left to write."""

    exit_code = ExitCode.DISK_FULL


class Detached(UserError):
    """Raised by Ctrl-C or SIGTERM while a command follows a remote job; the job continues."""

    exit_code = ExitCode.DETACHED


class LeaseHeld(UserError):
    """Raised when another process holds the lease that this one needs."""

    exit_code = ExitCode.LEASE_HELD


def describe(error: BaseException) -> str:
    """Describe an error on one line: its type, and the line of its text that says what happened.

    That is the last line in Python, and the first one in CUDA's libraries and the Hugging Face hub,
    which add advice. NCCL's first line gives the category and its last line the cause: both are
    kept. An error of this project is its message alone.
    """
    headline = _headline(str(error))
    if isinstance(error, UserError):
        return headline
    return ": ".join(filter(None, (type(error).__name__, headline)))


def reason_of(error: BaseException) -> str:
    """Return why something failed, for a message that says what it was: neither path nor type."""
    reason = getattr(error, "strerror", None) or str(error)  # strerror: of the system, of FFmpeg
    return _headline(reason) or type(error).__name__


def one_line(text: str) -> str:
    """Put a text on one line, with single blanks."""
    return " ".join(text.split())


def last_line(output: str) -> str:
    """Return the last line that a program has printed; empty if it has printed nothing."""
    return (output.strip().splitlines() or [""])[-1]


def is_disk_full(error: BaseException) -> bool:
    """Return whether a write failed because no space was left, as any of the writers says it."""
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return True
    return _NO_SPACE.search(str(error)) is not None


def without_appendix(text: str) -> str:
    """Strip the C++ stack, or the advice to developers, that torch may append to an error."""
    return re.split(r"Exception raised from |Set TORCHDYNAMO_VERBOSE=1 ", text)[0]


def _headline(text: str) -> str:
    text = without_appendix(text).strip().removesuffix("Last error:").strip()
    lines = [one_line(line) for line in text.splitlines() if re.search(r"\w", line)] or [""]
    of_library = [line for line in lines if _LIBRARY.search(line)]
    if not of_library:
        return lines[-1]
    first, last = of_library[0], lines[-1]
    return f"{first}: {last}" if "NCCL" in first and first != last else first


_NO_SPACE = re.compile(r"No space left on device|PytorchStreamWriter failed")
_LIBRARY = re.compile(
    r"(CUDA|cuDNN|cusolver|cuFFT|cuSPARSE|NCCL)( \w+)? error|ran out of memory"
    r"|\d{3} (client|server) error",
    re.I,
)
