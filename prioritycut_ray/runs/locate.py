"""Find the checkpoint of a run, and read what it says about itself."""

import functools
import hashlib
import math
import os
import shutil
import tempfile
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from prioritycut_ray.config import Config, parse_config, read_mapping
from prioritycut_ray.errors import UserError
from prioritycut_ray.runs.checkpoints import STEP_FORMAT, fetch, newest_intact, steps
from prioritycut_ray.runs.manifest import MANIFEST, verify
from prioritycut_ray.runs.verdicts import checkpoint_scores
from prioritycut_ray.storage.folder import Folder
from prioritycut_ray.storage.paths import is_url
from prioritycut_ray.validation import describe_problems

BEST = "best"
"""``RUN/best`` names the best checkpoint of a run."""
COPIES = 4
"""Copies of remote checkpoints that a process keeps; each may be a gigabyte."""


class Origin(BaseModel):
    """The model that a run started from, see ``init``.

    Attributes:
        model: its name, without the folders that it was in.
        sha256: of the file with its averaged weights.
        step: optimiser steps that it was trained for; None if it is an export.
        samples: frame pairs that it was trained on; None if it is an export.
        fresh: tensors that it had not, or in other shapes: they started from random values.
    """

    model_config = ConfigDict(frozen=True)

    model: str
    sha256: str
    step: int | None
    samples: int | None
    fresh: tuple[str, ...]


class RunProgress(BaseModel):
    """How far a run has come.

    Attributes:
        step: optimiser steps taken.
        samples: frame pairs seen by all workers together.
        skipped: updates that were skipped because they were not finite.
        skipped_in_a_row: number of most recent updates that were skipped, by network.
        averaged: updates of the moving average.
        seed: seed of everything random.
        data: fingerprint of the data set; empty for imported weights.
        origin: the model that the run started from; None if it started from scratch.
    """

    model_config = ConfigDict(frozen=True)

    step: int
    samples: int
    skipped: int
    skipped_in_a_row: dict[str, int]
    averaged: int
    seed: int
    data: str
    origin: Origin | None = None


def read_config(directory: Path) -> Config:
    """Read the resolved configuration in a checkpoint."""
    path = str(directory / "config.yaml")
    return parse_config(read_mapping(path), path)


def read_progress(directory: Path) -> RunProgress:
    """Read how far the run had come.

    Raises:
        UserError: if another version of this project wrote the checkpoint.
    """
    path = directory / "progress.json"
    try:
        return RunProgress.model_validate_json(path.read_bytes())
    except ValidationError as error:
        raise UserError(
            f"{path}: was written by another version of this project "
            f"({describe_problems(error, RunProgress)}); train with that version, or set another "
            "name=... to start a new run"
        ) from error


def run_of_best(place: str | Path) -> str | None:
    """Return the run whose best checkpoint ``RUN/best`` names; None if it is any other place."""
    run, _, name = str(place).rstrip("/").rpartition("/")
    if name != BEST or not run or Folder(str(place)).names() or not Folder(run).names():
        return None
    return run


def best_checkpoint(run: str) -> str:
    """Return the path or URL of the checkpoint with the lowest ``train.best_metric``.

    Args:
        run: the folder of a run, a path or any fsspec URL.

    Raises:
        UserError: the run does not rank its checkpoints, or has not ranked any yet.
    """
    folder = Folder(run)
    found = steps(folder)
    train = _stored_config(folder, found[-1]).train if found else None
    if train is None or not (train.validate_every or train.keep_best):
        raise UserError(
            f"{run}/{BEST}: this run does not rank its checkpoints; set train.validate_every when "
            "you train, or name a checkpoint"
        )
    scores = checkpoint_scores(folder, train.ranked_by, found)
    ranked = {step: x for step, x in scores.items() if x is not None and math.isfinite(x)}
    if not ranked:
        raise UserError(
            f"{run}/{BEST}: no checkpoint has a finite {train.ranked_by} yet; resume the run, or "
            "name a checkpoint"
        )
    return f"{run}/{STEP_FORMAT.format(min(ranked, key=lambda step: (ranked[step], -step)))}"


def _stored_config(folder: Folder, step: int) -> Config:
    name = f"{STEP_FORMAT.format(step)}/config.yaml"
    return parse_config(read_mapping(f"{folder.url}/{name}"), name)


def locate_checkpoint(run: str | Path) -> str:
    """Return the path or URL of a run's newest intact checkpoint, as every machine can find it.

    Args:
        run: the folder of a run, one of its checkpoints, or ``RUN/best``; a path or any fsspec URL.

    Raises:
        UserError: if there is none.
    """
    if best := run_of_best(run):
        run = best_checkpoint(best)
    folder, directory = Folder(run), find_checkpoint(run)
    if folder.local is not None:
        return str(directory)
    return folder.url if folder.url.endswith(directory.name) else f"{folder.url}/{directory.name}"


def local_copy(checkpoint: str | Path) -> Path:
    """Return a checkpoint as a directory on this machine; a remote one is copied.

    A copy is kept until :data:`COPIES` others have been requested.
    """
    if not is_url(str(checkpoint)):
        return Path(checkpoint)
    run, _, name = str(checkpoint).rstrip("/").rpartition("/")
    copy = _scratch(run) / name
    if not copy.exists():
        fetch(Folder(run), int(name.removeprefix("step_")), _scratch(run))
    return _kept(copy)


def find_checkpoint(run: str | Path) -> Path:
    """Return the newest intact checkpoint of a run; damaged ones are skipped with a warning.

    Args:
        run: the folder of a run, one of its checkpoints, or ``RUN/best``; a path or any fsspec
            URL. A remote checkpoint is copied, as by :func:`local_copy`.

    Raises:
        UserError: if there is none.
    """
    if best := run_of_best(run):
        run = best_checkpoint(best)
    folder = Folder(run)
    if folder.exists(MANIFEST):  # one of its checkpoints
        directory = local_copy(folder.url)
        verify(directory)
        return directory
    if not folder.names() and not folder.exists(""):
        raise UserError(f"{run}: no such run folder; `prioritycut train` makes one below runs/")
    found = newest_intact(folder, _scratch(folder.url))
    if found is None:
        raise UserError(
            f"{run}: contains no checkpoint; give the folder of a run that has written one, see "
            "train.checkpoint_every"
        )
    return _kept(found[1]) if folder.local is None else found[1]


@functools.cache
def _scratch_of_process() -> "tempfile.TemporaryDirectory[str]":
    """Make a folder that is removed when this process ends."""
    return tempfile.TemporaryDirectory(prefix="prioritycut-")


def _scratch(run: str) -> Path:
    """Return the folder for copies of one run's checkpoints."""
    return Path(_scratch_of_process().name, hashlib.sha256(run.encode()).hexdigest()[:16])


def _kept(copy: Path) -> Path:
    """Mark a copy as used, and remove the least recently used ones."""
    os.utime(copy)
    copies = Path(_scratch_of_process().name).glob("*/step_*")
    for old in sorted(copies, key=lambda path: path.stat().st_mtime_ns)[:-COPIES]:
        shutil.rmtree(old)
    return copy


def has_checkpoint(run: str | Path) -> bool:
    """Return whether a run has any checkpoint, intact or damaged."""
    return bool(steps(Folder(run)))
