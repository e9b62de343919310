"""The checkpoint of a run, and what it says of itself."""

import functools
import hashlib
import os
import shutil
import tempfile
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from prioritycut_ray.config import Config, parse_config, read_mapping
from prioritycut_ray.errors import UserError
from prioritycut_ray.runs.checkpoints import fetch, newest_good, steps
from prioritycut_ray.runs.manifest import MANIFEST, verify
from prioritycut_ray.storage.folder import Folder


class Progress(BaseModel):
    """How far a run has come.

    Attributes:
        step: optimiser steps taken.
        samples: frame pairs seen by all workers together.
        skipped: updates skipped because something was not finite.
        skipped_in_a_row: how many of them come last, for each network.
        averaged: updates of the moving average.
        seed: of everything random.
        data: fingerprint of the data set; empty for weights that were imported.
    """

    model_config = ConfigDict(frozen=True)

    step: int
    samples: int
    skipped: int
    skipped_in_a_row: dict[str, int]
    averaged: int
    seed: int
    data: str


def read_config(directory: Path) -> Config:
    """The resolved configuration stored in a checkpoint."""
    path = str(directory / "config.yaml")
    return parse_config(read_mapping(path), path)


def read_progress(directory: Path) -> Progress:
    """How far the run had come.

    Raises:
        UserError: an older version of this project wrote the checkpoint.
    """
    path = directory / "progress.json"
    try:
        return Progress.model_validate_json(path.read_bytes())
    except ValidationError as error:
        problem = error.errors()[0]
        raise UserError(
            f"{path}: written by another version of this project "
            f"({problem['loc'][0]}: {problem['msg']}); train with that version, or start afresh "
            "under another name=..."
        ) from error


def locate_checkpoint(run: str | Path) -> str:
    """Where the newest good checkpoint of a run is, as every machine can find it.

    Args:
        run: the folder of a run, or one of its checkpoints; a path or any fsspec URL.

    Raises:
        UserError: there is none.
    """
    storage, directory = Folder(run), find_checkpoint(run)
    if storage.local is not None:
        return str(directory)
    return (
        storage.url if storage.url.endswith(directory.name) else f"{storage.url}/{directory.name}"
    )


def local_copy(checkpoint: str | Path) -> Path:
    """A checkpoint as a directory on this machine, copied there if it is elsewhere.

    A copy lives until :data:`COPIES` others have been asked for.
    """
    if "://" not in str(checkpoint):
        return Path(checkpoint)
    run, _, name = str(checkpoint).rstrip("/").rpartition("/")
    copy = _scratch(run) / name
    if not copy.exists():
        fetch(Folder(run), int(name.removeprefix("step_")), _scratch(run))
    return _kept(copy)


def find_checkpoint(run: str | Path) -> Path:
    """The newest good checkpoint of a run; damaged ones are passed over with a warning.

    Args:
        run: the folder of a run, or one of its checkpoints; a path or any fsspec URL. What is not
            on this machine is copied, as by :func:`local_copy`.

    Raises:
        UserError: there is none.
    """
    storage = Folder(run)
    if storage.exists(MANIFEST):  # one of its checkpoints
        directory = local_copy(storage.url)
        verify(directory)
        return directory
    if not storage.names() and not storage.exists(""):
        raise UserError(f"{run}: no such run folder; `prioritycut train` makes one below runs/")
    found = newest_good(storage, _scratch(storage.url))
    if found is None:
        raise UserError(
            f"{run}: no usable checkpoint here; give the folder of a run that has written at least "
            "one, see train.checkpoint_every"
        )
    return _kept(found[1]) if storage.local is None else found[1]


@functools.cache
def _scratch_of_process() -> "tempfile.TemporaryDirectory[str]":
    """Removed when this process ends."""
    return tempfile.TemporaryDirectory(prefix="prioritycut-")


def _scratch(run: str) -> Path:
    """A folder for copies of one run's checkpoints."""
    return Path(_scratch_of_process().name, hashlib.sha256(run.encode()).hexdigest()[:16])


def _kept(copy: Path) -> Path:
    """Note that a copy is in use, and remove those that have not been for longest."""
    os.utime(copy)
    copies = Path(_scratch_of_process().name).glob("*/step_*")
    for old in sorted(copies, key=lambda path: path.stat().st_mtime_ns)[:-COPIES]:
        shutil.rmtree(old)
    return copy


def has_checkpoint(run: str | Path) -> bool:
    """Whether a run has written any checkpoint, good or damaged."""
    return bool(steps(Folder(run)))


COPIES = 4
"""So many copies of checkpoints from elsewhere a process keeps: each may be a gigabyte."""
