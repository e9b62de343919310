"""Reads with retries, and local copies of remote files."""

import logging
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from urllib.parse import urlsplit

from tenacity import (
    RetryCallState,
    Retrying,
    retry_if_exception,
    stop_after_attempt,
    wait_exponential,
    wait_random,
)

from prioritycut_ray.errors import UserError, describe
from prioritycut_ray.storage.filesystem import (
    ABSENT,
    WITHOUT_RANGES,
    FileSystem,
    filesystem,
    final_error,
    is_local,
    may_pass,
)

log = logging.getLogger(__name__)

ATTEMPTS = 6
# In seconds, doubled each time: with up to a second of jitter, about half a minute in all.
FIRST_WAIT = 0.5
LONGEST_WAIT = 15.0


def read_bytes(
    fs: FileSystem,
    path: str,
    name: str,
    *,
    start: int | None = None,
    end: int | None = None,
) -> bytes:
    """Read a file, or a range of its bytes, with patience.

    What may pass (a refused connection, a timeout, "slow down", an error of the server) is tried
    again after growing waits with jitter, whatever the storage; drivers may have retries of their
    own below these.

    Args:
        fs: the file system.
        path: of the file, on that file system.
        name: of the file, for messages.
        start: first byte; the file's first by default.
        end: byte to end before; the file's end by default.

    Raises:
        FileNotFoundError, NotADirectoryError, IsADirectoryError: there is no such file.
        UserError: the storage refused, or did not answer in :data:`ATTEMPTS` attempts.
    """
    retrying = Retrying(
        retry=retry_if_exception(may_pass),
        stop=stop_after_attempt(ATTEMPTS),
        wait=wait_exponential(FIRST_WAIT, LONGEST_WAIT) + wait_random(0, 2 * FIRST_WAIT),
        before_sleep=lambda state: _log_retry(name, state),
        reraise=True,
    )
    try:
        data: bytes = retrying(fs.cat_file, path, start=start, end=end)
    except OSError as error:
        if not may_pass(error):
            raise
        raise UserError(
            f"{name}: cannot be read, tried {ATTEMPTS} times ({describe(error)}); check the "
            "storage and the network to it, then start the same command again"
        ) from error
    if end is not None and len(data) > end - (start or 0):
        raise final_error(name, *WITHOUT_RANGES)
    return data


@contextmanager
def fetched(place: str) -> Iterator[Path]:
    """A file as one of this machine: itself, or a copy that lives as long as the body.

    Args:
        place: a path, or an fsspec URL.

    Raises:
        UserError: there is no such file, or an error of the body about the copy, with the URL.
    """
    if "://" not in place or is_local(place):
        yield Path(filesystem(place)[1] if "://" in place else place)
        return
    fs, path = filesystem(place)
    name = PurePosixPath(urlsplit(place).path).name or "file"
    with tempfile.TemporaryDirectory(prefix="prioritycut-") as folder:
        copy = Path(folder, name)
        try:
            fs.get_file(path, str(copy))
        except ABSENT as error:
            raise UserError(f"{place}: there is no such file") from error
        if not copy.is_file():
            raise UserError(f"{place}: is a folder, not a file")
        try:
            yield copy
        except UserError as error:
            if str(copy) not in str(error):
                raise
            raise UserError(str(error).replace(str(copy), place)) from error


def _log_retry(name: str, state: RetryCallState) -> None:
    """Log that a request is repeated, and why."""
    assert state.outcome is not None
    assert state.next_action is not None
    error = state.outcome.exception()
    assert error is not None
    log.warning(
        "%s: attempt %d of %d failed (%s); trying again in %.1f s",
        name,
        state.attempt_number,
        ATTEMPTS,
        describe(error),
        state.next_action.sleep,
    )
