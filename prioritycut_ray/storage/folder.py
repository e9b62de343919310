"""A folder, local or at any URL that fsspec knows, whose files are written atomically."""

import os
import shutil
import uuid
from pathlib import Path

from fsspec.implementations.local import LocalFileSystem

from prioritycut_ray.storage.atomic import flush
from prioritycut_ray.storage.filesystem import filesystem


class Folder:
    """A folder of small files that several processes share.

    Args:
        url: a path, or any URL that fsspec knows, such as ``s3://bucket/runs/mine``.

    Raises:
        UserError: if the URL's scheme is unknown, or its driver is not installed.
    """

    def __init__(self, url: str | os.PathLike[str]) -> None:
        self.url = os.fspath(url).rstrip("/")
        self.fs, self.root = filesystem(self.url)
        self.local = Path(self.root) if isinstance(self.fs, LocalFileSystem) else None
        """The folder if it is on a file system of this machine, else None."""

    def names(self, subfolder: str = "") -> list[str]:
        """List the names in this folder or in a subfolder; empty if it does not exist."""
        self.fs.invalidate_cache()  # other machines write here too
        try:
            paths = self.fs.ls(self.path(subfolder), detail=False)
        except FileNotFoundError:
            return []
        return sorted(path.rstrip("/").rsplit("/", 1)[-1] for path in paths)

    def path(self, name: str) -> str:
        """Return the path of a name below the folder, as the file system spells it."""
        return f"{self.root}/{name}" if name else self.root

    def exists(self, name: str) -> bool:
        """Return whether a file exists on the storage, whatever a cache says."""
        self.fs.invalidate_cache()
        return bool(self.fs.exists(self.path(name)))

    def read(self, name: str) -> bytes:
        """Read a file."""
        return bytes(self.fs.cat_file(self.path(name)))

    def write(self, name: str, content: bytes) -> None:
        """Write a file atomically."""
        if self.local is None:
            self.fs.pipe_file(self.path(name), content)
            return
        path = self.local / name
        partial = _write_partial(path, content)
        os.replace(partial, path)
        flush(path.parent)

    def create(self, name: str, content: bytes) -> bool:
        """Create a file atomically, unless it exists.

        Returns:
            Whether it was created; at most one of several concurrent calls succeeds.
        """
        if self.local is None:
            try:
                self.fs.pipe_file(self.path(name), content, mode="create")
            except OSError:  # drivers disagree on the type
                if not self.exists(name):
                    raise
                return False
            return True
        path = self.local / name
        partial = _write_partial(path, content)
        try:
            os.link(partial, path)  # open() would show an empty file first
        except (FileExistsError, FileNotFoundError):  # created, or cleaned up, by another process
            return False
        finally:
            partial.unlink(missing_ok=True)
        flush(path.parent)
        return True

    def append(self, name: str, line: str) -> None:
        """Append a line to a local file."""
        assert self.local is not None
        path = self.local / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a") as file:
            file.write(line)

    def remove(self, name: str) -> None:
        """Remove a file, or a folder and its contents, if it exists."""
        if self.local is None:
            self.fs.invalidate_cache()
            if self.fs.exists(self.path(name)):
                self.fs.rm(self.path(name), recursive=True)
            return
        path = self.local / name
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def _write_partial(path: Path, content: bytes) -> Path:
    """Write and flush a file beside a path, under a hidden name of its own."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    partial.write_bytes(content)
    flush(partial)
    return partial
