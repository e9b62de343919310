"""TensorBoard: what the first worker writes of a run."""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from prioritycut_ray.config import Config
from prioritycut_ray.models.animator import Animation, FramePair
from prioritycut_ray.steps import Judged, display_mask
from prioritycut_ray.visualize import draw_keypoints, grid, method_columns

ROWS = slice(4)
"""Samples of a batch that a picture shows."""


class Tracker:
    """Writes scalars and pictures of a run.

    Args:
        folder: of the event files.
        first_step: what an interrupted attempt wrote from this step on is dropped by TensorBoard.
    """

    def __init__(self, folder: Path, *, first_step: int) -> None:
        self._writer = SummaryWriter(str(folder), purge_step=first_step if first_step else None)

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """Numbers of a step under their names."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def pictures(self, pictures: Mapping[str, Tensor], step: int) -> None:
        """uint8 pictures `[3, H, W]` of a step under their names."""
        for name, picture in pictures.items():
            self._writer.add_image(name, picture, step)

    def close(self) -> None:
        """Write out what is pending."""
        self._writer.close()


@torch.no_grad()
def training_pictures(
    pair: FramePair, animation: Animation, judged: Judged, config: Config
) -> dict[str, Tensor]:
    """The pictures of a step: the method's columns, keypoints, and the pixel judgements."""
    pictures = {
        "columns": method_columns(pair, animation, display_mask(animation, config), rows=ROWS),
        "keypoints": grid(
            [
                draw_keypoints(pair.source, animation.source_keypoints.value)[ROWS],
                draw_keypoints(pair.driving, animation.driving_keypoints.value)[ROWS],
            ]
        ),
    }
    pixel_logits = judged.output.pixel_logits
    if pixel_logits is not None:
        size = len(pair.driving)
        images = [pair.driving, animation.prediction]
        images += [] if judged.mixed is None else [judged.mixed]
        judgements = torch.sigmoid(pixel_logits).split(size)
        columns = [item[ROWS] for both in zip(images, judgements, strict=True) for item in both]
        pictures["pixel_judgement"] = grid(columns)
    return pictures
