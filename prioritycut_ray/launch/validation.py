"""Where a run is validated: in Ray tasks beside the training, or by its own ranks."""

from concurrent.futures import Future
from functools import partial
from typing import NamedTuple

import torch

from prioritycut_ray.config import Config
from prioritycut_ray.data.index import ClipIndex
from prioritycut_ray.evaluation.validation import (
    ClipScores,
    ValidationSample,
    combined,
    score_clips,
    score_together,
    shares,
)
from prioritycut_ray.runs.checkpoints import STEP_FORMAT
from prioritycut_ray.training.checkpoint import load_animator
from prioritycut_ray.training.run import validation_clips
from prioritycut_ray.training.validation import Outcome, Validator

MOST_TASKS = 4
"""Loader workers need CPUs too, and each task loads the checkpoint."""


def validator_of(config: Config, index: ClipIndex, device: torch.device | None = None) -> Validator:
    """Return how a run is validated.

    Args:
        config: the resolved configuration.
        index: lists the clips.
        device: of the worker, if there is a Ray cluster whose free resources can be used.
    """
    sample = ValidationSample(validation_clips(config, index), config)
    return Validator(
        sample.hash(),
        partial(score_together, sample=sample),
        None if device is None else FreeResources(sample, device),
    )


class FreeResources:
    """Ray tasks on the GPUs or CPUs of the cluster that are free.

    Args:
        sample: what to score.
        device: that the workers train on. GPUs are used only if they do.
    """

    def __init__(self, sample: ValidationSample, device: torch.device) -> None:
        self._sample, self._uses_gpu = sample, device.type == "cuda"

    def has_room(self) -> bool:
        """Return whether a GPU or a CPU is free now."""
        return self._resources()[1] > 0

    def start(self, step: int) -> "Tasks":
        """Score a checkpoint of the run."""
        import ray  # launch.in_process must not import it

        resource, free = self._resources()
        config = self._sample.config
        checkpoint = f"{config.run}/{STEP_FORMAT.format(step)}"
        count = max(1, min(free, MOST_TASKS, len(self._sample.clips)))
        gpus = int(resource == "GPU")
        # By name, or tasks would be limited to what this worker's placement group reserves.
        task = ray.remote(num_cpus=1 - gpus, num_gpus=gpus, scheduling_strategy="DEFAULT")(
            score_checkpoint
        )
        device = "cuda" if gpus else "cpu"
        return Tasks(
            [
                task.remote(checkpoint, self._sample, places, device).future()
                for places in shares(len(self._sample.clips), count)
            ]
        )

    def _resources(self) -> tuple[str, int]:
        """Return the resource that tasks use, and how many of them are free."""
        import ray

        available: dict[str, float] = ray.available_resources()
        gpus = int(available.get("GPU", 0)) if self._uses_gpu else 0
        return ("GPU", gpus) if gpus else ("CPU", int(available.get("CPU", 0)))


class Tasks(NamedTuple):
    """Running tasks, each of which scores some of the clips."""

    parts: list[Future[ClipScores]]

    def done(self) -> bool:
        """Return whether all tasks have ended."""
        return all(part.done() for part in self.parts)

    def result(self) -> Outcome:
        """Return the outcome; raises the error of a task."""
        from ray.exceptions import RayTaskError

        try:
            return combined([part.result() for part in self.parts])
        except RayTaskError as error:
            raise error.cause from None  # its own text is a traceback


def score_checkpoint(
    checkpoint: str, sample: ValidationSample, places: list[int], device: str
) -> ClipScores:
    """Score some clips of a sample; runs in a Ray task.

    Args:
        checkpoint: path or URL.
        sample: the sample.
        places: which of its clips.
        device: ``cuda`` or ``cpu``; Ray does not hide GPUs from tasks that request none.
    """
    animator, _ = load_animator(checkpoint, torch.device(device))
    return score_clips(animator, sample, places, lambda: None)
