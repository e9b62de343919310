"""A worker's place among the processes that train together, and what it is doing."""

import time
from dataclasses import dataclass, field
from typing import NamedTuple

import torch


class Worker(NamedTuple):
    """One of the processes that train together."""

    rank: int
    world_size: int
    device: torch.device


DETERMINISTIC_CUBLAS = {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
"""Environment for ``train.deterministic``, needed before the first CUDA call.

Eight workspaces of 4 MiB, not shared between streams.
"""

PHASES = (
    "starting",
    "reporting",
    "validating",
    "waiting for data",
    "generator step",
    "discriminator step",
    "update",
    "saving for a lost rank",
    "saved for a lost rank",
)
"""Phases of a rank's work, in their order while the number of steps taken is the same.

The last two follow the loss of another rank.
"""

SAVING, SAVED = PHASES[-2:]


@dataclass
class WorkerStatus:
    """What a rank is doing: written by its training thread, read by the one that reports it.

    Attributes:
        started_from: optimiser steps taken by earlier processes; 0 until that is known.
        step: optimiser steps taken.
        phase: one of :data:`PHASES`.
        since: when the phase began, in seconds of this process's monotonic clock.
        stop: set from outside to make the run save its state and end after the next step.
    """

    started_from: int = 0
    step: int = 0
    phase: str = PHASES[0]
    since: float = field(default_factory=time.monotonic)
    stop: bool = False

    def mark(self, step: int, phase: str) -> None:
        """Note that a phase begins."""
        if self.phase == PHASES[0]:
            self.started_from = step
        self.step, self.phase, self.since = step, phase, time.monotonic()
