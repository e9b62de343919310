"""The folder of a run, local or on any fsspec storage: who may write there, and what it holds.

::

    attempts/000003.json     who has trained this run, in order; the newest alone may write
    step_0000400/            a checkpoint: files, and manifest.json with the SHA-256 of each
    metrics/000003-0000.jsonl  scalars that attempt 3 has logged
    tensorboard/             event files

A checkpoint is written under another name, flushed, and renamed when it is whole. Object stores
know no renaming: there the manifest is uploaded last, and without it there is no checkpoint.

Knows neither torch nor Ray.
"""

import hashlib
import json
import logging
import math
import os
import re
import shutil
import socket
import tempfile
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

from fsspec.implementations.local import LocalFileSystem
from pydantic import BaseModel, ConfigDict

from prioritycut_ray.errors import Superseded, UserError
from prioritycut_ray.storage import filesystem

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
STEP_FORMAT = "step_{:07d}"
_STEP_NAME = re.compile(r"step_(\d{7,})")


class Attempt(BaseModel):
    """One group of workers that trains, or has trained, a run.

    Attributes:
        number: from 1; a newer attempt has a higher one.
        launch: id of the command that started it; that may start several groups in turn.
        host: of the process that took the run over.
        pid: of that process.
        started: time of day there, ISO 8601.
    """

    model_config = ConfigDict(frozen=True)

    number: int
    launch: str
    host: str
    pid: int
    started: str


class RunStorage:
    """The folder of a run.

    Args:
        url: a path, or any URL that fsspec knows, such as ``s3://bucket/runs/mine``.

    Raises:
        UserError: the URL's scheme is unknown, or its driver is not installed.
    """

    def __init__(self, url: str | os.PathLike[str]) -> None:
        self.url = os.fspath(url).rstrip("/")
        self.fs, self.root = filesystem(self.url)
        self.local = Path(self.root) if isinstance(self.fs, LocalFileSystem) else None
        """The folder itself where it is on a file system of this machine."""

    def names(self, folder: str = "") -> list[str]:
        """What lies in a folder below the run's; empty if there is no such folder."""
        self.fs.invalidate_cache()  # other machines write here too
        try:
            paths = self.fs.ls(self.path(folder), detail=False)
        except FileNotFoundError:
            return []
        return sorted(path.rstrip("/").rsplit("/", 1)[-1] for path in paths)

    def path(self, name: str) -> str:
        """A name below the folder, as the file system spells it."""
        return f"{self.root}/{name}" if name else self.root

    def exists(self, name: str) -> bool:
        """Whether there is such a file, seen from storage and not from a cache."""
        self.fs.invalidate_cache()
        return bool(self.fs.exists(self.path(name)))

    def read(self, name: str) -> bytes:
        """A whole file."""
        return bytes(self.fs.cat_file(self.path(name)))

    def write(self, name: str, content: bytes) -> None:
        """Write a whole file, in one piece for every reader."""
        if self.local is None:
            self.fs.pipe_file(self.path(name), content)
            return
        path = self.local / name
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
        partial.write_bytes(content)
        flush(partial)
        os.replace(partial, path)
        flush(path.parent)

    def create(self, name: str, content: bytes) -> bool:
        """Write a file that must not be there yet.

        Returns:
            Whether it was written: of several who try at once, at most one succeeds.
        """
        if self.local is None:
            try:
                self.fs.pipe_file(self.path(name), content, mode="create")
            except OSError:  # drivers do not agree on which
                if not self.exists(name):
                    raise
                return False
            return True
        path = self.local / name
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
        partial.write_bytes(content)
        flush(partial)
        try:
            os.link(partial, path)  # whole at once, where open() would show an empty file first
        except (FileExistsError, FileNotFoundError):  # another one's, or cleaned away by another
            return False
        finally:
            partial.unlink(missing_ok=True)
        flush(path.parent)
        return True

    def append(self, name: str, line: str) -> None:
        """Add a line to a local file."""
        assert self.local is not None
        path = self.local / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a") as file:
            file.write(line)

    def remove(self, name: str) -> None:
        """Remove a file or a folder with all that is in it, if it is there."""
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

    def steps(self) -> list[int]:
        """Steps with a checkpoint, good or damaged, in ascending order."""
        matches = filter(None, map(_STEP_NAME.fullmatch, self.names()))
        found = sorted((int(match[1]), match[0]) for match in matches)
        return [step for step, name in found if self.local or self.exists(f"{name}/{MANIFEST}")]

    def newest_good(self, scratch: Path) -> tuple[int, Path] | None:
        """The newest checkpoint that is whole; damaged ones are passed over with a warning.

        Args:
            scratch: folder where a checkpoint is put that is not on this machine.

        Returns:
            Its step and its directory; None if the run has no checkpoint, good or damaged.

        Raises:
            UserError: there are checkpoints, and all are damaged.
        """
        steps, damage = self.steps(), ""
        for step in reversed(steps):
            try:
                return step, self.fetch(step, scratch)
            except UserError as error:
                logger.warning("%s; trying the one before it", error)
                damage = damage or f"; the newest is not: {error}"
        if not steps:
            return None
        raise UserError(
            f"{self.url}: no usable checkpoint among the {len(steps)} here{damage}; give the "
            "folder of a run that has written at least one, see train.checkpoint_every"
        )

    def fetch(self, step: int, scratch: Path) -> Path:
        """A checkpoint as a verified local directory.

        Args:
            step: of the checkpoint.
            scratch: folder to put it into if it is not on this machine.

        Raises:
            UserError: it is damaged.
        """
        name = STEP_FORMAT.format(step)
        if self.local is not None:
            verify(self.local / name)
            return self.local / name
        directory, partial = scratch / name, scratch / f".{name}"
        for former in (directory, partial):
            shutil.rmtree(former, ignore_errors=True)
        partial.mkdir(parents=True)
        self.fs.invalidate_cache()
        try:
            for file in [MANIFEST, *_manifest(self.read(f"{name}/{MANIFEST}"))]:
                self.fs.get_file(self.path(f"{name}/{file}"), str(partial / file))
        except (FileNotFoundError, ValueError) as error:
            raise UserError(f"{self.url}/{name}: no complete checkpoint ({error})") from error
        verify(partial)
        os.replace(partial, directory)
        return directory


# ---------------------------------------------------------------------------------------------
# Manifests
# ---------------------------------------------------------------------------------------------


def seal(directory: Path) -> None:
    """Write the manifest of a checkpoint directory, its last file, and flush everything to disk."""
    files = sorted(path for path in directory.iterdir() if path.name != MANIFEST)
    manifest = {path.name: _sha256(path) for path in files}
    partial = directory / f".{MANIFEST}"
    partial.write_text(json.dumps(manifest, indent=1))
    for path in (*files, partial):
        flush(path)
    os.replace(partial, directory / MANIFEST)
    flush(directory)


def verify(directory: Path) -> None:
    """Compare every file of a checkpoint directory with its manifest.

    Raises:
        UserError: naming the file that is missing or damaged.
    """
    try:
        for name, expected in _manifest((directory / MANIFEST).read_bytes()).items():
            if _sha256(directory / name) != expected:
                raise UserError(f"{directory / name}: damaged checkpoint (checksum differs)")
    except (FileNotFoundError, NotADirectoryError, ValueError) as error:
        raise UserError(f"{directory}: no complete checkpoint ({error})") from error


def _manifest(content: bytes) -> dict[str, str]:
    """Names and checksums; a damaged manifest is a ValueError."""
    manifest = json.loads(content)
    if not isinstance(manifest, dict) or not manifest:
        raise ValueError(f"{MANIFEST} names no files")
    if not all(name == Path(name).name for name in manifest):
        raise ValueError(f"{MANIFEST} names files elsewhere")
    return manifest


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def flush(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk itself."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# ---------------------------------------------------------------------------------------------
# The lease
# ---------------------------------------------------------------------------------------------


class Lease(NamedTuple):
    """The right to write into a run's folder, until a newer attempt takes it."""

    storage: RunStorage
    attempt: Attempt

    def check(self) -> None:
        """Make sure that no newer attempt has taken the run over.

        Raises:
            Superseded: one has.
        """
        newer = _attempt_name(self.attempt.number + 1)
        if self.storage.exists(newer):
            other = Attempt.model_validate_json(self.storage.read(newer))
            raise _superseded(self.storage, self.attempt.number, other)


def claim(storage: RunStorage, launch: str, *, first: bool) -> Lease:
    """Take a run over: from now on every older attempt loses at its next write.

    Args:
        storage: the run's folder.
        launch: id of the command that trains.
        first: this is the launch itself, which wins over whoever trains the run; otherwise it is
            one of the groups of workers that the launch starts, and loses to a newer launch.

    Raises:
        Superseded: another launch has taken the run over.
    """
    while True:
        number = _newest_attempt(storage)
        if number and not first:
            newest = Attempt.model_validate_json(storage.read(_attempt_name(number)))
            if newest.launch != launch:
                raise _superseded(storage, None, newest)
        attempt = Attempt(
            number=number + 1,
            launch=launch,
            host=socket.gethostname(),
            pid=os.getpid(),
            started=datetime.now(UTC).isoformat(timespec="seconds"),
        )
        if storage.create(_attempt_name(attempt.number), attempt.model_dump_json().encode()):
            return Lease(storage, attempt)


def _newest_attempt(storage: RunStorage) -> int:
    stems = (name.removesuffix(".json") for name in storage.names("attempts"))
    return max((int(stem) for stem in stems if stem.isdigit()), default=0)


def _attempt_name(number: int) -> str:
    return f"attempts/{number:06d}.json"


def _superseded(storage: RunStorage, mine: int | None, other: Attempt) -> Superseded:
    who = "this attempt" if mine is None else f"attempt {mine}"
    return Superseded(
        f"{storage.url}: {who} was superseded by attempt {other.number} (host {other.host}, "
        f"process {other.pid}, since {other.started}) and stops, so that the two do not mix; let "
        "the newer one go on, or stop it before you start the run again"
    )


# ---------------------------------------------------------------------------------------------
# Writing and retention
# ---------------------------------------------------------------------------------------------


def clean(lease: Lease) -> None:
    """Remove what killed writes have left; older attempts that still write fail and notice."""
    storage = lease.storage
    for name in storage.names():
        unfinished = storage.local is None and not storage.exists(f"{name}/{MANIFEST}")
        if name.startswith(".step_") or (_STEP_NAME.fullmatch(name) and unfinished):
            storage.remove(name)
    for folder in ("attempts", "metrics"):
        for name in storage.names(folder):
            if name.startswith("."):
                storage.remove(f"{folder}/{name}")


def write_checkpoint(lease: Lease, step: int, write: Callable[[Path], None]) -> None:
    """Write a checkpoint; nobody sees it before it is whole.

    Args:
        lease: of this attempt.
        step: of the checkpoint.
        write: fills an empty directory.

    Raises:
        Superseded: a newer attempt has taken the run over.
        OSError: the storage refused, for instance because it is full.
    """
    lease.check()
    with _staging(lease, step) as directory:
        write(directory)
        seal(directory)
        _commit(lease, step, directory)


@contextmanager
def _staging(lease: Lease, step: int) -> Iterator[Path]:
    """An empty directory to write in; beside the checkpoints if they are local."""
    storage, name = lease.storage, STEP_FORMAT.format(step)
    if storage.local is None:
        with tempfile.TemporaryDirectory(prefix="prioritycut-") as folder:
            yield Path(folder)
        return
    directory = storage.local / f".{name}.{lease.attempt.number}"
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    try:
        yield directory
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def _commit(lease: Lease, step: int, directory: Path) -> None:
    storage, name = lease.storage, STEP_FORMAT.format(step)
    lease.check()
    if step in storage.steps():
        with tempfile.TemporaryDirectory(prefix="prioritycut-") as scratch:
            try:
                storage.fetch(step, Path(scratch))
            except UserError as error:
                logger.warning("%s; it is written anew", error)
            else:
                return  # an attempt that was fenced later has written the same before
        lease.check()
        _retract(storage, name)
    if storage.local is not None:
        lease.check()
        os.replace(directory, storage.local / name)
        flush(storage.local)
        return
    for file in _manifest((directory / MANIFEST).read_bytes()):
        _upload(lease, directory / file, f"{name}/{file}")
    _upload(lease, directory / MANIFEST, f"{name}/{MANIFEST}")


def _upload(lease: Lease, file: Path, name: str) -> None:
    """Upload one file of a checkpoint.

    Only one of an older attempt's requests can still be under way when it has lost the lease. It
    must not replace what the newer attempt has written meanwhile: hence "create", not "replace".
    """
    storage = lease.storage
    lease.check()
    try:
        storage.fs.put_file(str(file), storage.path(name), mode="create")
    except OSError:
        if not storage.exists(name):
            raise
        lease.check()
        storage.fs.put_file(str(file), storage.path(name))


def _retract(storage: RunStorage, name: str) -> None:
    """Remove a checkpoint so that it is at no time half there."""
    if storage.local is not None:
        aside = f".{name}.removed"
        storage.remove(aside)
        os.replace(storage.local / name, storage.local / aside)
        storage.remove(aside)
        return
    storage.remove(f"{name}/{MANIFEST}")
    storage.remove(name)


class Retention(NamedTuple):
    """Which checkpoints are kept.

    Attributes:
        newest: so many of the newest, at least 1.
        best: so many of the best by a metric, lower being better.
        every: those at multiples of so many steps; 0 = none.
    """

    newest: int
    best: int
    every: int


def expendable(scores: Mapping[int, float | None], retention: Retention) -> list[int]:
    """Steps whose checkpoints need not be kept.

    Args:
        scores: the metric of every checkpoint, by step; None where it is unknown.
        retention: which are kept.
    """
    steps = sorted(scores)
    kept = {0, *steps[-retention.newest :]}  # 0: weights that were imported, not trained here
    if retention.every:
        kept |= {step for step in steps if step % retention.every == 0}
    scored = sorted(
        (score, -step)
        for step, score in scores.items()
        if score is not None and math.isfinite(score)
    )
    kept |= {-step for _, step in scored[: retention.best]}
    return [step for step in steps if step not in kept]


def prune(lease: Lease, scores: dict[int, float | None], retention: Retention) -> None:
    """Remove the checkpoints that need not be kept, from storage and from ``scores``.

    To be called when the newest of ``scores`` has just been written, so that one is good.
    """
    for step in expendable(scores, retention):
        lease.check()
        _retract(lease.storage, STEP_FORMAT.format(step))
        del scores[step]
