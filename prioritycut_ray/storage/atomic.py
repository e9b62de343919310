"""Local files that are written completely or not at all."""

import os
import tempfile
from pathlib import Path


def flush(path: Path) -> None:
    """Flush a file, or the names in a folder, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomically(path: Path, data: bytes | memoryview) -> None:
    """Write a file that appears under its name only once it is complete."""
    descriptor, temporary = tempfile.mkstemp(prefix=".", suffix=path.suffix, dir=path.parent)
    try:
        with open(descriptor, "wb") as file:
            file.write(data)
        os.chmod(temporary, 0o644)  # mkstemp creates private files.
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
