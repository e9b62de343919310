"""A bounded folder of clips from remote shards, shared by all processes of a machine.

diskcache keeps its index in SQLite, so any number of processes may read, write and evict at once,
and a killed one leaves nothing incomplete that is ever read. Clips are stored under their SHA-256,
which readers verify; those without one, under their place.
"""

import functools
import os
import sqlite3
from pathlib import Path
from typing import NamedTuple

import diskcache

from prioritycut_ray.errors import UserError

# Raised by operations when the disk is full or gone, or locked by others for too long.
_FAILURES = (OSError, sqlite3.Error, diskcache.Timeout)


class ClipCache(NamedTuple):
    """Place and size limit of the cache; it can be sent to other processes.

    Attributes:
        folder: on a local disk; created if needed.
        limit: bytes; a process that stores a clip evicts the oldest ones above this limit.
    """

    folder: str
    limit: int

    def check(self) -> None:
        """Create the folder.

        Raises:
            UserError: it cannot be created or written.
        """
        try:
            # Private: what others put into it would be trusted.
            Path(self.folder).mkdir(mode=0o700, parents=True, exist_ok=True)
            # Closed again: loader workers are forked, and must not inherit SQLite's connection.
            _open(self.folder, self.limit).close()
        except _FAILURES as error:
            raise UserError(
                f"data.cache_dir={self.folder}: cannot be used ({error}); choose a folder on a "
                "local disk with room, or null"
            ) from None

    def get(self, name: str) -> bytes | None:
        """Return the unverified bytes of a clip; None if it is not in the cache."""
        try:
            data: bytes | None = _opened(self.folder, self.limit, os.getpid()).get(name)
        except _FAILURES:
            return None
        return data

    def put(self, name: str, data: bytes) -> None:
        """Store a clip and evict others; failures such as a full disk are ignored."""
        try:
            _opened(self.folder, self.limit, os.getpid()).set(name, data)
        except _FAILURES:
            return


@functools.lru_cache(maxsize=1)
def _opened(folder: str, limit: int, pid: int) -> diskcache.Cache:
    """Open the cache once per process: a forked process opens its own."""
    return _open(folder, limit)


def _open(folder: str, limit: int) -> diskcache.Cache:
    # The order of the stream is random, so evicting the oldest clip is as good as any policy, and
    # reads need not record their time.
    return diskcache.Cache(folder, size_limit=limit, eviction_policy="least-recently-stored")
