"""Users' pictures and videos as a model's input: timing, sound, and the square to cut out.

A model sees squares. A :data:`Crop` chooses the square: ``auto`` is the largest one that fits,
moved along the longer side to where most of the motion is (to the centre of a still picture);
``none`` squeezes the whole picture into a square; a :class:`Box` is cut to its largest centred
square.
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
from prioritycut_ray.video.sound import Sound, survey_sound
from prioritycut_ray.video.source import Frame, VideoError

_MOTION_SIDE = 96
"""Longer side in pixels of the frames that motion is measured on."""
_NOISE = 4.0
"""Smaller differences of grey values (of 255) are compression noise, not motion."""
_SHORTEST = 0.001
"""Shortest time in seconds that a frame is shown."""


class Footage(NamedTuple):
    """Properties of a video, from one pass over all its frames.

    Attributes:
        path: of the file.
        width: of the upright frames, in pixels.
        height: of the upright frames, in pixels.
        timing: of the frames.
        fps: mean frame rate.
        variable_rate: whether the frames are unevenly spaced.
        offset: timestamp of the first frame in seconds; the sound uses the same clock.
        motion: how much each place changes between frames, on a coarse grid.
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
    """Limits of a video.

    Attributes:
        seconds: longest duration.
        pixels: largest number of pixels in a frame.
    """

    seconds: float
    pixels: int


NO_LIMITS = Limits(float("inf"), 2**62)


def survey(path: Path, limits: Limits = NO_LIMITS) -> Footage:
    """Decode a video once to find its timing and its motion.

    Raises:
        VideoError: the video cannot be read, is damaged, changes its frame size, has only one
            frame, or exceeds the limits.
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
            raise VideoError(str(path), f"changes its frame size at frame {number}: cut it there")
        else:
            difference = np.abs(grey - before)
            motion = motion + np.where(difference > _NOISE, difference, 0.0)
        start = number / info.fps if frame.start is None else frame.start - offset
        # In a broken file, two frames may have the same timestamp.
        starts.append(max(start, starts[-1] + _SHORTEST) if starts else 0.0)
        if starts[-1] > limits.seconds:
            raise VideoError(str(path), f"is longer than {limits.seconds:g} s: cut it shorter")
        before, duration = grey, frame.duration
    if len(starts) < 2:
        raise VideoError(str(path), "has only one frame: a driving video needs at least two")
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
            f"has frames of {shape[1]}x{shape[0]}, more than {limits.pixels / 1e6:g} megapixels: "
            "scale it down",
        )


def _coarse(image: Frame) -> NDArray[np.float64]:
    factor = max(1, round(max(image.shape) / _MOTION_SIDE))
    return np.asarray(Image.fromarray(image).reduce(factor).convert("L"), np.float64)


def squares(footage: Footage, box: Box, size: int) -> Iterator[Frame]:
    """Return the frames of a video, each cut to a box and scaled to ``[size, size, 3]``."""
    return (cut(frame, box, size) for frame in frames_upright(footage.path))


def cut_picture(picture: Picture, box: Box, size: int) -> Frame:
    """Cut a box out of a picture and scale it to ``[size, size, 3]``.

    The box is in pixels of the full picture, which may have been read at a reduced size.
    """
    scale = picture.image.shape[1] / picture.width, picture.image.shape[0] / picture.height
    left, right = (round(x * scale[0]) for x in (box.left, box.right))
    top, bottom = (round(y * scale[1]) for y in (box.top, box.bottom))
    # A small box must not become empty in a reduced picture.
    small = Box(left, top, max(right, left + 1), max(bottom, top + 1))
    return cut(picture.image, small, size)


def cut(frame: Frame, box: Box, size: int) -> Frame:
    """Cut a box out of a frame and scale it to ``[size, size, 3]``."""
    return resize(np.ascontiguousarray(frame[box.top : box.bottom, box.left : box.right]), size)


def sound_of(footage: Footage) -> tuple[Sound | None, str]:
    """Return the sound of a video, and a remark if the sound is damaged or cannot be decoded."""
    info = survey_sound(footage.path)
    if info is None:
        return None, ""
    if not info.pieces:
        return None, f"left out: it cannot be decoded ({info.codec or 'unknown codec'})"
    remark = f"{info.lost} damaged pieces are silent" if info.lost else ""
    return Sound(footage.path, footage.offset, footage.timing.end), remark
