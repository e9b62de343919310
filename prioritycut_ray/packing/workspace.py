"""The state of a packing run: what it was asked to do, and the parts that are finished.

Everything is in one hidden folder beside the shards, and each file in it appears only when it is
complete. A run that was killed, even by ``kill -9`` or a power failure, resumes when the same
command is run again.
"""

import json
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import filelock
from fsspec.implementations.local import LocalFileSystem

from prioritycut_ray.data.index import has_index
from prioritycut_ray.data.shards import TEMPORARY_NAME
from prioritycut_ray.errors import UserError
from prioritycut_ray.storage.filesystem import filesystem

FOLDER_NAME = ".packing"
JOB_NAME = "job.json"
REJECTED_NAME = "rejected.csv"


class Workspace:
    """The finished parts of a run, by name."""

    def __init__(self, out: str) -> None:
        self.out = out
        self._fs, self._root = filesystem(out)
        self._folder = f"{self._root}/{FOLDER_NAME}"
        self._names: set[str] = set()

    def kept(self, name: str) -> bytes | None:
        """Return the part of this name, or None."""
        if name not in self._names:
            return None
        data: bytes = self._fs.cat_file(f"{self._folder}/{name}.part")
        return data

    def keep(self, name: str, part: bytes) -> None:
        """Store a part atomically."""
        self._publish(f"{name}.part", part)
        self._names.add(name)

    def clear(self) -> None:
        """Remove the folder when the run is finished."""
        self._fs.rm(self._folder, recursive=True)

    def _publish(self, name: str, data: bytes) -> None:
        temporary = f"{self._folder}/{TEMPORARY_NAME}"
        self._fs.pipe_file(temporary, data)
        self._fs.mv(temporary, f"{self._folder}/{name}")

    @contextmanager
    def claimed(self, job: dict[str, Any], *, appending: bool) -> Iterator[None]:
        """Claim the output folder for a new job, or resume the same job.

        On a local disk no other run can claim it at the same time.

        Args:
            job: what the command is asked to do, as JSON.
            appending: the folder contains a data set, to which the job adds.

        Raises:
            UserError: the folder is in use for something else.
        """
        self._fs.invalidate_cache()
        if self._fs.exists(self._root) and not self._fs.isdir(self._root):
            raise UserError(f"{self.out}: is a file; choose another --out")
        if not appending and not self._fs.exists(f"{self._folder}/{JOB_NAME}"):
            self._check_unused()
        self._fs.makedirs(self._folder, exist_ok=True)
        with self._locked():
            self._start_or_resume(job)
            yield

    def _locked(self) -> AbstractContextManager[Any]:
        if not isinstance(self._fs, LocalFileSystem):
            return nullcontext()
        try:
            # The operating system releases it when the process ends, however it ends.
            return filelock.FileLock(f"{self._folder}/lock").acquire(timeout=0)
        except filelock.Timeout:
            raise UserError(
                f"{self.out}: another run is packing into it; wait for it or choose another --out"
            ) from None

    def _start_or_resume(self, job: dict[str, Any]) -> None:
        path = f"{self._folder}/{JOB_NAME}"
        if self._fs.exists(path):
            self._check_same(json.loads(self._fs.cat_file(path)), job)
        else:
            self._publish(JOB_NAME, json.dumps(job, indent=1).encode())
        names = (path.rpartition("/")[2] for path in self._fs.ls(self._folder, detail=False))
        self._names = {name.removesuffix(".part") for name in names if name.endswith(".part")}

    def _check_same(self, there: dict[str, Any], job: dict[str, Any]) -> None:
        if there == job:
            return
        differing = sorted(key for key in {*there, *job} if there.get(key) != job.get(key))
        raise UserError(
            f"{self.out}: contains an unfinished run with other {' and '.join(differing)} "
            f"({', '.join(f'{key} {_shown(there.get(key))}' for key in differing)}); "
            f"run that command again to finish it, or remove {self.out}/{FOLDER_NAME}"
        )

    def _check_unused(self) -> None:
        if not self._fs.exists(self._root):
            return
        paths = self._fs.ls(self._root, detail=False)
        names = {path.rstrip("/").rpartition("/")[2] for path in paths}
        # What a run without a usable video leaves behind does not block the next one.
        if names - {REJECTED_NAME, FOLDER_NAME}:
            hint = "`prioritycut data append` adds clips to it; else " * has_index(names)
            raise UserError(f"{self.out}: is not empty; {hint}choose another --out or remove it")


def _shown(value: Any) -> str:
    return " ".join(value) if isinstance(value, list) else str(value)
