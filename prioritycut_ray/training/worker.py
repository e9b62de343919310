"""Who a process is among those that train together, and what it is doing."""

import time
from dataclasses import dataclass, field
from typing import NamedTuple

import torch


class Worker(NamedTuple):
    """One of the processes that train together."""

    rank: int
    world_size: int
    device: torch.device


PHASES = (
    "starting",
    "waiting for data",
    "generator step",
    "discriminator step",
    "update",
    "reporting",
)
"""What a rank does, in the order of a step."""


@dataclass
class WorkerStatus:
    """What a rank is doing, noted by its training thread and read by the one that reports it.

    Attributes:
        started_from: optimiser steps taken by earlier processes, 0 until that is known.
        step: optimiser steps taken.
        phase: one of :data:`PHASES`.
        since: when the phase began, by this process's monotonic clock, in seconds.
        stop: set from outside: the run is to save its state and end at the next step.
    """

    started_from: int = 0
    step: int = 0
    phase: str = PHASES[0]
    since: float = field(default_factory=time.monotonic)
    stop: bool = False

    def mark(self, step: int, phase: str) -> None:
        """Note the begin of a phase."""
        if self.phase == PHASES[0]:
            self.started_from = step
        self.step, self.phase, self.since = step, phase, time.monotonic()
