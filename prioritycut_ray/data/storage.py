"""Bytes from any storage: tried again when it stumbles, told in plain words when it refuses."""

import logging
from typing import Any

from fsspec import AbstractFileSystem
from tenacity import (
    RetryCallState,
    Retrying,
    retry_if_exception,
    stop_after_attempt,
    wait_exponential,
    wait_random,
)

from prioritycut_ray.errors import UserError

log = logging.getLogger(__name__)

ATTEMPTS = 6
# In seconds, doubled each time: with up to a second of jitter, about half a minute in all.
FIRST_WAIT = 0.5
LONGEST_WAIT = 15.0

ABSENT = (FileNotFoundError, NotADirectoryError, IsADirectoryError)
"""What is raised where there is no such file, bucket or folder."""
# botocore's, which need not be installed.
_NO_CREDENTIALS = ("NoCredentialsError", "PartialCredentialsError", "CredentialRetrievalError")
_DENIED_STATUS = (401, 403)


def read_bytes(
    fs: AbstractFileSystem,
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
        UserError: access is denied, or the storage did not answer in :data:`ATTEMPTS` attempts.
    """
    retrying = Retrying(
        retry=retry_if_exception(_may_pass),
        stop=stop_after_attempt(ATTEMPTS),
        wait=wait_exponential(FIRST_WAIT, LONGEST_WAIT) + wait_random(0, 2 * FIRST_WAIT),
        before_sleep=lambda state: _tell(name, state),
        reraise=True,
    )
    try:
        data: bytes = retrying(fs.cat_file, path, start=start, end=end)
    except ABSENT:
        raise
    except Exception as error:
        raise UserError(_why_not_read(name, error)) from error
    return data


def _may_pass(error: BaseException) -> bool:
    # Drivers raise errors of any kind for the network's faults: only the certain ones are final.
    return isinstance(error, Exception) and not isinstance(error, ABSENT) and not _denied(error)


def _denied(error: BaseException) -> bool:
    status: Any = getattr(error, "status", None)  # aiohttp's
    refused = isinstance(error, PermissionError) or status in _DENIED_STATUS
    return refused or type(error).__name__ in _NO_CREDENTIALS


def _why_not_read(name: str, error: Exception) -> str:
    if _denied(error):
        return (
            f"{name}: access denied ({_words(error)}); give this machine and every node of the "
            "cluster credentials that may read it"
        )
    return (
        f"{name}: cannot be read, tried {ATTEMPTS} times ({_words(error)}); check the storage and "
        "the network to it, then start the same command again"
    )


def _tell(name: str, state: RetryCallState) -> None:
    assert state.outcome is not None
    assert state.next_action is not None
    error = state.outcome.exception()
    assert error is not None
    log.warning(
        "%s: attempt %d of %d failed (%s); trying again in %.1f s",
        name,
        state.attempt_number,
        ATTEMPTS,
        _words(error),
        state.next_action.sleep,
    )


def _words(error: BaseException) -> str:
    """An error in one line."""
    return " ".join(f"{type(error).__name__}: {error}".split())
