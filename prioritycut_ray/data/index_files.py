"""The file of an index: its seal, copies of remote ones, and which ones this machine has verified.

An index is sealed with a SHA-256 of its own bytes, in which the seal itself counts as zeros.
Hashing that of ten million clips takes seconds, so a machine does it once: when the file is
written, when it is fetched into the cache, or when it is first opened. Small ones are hashed every
time.
"""

import hashlib
import logging
import os
import re
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Final

import filelock

from prioritycut_ray.errors import UserError
from prioritycut_ray.storage.filesystem import FileSystem
from prioritycut_ray.storage.reading import read_bytes

log = logging.getLogger(__name__)

SMALL_BYTES: Final = 16 << 20
"""An index up to this size is read and verified by every process that opens it."""
FORMAT: Final = 2
"""Version of the file."""
KEPT_COPIES: Final = 16
"""Fetched indexes that stay in the cache; those that were opened last."""

_SEAL = re.compile(rb"prioritycut index (\d+), sha256 ([0-9a-f]{64})")
_NOTHING = b"0" * 64
_HEAD_BYTES = 1 << 16
_CHUNK = 64 << 20


class IndexDamaged(Exception):
    """Raised if the bytes of an index are not those that were written."""


# ---------------------------------------------------------------------------------------------
# The seal
# ---------------------------------------------------------------------------------------------


def seal_text() -> bytes:
    """Return the text that the head of a file must contain for :func:`seal_file` to fill in."""
    return b"prioritycut index %d, sha256 %s" % (FORMAT, _NOTHING)


def seal_file(path: Path) -> None:
    """Write the SHA-256 of a file into its seal."""
    with path.open("r+b") as file:
        _, place = _find_seal(file.read(_HEAD_BYTES))
        file.seek(0)
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        file.seek(place)
        file.write(digest.encode())


def verify_bytes(data: bytes) -> None:
    """Verify the seal of an index in memory.

    Raises:
        IndexDamaged: it does not match.
        UserError: the index has another format.
    """
    seal, place = _find_seal(data[:_HEAD_BYTES])
    digest = hashlib.sha256(data[:place])
    digest.update(_NOTHING)
    digest.update(memoryview(data)[place + len(_NOTHING) :])
    _compare(digest.hexdigest(), seal)


def verify_file(path: Path, cache_dir: str | None, *, again: bool = False) -> None:
    """Verify the seal of a file, unless this machine has verified this version of it.

    Args:
        path: the file.
        cache_dir: as for :func:`fetch_index`.
        again: verify it in any case.

    Raises:
        IndexDamaged: it does not match.
        UserError: the index has another format.
    """
    with suppress(OSError):
        if not again and _note_of(path, cache_dir).exists():
            return
    _verify_now(path)
    note_verified(path, cache_dir)


def note_verified(path: Path, cache_dir: str | None = None) -> None:
    """Record that this version of a file is intact, for all processes of this machine."""
    with suppress(OSError):  # The next process verifies it, then.
        _note_of(path, cache_dir).touch()


def _verify_now(path: Path) -> None:
    with path.open("rb") as file:
        head = bytearray(file.read(_HEAD_BYTES))
        seal, place = _find_seal(bytes(head))
        head[place : place + len(_NOTHING)] = _NOTHING
        digest = hashlib.sha256(head)
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    _compare(digest.hexdigest(), seal)


def _find_seal(head: bytes) -> tuple[str, int]:
    """Return the SHA-256 in the seal, and its place."""
    found = _SEAL.search(head)
    if found is None:
        raise IndexDamaged("it does not begin like an index")
    if int(found[1]) != FORMAT:
        raise UserError(
            f"an index of format {int(found[1])} cannot be read by this version, which reads "
            f"{FORMAT}; upgrade prioritycut_ray"
        )
    return found[2].decode(), found.start(2)


def _compare(digest: str, seal: str) -> None:
    if digest != seal:
        raise IndexDamaged("its checksum does not match")


# ---------------------------------------------------------------------------------------------
# The cache of a machine
# ---------------------------------------------------------------------------------------------


def fetch_index(fs: FileSystem, path: str, name: str, cache_dir: str | None = None) -> bytes | Path:
    """Fetch a remote index: its bytes if it is small, else a verified copy on this machine.

    Of several processes, one fetches it, and the others wait.

    Args:
        fs: the file system of the index.
        path: its path there.
        name: its URL, for messages.
        cache_dir: local folder for copies; a folder below the user's cache by default.

    Raises:
        FileNotFoundError, NotADirectoryError, IsADirectoryError: there is no such file.
        IndexDamaged: the checksum does not match.
        UserError: the storage or the cache cannot be used, or the index has another format.
    """
    head = read_bytes(fs, path, name, start=0, end=SMALL_BYTES)
    if len(head) < SMALL_BYTES:
        verify_bytes(head)
        return head
    seal, _ = _find_seal(head[:_HEAD_BYTES])
    try:
        folder = _folder(cache_dir)
        copy = folder / f"{seal}.arrow"
        with filelock.FileLock(f"{copy}.lock"):
            if not copy.exists():
                log.info("%s: fetching the index into %s", name, folder)
                _fetch(fs, path, name, copy)
        os.utime(copy)
        _remove_old_copies(folder)
    except OSError as error:
        if isinstance(error, UserError):
            raise
        raise UserError(
            f"{name}: the index cannot be cached on this machine ({error}); set data.cache_dir, "
            "or XDG_CACHE_HOME, to a folder on a local disk with room"
        ) from None
    return copy


def _fetch(fs: FileSystem, path: str, name: str, copy: Path) -> None:
    descriptor, temporary = tempfile.mkstemp(prefix=".", dir=copy.parent)
    try:
        with open(descriptor, "wb") as file:
            size = fs.size(path)
            for start in range(0, size, _CHUNK):
                file.write(read_bytes(fs, path, name, start=start, end=min(size, start + _CHUNK)))
        _verify_now(Path(temporary))
        os.replace(temporary, copy)
    finally:
        with suppress(FileNotFoundError):
            os.unlink(temporary)


def _remove_old_copies(folder: Path) -> None:
    """Remove all copies but the newest; processes that have mapped one keep it."""
    with suppress(FileNotFoundError):  # Another process removes them too.
        copies = sorted(folder.glob("*.arrow"), key=lambda path: path.stat().st_mtime)
        for copy in copies[:-KEPT_COPIES]:
            copy.unlink()


def _folder(cache_dir: str | None) -> Path:
    """Create and return the folder of fetched indexes.

    Raises:
        OSError: it cannot be created.
    """
    if cache_dir is not None:
        folder = Path(cache_dir, "indexes")
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        return folder
    try:
        base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        folder = Path(base, "prioritycut", "indexes")
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except (OSError, RuntimeError):  # A container without a home.
        folder = Path(tempfile.gettempdir(), f"prioritycut-indexes-{os.getuid()}")
        folder.mkdir(mode=0o700, exist_ok=True)
    # Private: what others put into it would be trusted.
    if folder.stat().st_uid != os.getuid():
        raise PermissionError(f"{folder} belongs to another user")
    return folder


def _note_of(path: Path, cache_dir: str | None) -> Path:
    """Return the file whose existence says that this version of an index is intact."""
    status = path.stat()
    version = (str(path.resolve()), status.st_ino, status.st_size, status.st_mtime_ns)
    name = hashlib.sha256(repr(version).encode()).hexdigest()
    return _folder(cache_dir) / f"{name}.verified"
