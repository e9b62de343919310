"""``prioritycut animate``."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from prioritycut_ray.checkpoint import find_checkpoint, load_animator
from prioritycut_ray.data.video import (
    center_square,
    frames_upright,
    probe,
    read_image,
    resize,
    write_video,
)
from prioritycut_ray.errors import UserError
from prioritycut_ray.inference import animate as animate_frames
from prioritycut_ray.inference import default_device, to_tensor


def animate(
    run: str | Path, source: Path, driving: Path, out: Path, *, relative: bool, adapt_scale: bool
) -> None:
    """Animate a source image by a driving video and write an mp4."""
    if out.suffix.lower() != ".mp4":
        raise UserError(f"{out}: the animation is written as .mp4; give such a name")
    if adapt_scale and not relative:
        raise UserError("--adapt-scale scales relative motion: drop it, or drop --no-relative")
    animator, config = load_animator(find_checkpoint(run), default_device())
    size = config.data.size
    picture = resize(center_square(read_image(source)), size)
    still = to_tensor(picture[None], default_device())
    frames = (resize(center_square(frame), size) for frame in frames_upright(driving))
    out.parent.mkdir(parents=True, exist_ok=True)
    moved = animate_frames(animator, still, frames, relative=relative, adapt_scale=adapt_scale)
    write_video(out, _single_frames(moved), probe(driving).fps)


def _single_frames(batches: Iterator[Tensor]) -> Iterator[NDArray[np.uint8]]:
    for batch in batches:
        yield from batch.permute(0, 2, 3, 1).numpy()
