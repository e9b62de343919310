"""A bounded folder of clips from remote shards, shared by all processes of a machine.

diskcache keeps the books in SQLite, so any number of processes may read, write and evict at once,
and one that is killed leaves nothing half-written that is ever read. Clips go by their SHA-256 and
are checked against it by whoever reads them.
"""

import functools
import os
import sqlite3
from pathlib import Path
from typing import NamedTuple

import diskcache

from prioritycut_ray.errors import UserError

# What its operations raise where the disk is full, gone or held too long by others.
_FAILURES = (OSError, sqlite3.Error, diskcache.Timeout)


class ClipCache(NamedTuple):
    """Where the cache is and how large it may grow; it may be sent to other processes.

    Attributes:
        folder: on a local disk; made if need be.
        limit: bytes; a process that has just stored a clip evicts the oldest ones above it.
    """

    folder: str
    limit: int

    def check(self) -> None:
        """Make the folder.

        Raises:
            UserError: if it cannot be made or written.
        """
        try:
            # Private: what others put into it would be believed.
            Path(self.folder).mkdir(mode=0o700, parents=True, exist_ok=True)
            # Closed again: loader workers are forked, and SQLite must not be carried along.
            _open(self.folder, self.limit).close()
        except _FAILURES as error:
            raise UserError(
                f"data.cache_dir={self.folder}: cannot be used ({error}); choose a folder on a "
                "local disk with room, or null"
            ) from None

    def get(self, sha256: str) -> bytes | None:
        """Look up a clip; None if it is not there. Not verified."""
        try:
            data: bytes | None = _opened(self.folder, self.limit, os.getpid()).get(sha256)
        except _FAILURES:
            return None
        return data

    def put(self, sha256: str, data: bytes) -> None:
        """Store a clip and evict others; a disk that is full is no reason to stop."""
        try:
            _opened(self.folder, self.limit, os.getpid()).set(sha256, data)
        except _FAILURES:
            return


@functools.lru_cache(maxsize=1)
def _opened(folder: str, limit: int, pid: int) -> diskcache.Cache:
    """Keep the cache open in this process, and in none that is forked from it."""
    return _open(folder, limit)


def _open(folder: str, limit: int) -> diskcache.Cache:
    # The order of the stream is random, so the oldest clip is as good to evict as any, and
    # reading need not write down when it read.
    return diskcache.Cache(
        folder, size_limit=limit, eviction_policy="least-recently-stored", cull_limit=64
    )
