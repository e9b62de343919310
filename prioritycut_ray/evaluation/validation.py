"""Score an animator on a fixed sample of held-out clips, beside "copy the source frame"."""

import hashlib
import json
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from jaxtyping import Float
from numpy.typing import NDArray

from prioritycut_ray.config import VALIDATION, Config
from prioritycut_ray.data.shards import Clip, read_clip
from prioritycut_ray.errors import UserError
from prioritycut_ray.evaluation.measures import Measures, selected_metrics
from prioritycut_ray.evaluation.scoring import cached_extractors, one_thread, score_frames
from prioritycut_ray.inference.animate import reconstruct
from prioritycut_ray.inference.mask import example_mask
from prioritycut_ray.metrics.aggregate import value_of
from prioritycut_ray.models.animator import Animator
from prioritycut_ray.precision import float32_products
from prioritycut_ray.training.validation import Outcome
from prioritycut_ray.training.worker import Worker
from prioritycut_ray.video.random_access import read_frames
from prioritycut_ray.visualize import Panel, method_columns, stack

MOST_FRAMES = 64
"""Of a longer clip, this many evenly spaced frames are scored."""
SHOWN = 4
"""Number of clips whose columns are shown."""
METRICS = selected_metrics(Measures())
MODELS = ("copy_source/", "")
"""Prefixes of the scores: of the baseline, then of the animator."""


class ValidationSample(NamedTuple):
    """The held-out clips of a run, and how they are read.

    Attributes:
        clips: the clips; see :func:`prioritycut_ray.training.run.validation_clips`.
        config: the run's configuration.
    """

    clips: tuple[Clip, ...]
    config: Config

    def hash(self) -> str:
        """Return the first twelve hex digits of the SHA-256 of all that scores depend on."""
        definitions = {metric.key: metric.definition for metric in METRICS}
        facts = [
            [(clip.key, clip.sha256) for clip in self.clips],
            self.config.data.size,
            MOST_FRAMES,
            definitions,
        ]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:12]


class ClipScores(NamedTuple):
    """The scores of some clips of a sample.

    Attributes:
        values: of each clip, model and metric; zero where ``scored`` is.
        scored: 1 where a clip was scored, 0 elsewhere.
        problems: why clips could not be scored, by key.
        columns: the six columns of the first clips, if they are among them.
    """

    values: Float[NDArray[np.float64], "N 2 M"]
    scored: Float[NDArray[np.float64], " N"]
    problems: dict[str, str]
    columns: list[Panel]


def score_clips(
    animator: Animator,
    sample: ValidationSample,
    places: Sequence[int],
    on_clip: Callable[[], None],
) -> ClipScores:
    """Rebuild clips of a sample from their first frames, and score them.

    Args:
        animator: in evaluation mode.
        sample: the sample.
        places: which of its clips.
        on_clip: called after each clip.
    """
    device = next(animator.parameters()).device
    extractors = cached_extractors(Measures(), device)
    count = len(sample.clips)
    values, scored = np.zeros((count, len(MODELS), len(METRICS))), np.zeros(count)
    problems: dict[str, str] = {}
    columns: list[Panel] = []
    with one_thread():
        for place in places:
            clip = sample.clips[place]
            try:
                frames = _read_frames(sample, clip)
            except UserError as error:
                problems[clip.key] = str(error)
                continue
            for model, scores in enumerate(score_frames(frames, [animator], extractors)):
                values[place, model] = [value_of(m.key, scores[m.key]) for m in METRICS]
            scored[place] = 1
            if place < SHOWN:
                columns.append(_columns(animator, frames, sample.config))
            on_clip()
    return ClipScores(values, scored, problems, columns)


def score_together(
    animator: Animator, worker: Worker, on_clip: Callable[[], None], *, sample: ValidationSample
) -> Outcome:
    """Score a sample on all ranks together; a collective operation.

    Args:
        animator: in evaluation mode, the same on all ranks.
        worker: rank, world size and device of this process.
        on_clip: called after each clip of this rank.
        sample: the sample.
    """
    share = shares(len(sample.clips), worker.world_size)[worker.rank]
    own = score_clips(animator, sample, share, on_clip)
    if worker.world_size > 1:
        for array in (own.values, own.scored):
            total = torch.from_numpy(array).to(worker.device)
            dist.all_reduce(total)
            array[...] = total.cpu().numpy()
    return combined([own])


def shares(count: int, parts: int) -> list[list[int]]:
    """Divide ``count`` places into consecutive parts of nearly equal length."""
    return [part.tolist() for part in np.array_split(np.arange(count), parts)]


def combined(parts: Sequence[ClipScores]) -> Outcome:
    """Average the scores of all clips of a sample, each of which is in one part at most."""
    values = np.sum([part.values for part in parts], axis=0)
    scored = np.sum([part.scored for part in parts], axis=0)
    means = values[scored > 0].mean(axis=0) if scored.any() else np.full(values.shape[1:], np.nan)
    columns = [panel for part in parts for panel in part.columns]
    return Outcome(
        scores={
            f"{VALIDATION}{prefix}{metric.key}": float(mean)
            for prefix, row in zip(MODELS, means, strict=True)
            for metric, mean in zip(METRICS, row, strict=True)
        },
        clips=int(scored.sum()),
        skipped={key: problem for part in parts for key, problem in part.problems.items()},
        columns=stack(columns) if columns else None,
    )


def _read_frames(sample: ValidationSample, clip: Clip) -> NDArray[np.uint8]:
    data = sample.config.data
    count = min(clip.frames, MOST_FRAMES)
    numbers = np.linspace(0, clip.frames - 1, count).round().astype(int).tolist()
    return read_frames(read_clip(data.url, clip), numbers, data.size, data.decoder)


@float32_products(convolutions="ieee")
@torch.inference_mode()
def _columns(animator: Animator, frames: NDArray[np.uint8], config: Config) -> Panel:
    """Draw the six columns of the middle frame."""
    (rebuilt,) = reconstruct(animator, frames[[0, len(frames) // 2]])
    return method_columns(*rebuilt, example_mask(rebuilt.animation, config), rows=slice(1, 2))
