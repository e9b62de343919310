"""Read files with retries, and make local copies of remote ones."""

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
    is_transient,
)
from prioritycut_ray.storage.paths import is_url

log = logging.getLogger(__name__)

ATTEMPTS = 6
# In seconds; doubled each time. With up to a second of jitter, about half a minute in total.
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
    """Read a file, or a range of its bytes, with retries.

    Transient errors (a refused connection, a timeout, "slow down", a server error) are retried with
    exponential backoff and jitter on any storage; drivers may retry on their own below that.

    Args:
        fs: the file system.
        path: path of the file on that file system.
        name: name of the file for messages.
        start: first byte; the start of the file by default.
        end: byte to stop before; the end of the file by default.

    Raises:
        FileNotFoundError, NotADirectoryError, IsADirectoryError: if there is no such file.
        UserError: if the storage refused, or did not answer in :data:`ATTEMPTS` attempts.
    """
    retrying = Retrying(
        retry=retry_if_exception(is_transient),
        stop=stop_after_attempt(ATTEMPTS),
        wait=wait_exponential(FIRST_WAIT, LONGEST_WAIT) + wait_random(0, 2 * FIRST_WAIT),
        before_sleep=lambda state: _log_retry(name, state),
        reraise=True,
    )
    try:
        data: bytes = retrying(fs.cat_file, path, start=start, end=end)
    except OSError as error:
        if not is_transient(error):
            raise
        raise UserError(
            f"{name}: cannot be read, tried {ATTEMPTS} times ({describe(error)}); check the "
            "storage and the network to it, then run the same command again"
        ) from error
    if end is not None and len(data) > end - (start or 0):
        raise final_error(name, *WITHOUT_RANGES)
    return data


@contextmanager
def fetched(place: str) -> Iterator[Path]:
    """Provide a file on this machine: the file itself, or a copy that exists while the body runs.

    Args:
        place: a path, or an fsspec URL.

    Raises:
        UserError: if there is no such file. Errors of the body name the URL instead of the copy.
    """
    if not is_url(place) or is_local(place):
        yield Path(filesystem(place)[1] if is_url(place) else place)
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
    """Log that a request is retried, and why."""
    assert state.outcome is not None
    assert state.next_action is not None
    error = state.outcome.exception()
    assert error is not None
    log.warning(
        "%s: attempt %d of %d failed (%s); retrying in %.1f s",
        name,
        state.attempt_number,
        ATTEMPTS,
        describe(error),
        state.next_action.sleep,
    )
