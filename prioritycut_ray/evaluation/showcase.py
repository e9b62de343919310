"""The best and the worst clips of an evaluation, as videos and pictures."""

import io
import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from prioritycut_ray.data.index import clips_of, read_index
from prioritycut_ray.data.shards import Clip, read_clip
from prioritycut_ray.evaluation.records import Evaluation, ModelScores
from prioritycut_ray.evaluation.scoring import Mapper
from prioritycut_ray.inference.animate import default_device, reconstruct
from prioritycut_ray.inference.mask import example_mask
from prioritycut_ray.precision import float32_products
from prioritycut_ray.training.checkpoint import load_animator
from prioritycut_ray.video.encoding import write_video
from prioritycut_ray.video.random_access import read_all
from prioritycut_ray.visualize import Panel, method_columns, review_panel, stack

SHOWN = 3
"""Number of best clips, and of worst clips, to show."""
MOST_FRAMES = 250
"""Longer videos are cut to this; the report says so."""
ROWS = 3
"""Moments of a clip that the six columns show."""


class ShowcaseTask(NamedTuple):
    """One clip to show.

    Attributes:
        data: folder of shards, an absolute path or an fsspec URL.
        clip: which clip.
        checkpoint: of the model that rebuilds the clip.
    """

    data: str
    clip: Clip
    checkpoint: str


class Showcase(NamedTuple):
    """A clip as rebuilt by a model.

    Attributes:
        video: mp4 of the tiles of :func:`prioritycut_ray.visualize.review_panel`.
        columns: the six columns of the method at :data:`ROWS` moments.
        mixes: whether the model trained with mixing; if not, the mask is PriorityCut's default.
    """

    video: bytes
    columns: Panel
    mixes: bool


Showcases = dict[str, dict[str, Showcase]]
"""By the key of the clip, then by the name of the run."""


def best_and_worst(model: ModelScores) -> tuple[list[str], list[str]]:
    """Return the keys of the clips with the lowest and with the highest L1, without overlap.

    Clips whose L1 is not finite are the worst.
    """
    ranked = sorted(model.clips, key=lambda clip: (_or_infinite(clip.values["l1"]), clip.key))
    count = min(SHOWN, (len(ranked) + 1) // 2)
    worst = [clip.key for clip in reversed(ranked[count:])]
    return [clip.key for clip in ranked[:count]], worst[:count]


def _or_infinite(value: float | None) -> float:
    return value if value is not None and math.isfinite(value) else math.inf


def draw_showcases(evaluation: Evaluation, data: str, mapper: Mapper) -> Showcases:
    """Draw the best and the worst clips of the first run, as rebuilt by every run.

    Args:
        evaluation: of one or more runs.
        data: folder of shards, an absolute path or an fsspec URL.
        mapper: ``map``, or one that uses other processes.
    """
    runs = evaluation.runs
    clips = {clip.key: clip for clip in clips_of(read_index(data), evaluation.split)}
    best, worst = best_and_worst(runs[0])
    keys = [*best, *worst]
    tasks = [ShowcaseTask(data, clips[key], run.checkpoint) for key in keys for run in runs]
    drawn = iter(mapper(show_clip, tasks))
    return {key: {run.name: next(drawn) for run in runs} for key in keys}


def show_clip(task: ShowcaseTask) -> Showcase:
    """Rebuild a clip and draw it."""
    animator, config = load_animator(task.checkpoint, default_device())
    frames = read_all(read_clip(task.data, task.clip), config.data.size)
    moments = {round((len(frames) - 1) * (row + 1) / (ROWS + 1)) for row in range(ROWS)}
    rows: list[Panel] = []

    def tiles() -> Iterator[NDArray[np.uint8]]:
        first = 0
        for rebuilt in reconstruct(animator, frames):
            mask = example_mask(rebuilt.animation, config)
            count = len(mask)
            for moment in sorted(moments & set(range(first, first + count))):
                rows.append(
                    method_columns(*rebuilt, mask, rows=slice(moment - first, moment - first + 1))
                )
            yield from review_panel(*rebuilt, mask).numpy()[: max(0, MOST_FRAMES - first)]
            first += count

    video = io.BytesIO()
    with float32_products(convolutions="ieee"), torch.inference_mode():
        write_video(video, tiles(), task.clip.fps, crf=23)
    return Showcase(video.getvalue(), stack(rows), config.priority_cut is not None)


def png_bytes(panel: Panel) -> bytes:
    """Encode a panel as PNG."""
    image = io.BytesIO()
    Image.fromarray(panel.permute(1, 2, 0).numpy()).save(image, format="png")
    return image.getvalue()
