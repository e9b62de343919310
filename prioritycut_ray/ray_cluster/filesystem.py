"""A folder as Ray takes it."""

from pyarrow.fs import FSSpecHandler, PyFileSystem

from prioritycut_ray.storage.folder import Folder


def ray_storage(storage: Folder) -> tuple[str, PyFileSystem | None]:
    """A folder as Ray takes it: the path, and its file system unless that is of this machine."""
    if storage.local is not None:
        return str(storage.local), None
    return storage.root, PyFileSystem(FSSpecHandler(storage.fs))
