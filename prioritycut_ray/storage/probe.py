"""Whether a storage can be written, and whether all nodes share it."""

import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager

from prioritycut_ray.errors import UserError
from prioritycut_ray.storage.filesystem import filesystem

NOT_SHARED = "files that the driver writes there cannot be seen from this node"
SHARE = "use a path on a file system that all nodes share, or a URL such as s3://bucket/runs"
"""What to do if a storage is not shared."""


@contextmanager
def marker(url: str) -> Iterator[str]:
    """Keep an empty file in a folder while the body runs, for :func:`has_marker` on other nodes.

    Yields:
        The name of the file.
    """
    fs, root = filesystem(url)
    name = f".probe-{uuid.uuid4().hex}"
    fs.makedirs(root, exist_ok=True)
    fs.pipe_file(f"{root}/{name}", b"")
    try:
        yield name
    finally:
        fs.rm_file(f"{root}/{name}")


def has_marker(url: str, name: str) -> bool:
    """Return whether this machine sees the file of :func:`marker`."""
    fs, root = filesystem(url)
    return bool(fs.exists(f"{root}/{name}"))


def check_writable(url: str) -> None:
    """Write, read and delete a file in a folder.

    Raises:
        UserError: if one of them has no effect.
        OSError: if one of them is refused.
    """
    fs, root = filesystem(url)
    path, content = f"{root}/.probe-{uuid.uuid4().hex}", os.urandom(2**16)
    fs.makedirs(root, exist_ok=True)
    fs.pipe_file(path, content)
    if fs.cat_file(path) != content:
        raise UserError(f"{url}: a file does not read back as it was written; use another storage")
    fs.rm_file(path)
    if fs.exists(path):
        raise UserError(f"{url}: a deleted file still exists; allow deletion there")
