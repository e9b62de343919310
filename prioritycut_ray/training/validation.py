"""Validation while training: which steps are scored, where, and what follows from the verdicts.

A step that is validated is a checkpoint first. If the cluster has room, other processes score that
checkpoint while training continues; otherwise all ranks score the weights together, each on some of
the clips. A verdict that is lost with its process is made again from the checkpoint.
"""

import logging
import time
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from typing import NamedTuple, Protocol, runtime_checkable

import torch
import torch.distributed as dist

from prioritycut_ray.config import VALIDATION, Config
from prioritycut_ray.errors import describe
from prioritycut_ray.models.animator import Animator
from prioritycut_ray.runs.checkpoints import steps
from prioritycut_ray.runs.verdicts import Verdict, has_stalled, read_verdicts
from prioritycut_ray.runs.writer import RunWriter
from prioritycut_ray.training.state import TrainState
from prioritycut_ray.training.tracking import Tracker
from prioritycut_ray.training.worker import Worker, WorkerStatus
from prioritycut_ray.visualize import Panel

logger = logging.getLogger(__name__)

_POLL_S = 0.2


class Outcome(NamedTuple):
    """What a validation has found.

    Attributes:
        scores: means over clips, by the name of the scalar.
        clips: number of clips that were scored.
        skipped: why others could not be, by key; those of this process or its tasks.
        columns: the six columns of a few clips; None on ranks other than 0.
    """

    scores: dict[str, float]
    clips: int
    skipped: dict[str, str]
    columns: Panel | None


@runtime_checkable
class Pending(Protocol):
    """A validation in other processes."""

    def done(self) -> bool:
        """Return whether it has ended, well or not."""

    def result(self) -> Outcome:
        """Return the outcome; raises the error that prevented it."""


@runtime_checkable
class Elsewhere(Protocol):
    """Other processes, which score checkpoints for rank 0."""

    def has_room(self) -> bool:
        """Return whether they could start now."""

    def start(self, step: int) -> Pending:
        """Start to score a checkpoint of the run."""


class Validator(NamedTuple):
    """How the held-out clips of a run are scored.

    Attributes:
        sample: hash of the clips and of how they are scored.
        score: scores an animator on all ranks together, a collective operation; it calls its last
            argument after each clip.
        elsewhere: other processes; None without any.
    """

    sample: str
    score: Callable[[Animator, Worker, Callable[[], None]], Outcome]
    elsewhere: Elsewhere | None = None


OnVerdict = Callable[[Mapping[str, float]], None]
"""Takes the scores of a validation by name, and its step as ``val/step``."""


class Books(NamedTuple):
    """Where rank 0 records what a validation finds."""

    writer: RunWriter
    tracker: Tracker
    on_verdict: OnVerdict


class Validation:
    """The validations of one attempt. All ranks call the same methods at the same steps.

    Args:
        config: the run's configuration.
        validator: scores the weights; None if the run does not validate.
        worker: rank, world size and device of this process.
        status: updated while this process scores or waits.
        books: on rank 0; None on the other ranks.
    """

    def __init__(
        self,
        config: Config,
        validator: Validator | None,
        worker: Worker,
        status: WorkerStatus,
        books: Books | None,
    ) -> None:
        self._options, self._validator = config.train, validator
        self._worker, self._status, self._books = worker, status, books
        found = read_verdicts(books.writer.folder) if books and validator else []
        self._verdicts = [v for v in found if validator and v.sample == validator.sample]
        self._waiting: deque[tuple[int, Future[None]]] = deque()
        self._running: tuple[int, Pending] | None = None
        self._skipped: set[str] = set()
        self._left_out = 0

    def is_due(self, step: int) -> bool:
        """Return whether a step is validated."""
        return self._validator is not None and step % self._options.validate_every == 0

    @property
    def is_exhausted(self) -> bool:
        """Whether the verdicts that this rank knows exhaust ``train.patience``."""
        return has_stalled(self._verdicts, self._options.patience)

    def ends_training(self) -> bool:
        """Return whether ``train.patience`` is exhausted, on all ranks alike; a collective."""
        return self._options.patience > 0 and self._agree(self.is_exhausted)

    def resume(self, state: TrainState) -> None:
        """Validate what an earlier attempt has not; a collective operation."""
        if self._validator is None:
            return
        missing = self._missing(state.step)
        if self._can_delegate():
            for step in missing:
                self._delegate(step)
        elif self._agree(state.step in missing):
            self._score(state)

    def begin(self, state: TrainState) -> None:
        """Validate the state that has just been saved; a collective operation.

        While one validation runs, one more waits for its turn, and further steps are left out.
        """
        if not self._can_delegate():
            self._score(state)
        elif not self._waiting:
            self._delegate(state.step)
        else:
            self._left_out += 1
            if self._left_out == 1:
                logger.warning(
                    "step %d is not validated, because earlier validations have not ended: "
                    "increase train.validate_every, or decrease train.validate_clips",
                    state.step,
                )

    def finish(self, state: TrainState) -> None:
        """Validate the last state, and wait for all verdicts; a collective operation."""
        if self._validator is None:
            return
        if self._left_out > 1:
            logger.warning("%d steps were not validated, as warned", self._left_out)
        if self._agree(self._books is not None and state.step not in self._known()):
            if self._can_delegate():
                self._delegate(state.step)
            else:
                self._score(state)
        deadline = time.monotonic() + self._options.collective_timeout_s
        while self._running or self._waiting:
            self._status.mark(state.step, "validating")
            self.poll()
            if time.monotonic() > deadline:
                logger.warning("the last validation has not ended in time; its scores are missing")
                return
            time.sleep(_POLL_S)

    def poll(self) -> None:
        """Take the verdict of other processes if it is there, and start what waits; rank 0."""
        if self._running and self._running[1].done():
            (step, pending), self._running = self._running, None
            try:
                outcome = pending.result()
                self._warn(outcome.skipped)
                self._take(step, outcome)
            except Exception as error:  # of any kind: it must not end the training
                self._give_up(step, describe(error))
        if self._waiting and not self._running and self._waiting[0][1].done():
            step, saved = self._waiting.popleft()
            saved.result()
            assert self._validator is not None
            assert self._validator.elsewhere is not None
            try:
                self._running = step, self._validator.elsewhere.start(step)
            except Exception as error:
                self._give_up(step, describe(error))

    def _can_delegate(self) -> bool:
        """Return whether other processes validate the next step; a collective operation."""
        elsewhere = self._validator.elsewhere if self._validator else None
        if elsewhere is None:
            return False
        busy = self._running is not None or bool(self._waiting)
        return self._agree(self._books is not None and (busy or elsewhere.has_room()))

    def _delegate(self, step: int) -> None:
        if self._books is not None:
            writer = self._books.writer
            writer.hold(step)
            self._waiting.append((step, writer.submit(lambda: None)))  # once it is written

    def _score(self, state: TrainState) -> None:
        """Score the averaged weights on all ranks."""
        assert self._validator is not None
        self._status.mark(state.step, "validating")
        animator = state.ema.module.eval()
        outcome = self._validator.score(
            animator, self._worker, lambda: self._status.mark(state.step, "validating")
        )
        self._warn(outcome.skipped)
        if self._books is not None:
            self._take(state.step, outcome)

    def _warn(self, skipped: Mapping[str, str]) -> None:
        """Name each clip that this process, or its tasks, could not score; once."""
        for key in sorted(skipped.keys() - self._skipped):
            logger.warning("validation: %s is skipped: %s", key, skipped[key])
        self._skipped |= skipped.keys()

    def _take(self, step: int, outcome: Outcome) -> None:
        """Record a verdict."""
        assert self._books is not None
        assert self._validator is not None
        if not outcome.clips:
            self._give_up(step, "no clip could be scored")
            return
        verdict = Verdict(
            step=step,
            sample=self._validator.sample,
            clips=outcome.clips,
            skipped=outcome.skipped,
            scores=outcome.scores,
        )
        was_exhausted = self.is_exhausted
        self._verdicts = sorted([*self._verdicts, verdict], key=lambda known: known.step)
        writer, tracker, on_verdict = self._books
        tracker.scalars(outcome.scores, step)
        if outcome.columns is not None:
            tracker.pictures({f"{VALIDATION}columns": outcome.columns}, step)
        writer.conclude(verdict)
        on_verdict(outcome.scores | {f"{VALIDATION}step": float(step)})
        if self.is_exhausted and not was_exhausted:
            logger.warning(
                "val/l1 has not improved in the last %d validations (train.patience): the run ends",
                self._options.patience,
            )

    def _give_up(self, step: int, reason: str) -> None:
        assert self._books is not None
        logger.warning("step %d is not validated (%s); training continues", step, reason)
        self._books.writer.release(step)

    def _missing(self, start: int) -> list[int]:
        """Return the steps up to ``start`` that are due and saved, but have no verdict."""
        if self._books is None:
            return []
        saved = steps(self._books.writer.folder)
        known = self._known()
        return [s for s in saved if 0 < s <= start and self.is_due(s) and s not in known]

    def _known(self) -> set[int]:
        """Return the steps that have a verdict, or are about to get one."""
        under_way = [step for step, _ in self._waiting]
        running = [self._running[0]] if self._running else []
        return {*(verdict.step for verdict in self._verdicts), *under_way, *running}

    def _agree(self, flag: bool) -> bool:
        """Return whether a flag is set on any rank; a collective operation."""
        if self._worker.world_size == 1:
            return flag
        value = torch.tensor(float(flag), device=self._worker.device)
        dist.all_reduce(value, op=dist.ReduceOp.MAX)
        return bool(value)
