"""Pictures of single clips for a report: a video of six tiles, and the six columns."""

import io
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from prioritycut_ray.config import Config, PriorityCutConfig
from prioritycut_ray.data.shards import Clip, read_clip
from prioritycut_ray.inference.animate import default_device, reconstruct
from prioritycut_ray.precision import float32_products
from prioritycut_ray.training.checkpoint import load_animator
from prioritycut_ray.training.steps import display_mask
from prioritycut_ray.video.decoding import read_all
from prioritycut_ray.video.encoding import write_video
from prioritycut_ray.visualize import Panel, method_columns, review_panel, stack

MOST_FRAMES = 250
"""Of a clip's video; the report says where one is cut short."""
ROWS = 3
"""Moments of a clip that the six columns show."""


class ShowcaseTask(NamedTuple):
    """One clip to show.

    Attributes:
        data: folder of shards, an absolute path or an fsspec URL.
        clip: which clip.
        checkpoint: of the model that rebuilds it.
    """

    data: str
    clip: Clip
    checkpoint: str


class Showcase(NamedTuple):
    """What a model made of a clip.

    Attributes:
        video: mp4 of the tiles of :func:`prioritycut_ray.visualize.review_panel`.
        columns: the six columns of the method at :data:`ROWS` moments.
        mixes: whether the model trained with mixing; if not, the mask is PriorityCut's default.
    """

    video: bytes
    columns: Panel
    mixes: bool


def show_clip(task: ShowcaseTask) -> Showcase:
    """Rebuild a clip and draw it."""
    animator, config = load_animator(task.checkpoint, default_device())
    frames = read_all(read_clip(task.data, task.clip), config.data.size)
    moments = {round((len(frames) - 1) * (row + 1) / (ROWS + 1)) for row in range(ROWS)}
    rows: list[Panel] = []

    def tiles() -> Iterator[NDArray[np.uint8]]:
        first = 0
        for rebuilt in reconstruct(animator, frames):
            mask = display_mask(rebuilt.animation, with_mixing(config))
            assert mask is not None
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


def with_mixing(config: Config) -> Config:
    """The configuration with a mask to look at, also where the run did not mix."""
    if config.priority_cut is not None:
        return config
    return config.model_copy(update={"priority_cut": PriorityCutConfig()})
