"""The checkpoints of a run, in a local folder or on any storage that fsspec knows.

::

    attempts/000003.json     which process trains this run; only the newest may write
    step_0000400/            a checkpoint: files, and manifest.json with the SHA-256 of each
    validation/step_0000400.json  its scores on held-out clips
    metrics/000003-0000.jsonl  scalars that attempt 3 has logged
    tensorboard/             event files

A checkpoint is written under another name, flushed, and renamed once it is complete. Object stores
cannot rename: there the manifest is uploaded last, and a folder without one is not a checkpoint.

This module knows neither torch nor Ray.
"""

import logging
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

from prioritycut_ray.errors import UserError
from prioritycut_ray.runs.manifest import MANIFEST, parse_manifest, seal, verify
from prioritycut_ray.runs.retention import Retention, expendable
from prioritycut_ray.storage.atomic import flush
from prioritycut_ray.storage.claims import Claim
from prioritycut_ray.storage.folder import Folder

logger = logging.getLogger(__name__)

STEP_FORMAT = "step_{:07d}"
_STEP_NAME = re.compile(r"step_(\d{7,})")


def steps(folder: Folder) -> list[int]:
    """Return the steps that have a checkpoint, intact or damaged, in ascending order."""
    matches = filter(None, map(_STEP_NAME.fullmatch, folder.names()))
    found = sorted((int(match[1]), match[0]) for match in matches)
    return [step for step, name in found if folder.local or folder.exists(f"{name}/{MANIFEST}")]


def newest_intact(folder: Folder, scratch: Path) -> tuple[int, Path] | None:
    """Find the newest intact checkpoint; damaged ones are skipped with a warning.

    Args:
        folder: the run's folder.
        scratch: local folder that a remote checkpoint is copied to.

    Returns:
        Its step and its directory; None if the run has no checkpoint, intact or damaged.

    Raises:
        UserError: if the run has checkpoints, and all are damaged.
    """
    found, damage = steps(folder), ""
    for step in reversed(found):
        try:
            return step, fetch(folder, step, scratch)
        except UserError as error:
            logger.warning("%s; trying the previous one", error)
            damage = damage or f" ({error})"
    if not found:
        return None
    raise UserError(
        f"{folder.url}: none of the {len(found)} checkpoints is usable{damage}; restore one from a "
        "backup, or train under another name=..."
    )


def fetch(folder: Folder, step: int, scratch: Path) -> Path:
    """Return a checkpoint as a verified local directory.

    Args:
        folder: the run's folder.
        step: step of the checkpoint.
        scratch: local folder that a remote checkpoint is copied to.

    Raises:
        UserError: if it is damaged.
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
        raise UserError(f"{folder.url}/{name}: is not a complete checkpoint ({error})") from error
    verify(partial)
    os.replace(partial, directory)
    return directory


def clean(claim: Claim) -> None:
    """Remove what killed writers have left; older attempts that still write fail and notice."""
    folder = claim.folder
    for name in folder.names():
        unfinished = folder.local is None and not folder.exists(f"{name}/{MANIFEST}")
        if name.startswith(".step_") or (_STEP_NAME.fullmatch(name) and unfinished):
            folder.remove(name)
    for subfolder in ("attempts", "metrics", "validation"):
        for name in folder.names(subfolder):
            if name.startswith("."):
                folder.remove(f"{subfolder}/{name}")


def write_checkpoint(claim: Claim, step: int, write: Callable[[Path], None]) -> None:
    """Write a checkpoint, which nobody sees before it is complete.

    Args:
        claim: the claim of this attempt.
        step: step of the checkpoint.
        write: fills an empty directory.

    Raises:
        Superseded: if a newer attempt has taken the run over.
        OSError: if the storage fails, for instance because it is full.
    """
    claim.check()
    with _staging(claim, step) as directory:
        write(directory)
        seal(directory)
        _commit(claim, step, directory)


@contextmanager
def _staging(claim: Claim, step: int) -> Iterator[Path]:
    """Make an empty directory to write to, beside the checkpoints if they are local."""
    folder = claim.folder
    if folder.local is None:
        with tempfile.TemporaryDirectory(prefix="prioritycut-") as temporary:
            yield Path(temporary)
        return
    directory = folder.local / f".{STEP_FORMAT.format(step)}.{claim.number}"
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    try:
        yield directory
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def _commit(claim: Claim, step: int, directory: Path) -> None:
    folder, name = claim.folder, STEP_FORMAT.format(step)
    claim.check()
    if step in steps(folder):
        with tempfile.TemporaryDirectory(prefix="prioritycut-") as scratch:
            try:
                fetch(folder, step, Path(scratch))
            except UserError as error:
                logger.warning("%s; writing it again", error)
            else:
                return  # An attempt that was fenced off later has written the same before.
        claim.check()
        _retract(folder, name)
    if folder.local is not None:
        claim.check()
        os.replace(directory, folder.local / name)
        flush(folder.local)
        return
    for file in parse_manifest((directory / MANIFEST).read_bytes()):
        _upload(claim, directory / file, f"{name}/{file}")
    _upload(claim, directory / MANIFEST, f"{name}/{MANIFEST}")


def _upload(claim: Claim, file: Path, name: str) -> None:
    """Upload one file of a checkpoint.

    When an older attempt loses the run, one of its requests may still be under way. It must not
    replace what the newer attempt has written meanwhile: hence "create", not "replace".
    """
    folder = claim.folder
    claim.check()
    try:
        folder.fs.put_file(str(file), folder.path(name), mode="create")
    except OSError:
        if not folder.exists(name):
            raise
        claim.check()
        folder.fs.put_file(str(file), folder.path(name))


def _retract(folder: Folder, name: str) -> None:
    """Remove a checkpoint such that nobody ever sees a part of it."""
    if folder.local is not None:
        aside = f".{name}.removed"
        folder.remove(aside)
        os.replace(folder.local / name, folder.local / aside)
        folder.remove(aside)
        return
    folder.remove(f"{name}/{MANIFEST}")
    folder.remove(name)


def prune(
    claim: Claim, scores: dict[int, float | None], retention: Retention, held: Collection[int]
) -> None:
    """Remove the checkpoints that need not be kept, from storage and from ``scores``.

    Call it when the newest checkpoint in ``scores`` is known to be intact.

    Args:
        claim: the claim of this attempt.
        scores: metric of every checkpoint, by step.
        retention: which checkpoints are kept.
        held: steps of checkpoints that are kept in any case.
    """
    for step in set(expendable(scores, retention)) - set(held):
        claim.check()
        _retract(claim.folder, STEP_FORMAT.format(step))
        del scores[step]
