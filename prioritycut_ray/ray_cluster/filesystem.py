"""Folders in the form that Ray Train and Ray Tune accept."""

from pyarrow.fs import FSSpecHandler, PyFileSystem

from prioritycut_ray.storage.folder import Folder


def ray_storage(folder: Folder) -> tuple[str, PyFileSystem | None]:
    """Return a folder's path, and its file system unless that is local, for a ``RunConfig``."""
    if folder.local is not None:
        return str(folder.local), None
    return folder.root, PyFileSystem(FSSpecHandler(folder.fs))
