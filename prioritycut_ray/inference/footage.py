"""People's pictures and videos on their way into a model: timing, and the square that is cut out.

A model sees squares. Which one is a :data:`Crop`: ``auto`` is the largest square that fits, slid
along the longer side to where most of the motion is (for a still picture, to the centre); ``none``
squeezes the whole picture into a square; a :class:`Box` gives its own largest centred square.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from numpy.typing import NDArray
from PIL import Image

from prioritycut_ray.video.boxes import Box
from prioritycut_ray.video.decoding import frames_timed, frames_upright, probe
from prioritycut_ray.video.encoding import Timing
from prioritycut_ray.video.images import Picture, resize
from prioritycut_ray.video.source import Frame, VideoError

_MOTION_SIDE = 96
"""Longer side, in pixels, of the pictures that motion is measured on."""
_NOISE = 4.0
"""Differences of grey values (of 255) that are compression, not motion."""
_SHORTEST = 0.001
"""Seconds that a frame is shown at least."""


class Footage(NamedTuple):
    """What one look at a whole video found.

    Attributes:
        path: of the file.
        width: of its upright frames, in pixels.
        height: of its upright frames, in pixels.
        timing: of its frames.
        fps: their mean rate.
        variable_rate: whether they are unevenly spaced.
        offset: seconds that its clock shows at the first frame; its sound follows the same clock.
        motion: how much changes between frames at each place, on a coarse raster.
    """

    path: Path
    width: int
    height: int
    timing: Timing
    fps: float
    variable_rate: bool
    offset: float
    motion: Float[np.ndarray, "h w"]


class Limits(NamedTuple):
    """What is too much, for videos that strangers bring.

    Attributes:
        seconds: most duration.
        pixels: most pixels a frame.
    """

    seconds: float
    pixels: int


NO_LIMITS = Limits(float("inf"), 2**62)


def survey(path: Path, limits: Limits = NO_LIMITS) -> Footage:
    """Decode a video once, for its timing and for where it moves.

    Raises:
        VideoError: it cannot be read, is damaged, changes size, has one frame only, or is beyond
            the limits.
    """
    info = probe(path)
    starts: list[float] = []
    shape: tuple[int, ...] = ()
    offset = duration = 0.0
    motion = before = np.zeros(())
    for number, frame in enumerate(frames_timed(path)):
        grey = _coarse(frame.image)
        if number == 0:
            shape, offset = frame.image.shape, frame.start or 0.0
            _check_pixels(path, shape, limits)
        elif frame.image.shape != shape:
            raise VideoError(str(path), f"changes its size at frame {number}: cut it there")
        else:
            difference = np.abs(grey - before)
            motion = motion + np.where(difference > _NOISE, difference, 0.0)
        start = number / info.fps if frame.start is None else frame.start - offset
        # A broken file may show two frames at once.
        starts.append(max(start, starts[-1] + _SHORTEST) if starts else 0.0)
        if starts[-1] > limits.seconds:
            raise VideoError(str(path), f"is longer than {limits.seconds:g} s: cut it")
        before, duration = grey, frame.duration
    if len(starts) < 2:
        raise VideoError(str(path), "has one frame only: a driving video must move")
    mean = starts[-1] / (len(starts) - 1)
    return Footage(
        path=path,
        width=shape[1],
        height=shape[0],
        timing=Timing(starts, starts[-1] + (duration or mean)),
        fps=1 / mean,
        variable_rate=info.variable_rate,
        offset=offset,
        motion=motion,
    )


def _check_pixels(path: Path, shape: tuple[int, ...], limits: Limits) -> None:
    if shape[0] * shape[1] > limits.pixels:
        raise VideoError(
            str(path),
            f"has frames of {shape[1]}x{shape[0]}, more than {limits.pixels / 1e6:g} megapixels",
        )


def _coarse(image: Frame) -> NDArray[np.float64]:
    factor = max(1, round(max(image.shape) / _MOTION_SIDE))
    return np.asarray(Image.fromarray(image).reduce(factor).convert("L"), np.float64)


def squares(footage: Footage, box: Box, size: int) -> Iterator[Frame]:
    """The frames of a video, each cut to a box and scaled to ``[size, size, 3]``."""
    return (cut(frame, box, size) for frame in frames_upright(footage.path))


def cut_picture(picture: Picture, box: Box, size: int) -> Frame:
    """A part of a picture, in pixels of the whole one, scaled to ``[size, size, 3]``."""
    scale = picture.image.shape[1] / picture.width, picture.image.shape[0] / picture.height
    left, right = (round(x * scale[0]) for x in (box.left, box.right))
    top, bottom = (round(y * scale[1]) for y in (box.top, box.bottom))
    # A box of few pixels must not vanish in a reduced picture.
    small = Box(left, top, max(right, left + 1), max(bottom, top + 1))
    return cut(picture.image, small, size)


def cut(frame: Frame, box: Box, size: int) -> Frame:
    """A part of a frame, scaled to ``[size, size, 3]``."""
    return resize(np.ascontiguousarray(frame[box.top : box.bottom, box.left : box.right]), size)


# ---------------------------------------------------------------------------------------------
# Which part
# ---------------------------------------------------------------------------------------------
