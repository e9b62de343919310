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

import logging
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from prioritycut_ray.errors import UserError
from prioritycut_ray.runs.attempts import Lease
from prioritycut_ray.runs.manifest import MANIFEST, parse_manifest, seal, verify
from prioritycut_ray.runs.retention import Retention, expendable
from prioritycut_ray.storage.atomic import flush
from prioritycut_ray.storage.folder import Folder

logger = logging.getLogger(__name__)

STEP_FORMAT = "step_{:07d}"
_STEP_NAME = re.compile(r"step_(\d{7,})")


def steps(folder: Folder) -> list[int]:
    """Steps with a checkpoint, good or damaged, in ascending order."""
    matches = filter(None, map(_STEP_NAME.fullmatch, folder.names()))
    found = sorted((int(match[1]), match[0]) for match in matches)
    return [step for step, name in found if folder.local or folder.exists(f"{name}/{MANIFEST}")]


def newest_good(folder: Folder, scratch: Path) -> tuple[int, Path] | None:
    """The newest checkpoint that is whole; damaged ones are passed over with a warning.

    Args:
        folder: of the run.
        scratch: folder where a checkpoint is put that is not on this machine.

    Returns:
        Its step and its directory; None if the run has no checkpoint, good or damaged.

    Raises:
        UserError: there are checkpoints, and all are damaged.
    """
    found, damage = steps(folder), ""
    for step in reversed(found):
        try:
            return step, fetch(folder, step, scratch)
        except UserError as error:
            logger.warning("%s; trying the one before it", error)
            damage = damage or f"; the newest is not: {error}"
    if not found:
        return None
    raise UserError(
        f"{folder.url}: no usable checkpoint among the {len(found)} here{damage}; give the "
        "folder of a run that has written at least one, see train.checkpoint_every"
    )


def fetch(folder: Folder, step: int, scratch: Path) -> Path:
    """A checkpoint as a verified local directory.

    Args:
        folder: of the run.
        step: of the checkpoint.
        scratch: folder to put it into if it is not on this machine.

    Raises:
        UserError: it is damaged.
    """
    name = STEP_FORMAT.format(step)
    if folder.local is not None:
        verify(folder.local / name)
        return folder.local / name
    directory, partial = scratch / name, scratch / f".{name}"
    for former in (directory, partial):
        shutil.rmtree(former, ignore_errors=True)
    partial.mkdir(parents=True)
    folder.fs.invalidate_cache()
    try:
        for file in [MANIFEST, *parse_manifest(folder.read(f"{name}/{MANIFEST}"))]:
            folder.fs.get_file(folder.path(f"{name}/{file}"), str(partial / file))
    except (FileNotFoundError, ValueError) as error:
        raise UserError(f"{folder.url}/{name}: no complete checkpoint ({error})") from error
    verify(partial)
    os.replace(partial, directory)
    return directory


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
    if step in steps(storage):
        with tempfile.TemporaryDirectory(prefix="prioritycut-") as scratch:
            try:
                fetch(storage, step, Path(scratch))
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
    for file in parse_manifest((directory / MANIFEST).read_bytes()):
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


def _retract(storage: Folder, name: str) -> None:
    """Remove a checkpoint so that it is at no time half there."""
    if storage.local is not None:
        aside = f".{name}.removed"
        storage.remove(aside)
        os.replace(storage.local / name, storage.local / aside)
        storage.remove(aside)
        return
    storage.remove(f"{name}/{MANIFEST}")
    storage.remove(name)


def prune(lease: Lease, scores: dict[int, float | None], retention: Retention) -> None:
    """Remove the checkpoints that need not be kept, from storage and from ``scores``.

    To be called when the newest of ``scores`` has just been written, so that one is good.
    """
    for step in expendable(scores, retention):
        lease.check()
        _retract(lease.storage, STEP_FORMAT.format(step))
        del scores[step]
