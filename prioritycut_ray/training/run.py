"""A run's folder in training: where to start from, and what to save."""

import hashlib
import heapq
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import NamedTuple

from prioritycut_ray.config import Config
from prioritycut_ray.data.index import ClipIndex, clips_of, read_index
from prioritycut_ray.data.shards import Clip
from prioritycut_ray.errors import UserError
from prioritycut_ray.runs.checkpoints import newest_intact
from prioritycut_ray.runs.compatibility import check_resumable
from prioritycut_ray.runs.locate import has_checkpoint
from prioritycut_ray.runs.retention import Retention
from prioritycut_ray.runs.writer import RunWriter
from prioritycut_ray.storage.claims import Claim
from prioritycut_ray.training.checkpoint import take_snapshot, write_snapshot
from prioritycut_ray.training.state import TrainState


class OpenRun(NamedTuple):
    """A run that is ready to train.

    Attributes:
        writer: writes into the run's folder.
        step: step of the checkpoint to resume from; None to start from scratch.
        checkpoint: directory of that checkpoint on this machine.
    """

    writer: RunWriter
    step: int | None
    checkpoint: Path | None


def check_run(config: Config) -> ClipIndex:
    """Check that a configuration fits its data and an older run of the same name.

    Returns:
        The index of the training data.

    Raises:
        UserError: the data, the split or the older run does not fit.
    """
    index = read_index(config.data.index or config.data.url, cache_dir=config.data.cache_dir)
    clips_of(index, config.data.split)
    if config.train.validate_every:
        validation_clips(config, index)
    if has_checkpoint(config.run):
        check_resumable(config, index.fingerprint)
    return index


def validation_clips(config: Config, index: ClipIndex) -> tuple[Clip, ...]:
    """Choose the clips that a run is validated on: those with the lowest hashes of their keys.

    The choice depends on no seed, so runs that differ only in theirs can be compared; and it stays
    nearly the same when clips are added.

    Raises:
        UserError: the validation split has no clips.
    """
    try:
        clips = clips_of(index, config.data.validation_split)
    except UserError as error:
        raise UserError(f"data.validation_split: {error}; or set train.validate_every=0") from None
    hashes = [hashlib.sha256(key.encode()).digest() for key in clips.keys().to_pylist()]
    chosen = heapq.nsmallest(config.train.validate_clips, range(len(hashes)), hashes.__getitem__)
    return tuple(clips[place] for place in chosen)


def open_run(config: Config, claim: Claim, scratch: Path) -> OpenRun:
    """Find the newest intact checkpoint of a claimed run, and start to write after it.

    Args:
        config: the run's configuration.
        claim: the claim of this attempt.
        scratch: local folder for a copy of a remote checkpoint.
    """
    step, checkpoint = newest_intact(claim.folder, scratch) or (None, None)
    return OpenRun(new_writer(config, claim, step or 0), step, checkpoint)


def new_writer(config: Config, claim: Claim, step: int) -> RunWriter:
    """Start to write into a claimed run after a step."""
    options = config.train
    return RunWriter(
        claim,
        start=step,
        retention=Retention(
            options.keep_checkpoints,
            max(options.keep_best, 1 if options.validate_every else 0),  # RUN/best is there
            options.keep_every,
        ),
        metric=options.ranked_by,
    )


def save_state(
    writer: RunWriter, state: TrainState, metrics: Mapping[str, float], config: Config, data: str
) -> None:
    """Copy the state, and write it as a checkpoint in the background.

    Args:
        writer: writer of the run's folder.
        state: state to save.
        metrics: metrics at its step.
        config: the run's configuration.
        data: fingerprint of the data set.
    """
    writer.wait()  # before the copy, so that at most two states are in memory
    write = partial(write_snapshot, take_snapshot(state, config, data))
    writer.save(state.step, metrics, write)


@contextmanager
def forwarded_warnings(send: Callable[[str], None]) -> Iterator[None]:
    """Pass the package's warnings on while the body runs."""
    handler = _WarningHandler(send)
    logger = logging.getLogger("prioritycut_ray")
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)


class _WarningHandler(logging.Handler):
    def __init__(self, send: Callable[[str], None]) -> None:
        super().__init__(logging.WARNING)
        self._send = send

    def emit(self, record: logging.LogRecord) -> None:
        """Called by the logger."""
        self._send(record.getMessage())
