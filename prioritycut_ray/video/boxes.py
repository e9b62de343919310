"""Boxes in a frame, and the square that a model sees."""

from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from prioritycut_ray.errors import UserError


class Box(NamedTuple):
    """A part of the upright frame, in pixels, without its right and bottom edges."""

    left: int
    top: int
    right: int
    bottom: int


class Region(NamedTuple):
    """A box in the units of a frame of a stated size: other pixels than the video's, or fractions.

    Attributes:
        left: of the box; it may lie outside the frame.
        top: of the box.
        right: of the box.
        bottom: of the box.
        width: of the frame in these units; None means that they are the video's own pixels.
        height: of the frame in these units.
    """

    left: float
    top: float
    right: float
    bottom: float
    width: float | None = None
    height: float | None = None


LARGEST_SQUARE = 3
"""In sides of the frame. A larger square would be border for the most part, or fill the memory."""

Crop = Box | Literal["auto", "none"]


def parse_crop(text: str) -> Crop:
    """Read ``auto``, ``none`` or ``LEFT,TOP,RIGHT,BOTTOM`` in pixels.

    Raises:
        UserError: it is none of these.
    """
    if text in ("auto", "none"):
        return "auto" if text == "auto" else "none"
    try:
        left, top, right, bottom = map(int, text.split(","))
    except ValueError:
        left = top = right = bottom = 0
    if not (0 <= left < right and 0 <= top < bottom):
        raise UserError(
            f"{text!r} is not a valid crop: use auto, none, or LEFT,TOP,RIGHT,BOTTOM in pixels"
        )
    return Box(left, top, right, bottom)


def box_of(
    crop: Crop, width: int, height: int, motion: NDArray[np.float64] | None = None, name: str = ""
) -> Box:
    """Return the part of a picture that the model sees: a square, except for ``none``.

    Args:
        crop: the requested crop.
        width: of the picture, in pixels.
        height: of the picture, in pixels.
        motion: how much moves in each part of a video, ``[rows, columns]``; ``auto`` follows it.
        name: of the file, for errors.

    Raises:
        UserError: the box is not inside the picture.
    """
    if crop == "none":
        return Box(0, 0, width, height)
    if crop == "auto":
        across = None if motion is None else motion.sum(axis=0 if width > height else 1)
        side = min(width, height)
        slid = _most(across, side / max(width, height), max(width, height) - side)
        left, top = (slid, 0) if width > height else (0, slid)
        return Box(left, top, left + side, top + side)
    if crop.right > width or crop.bottom > height:
        raise UserError(
            f"{name}: the crop {','.join(map(str, crop))} is not inside its {width}x{height} pixels"
        )
    side = min(crop.right - crop.left, crop.bottom - crop.top)
    left = crop.left + (crop.right - crop.left - side) // 2
    top = crop.top + (crop.bottom - crop.top - side) // 2
    return Box(left, top, left + side, top + side)


def square_around(region: Region, width: int, height: int) -> Box:
    """Return the smallest square around a region of a frame; it may reach beyond the frame.

    The shorter side grows equally in both directions, as in the published preprocessing of
    VoxCeleb (github.com/AliaksandrSiarohin/video-preprocessing, crop_vox.py).

    Args:
        region: the part of the frame to keep.
        width: of the frame, in pixels.
        height: of the frame, in pixels.

    Raises:
        ValueError: the region does not fit the frame at all; the message says how.
    """
    across = width / (region.width or width)
    down = height / (region.height or height)
    left, right = int(region.left * across), int(region.right * across)
    top, bottom = int(region.top * down), int(region.bottom * down)
    if min(right, width) <= max(left, 0) or min(bottom, height) <= max(top, 0):
        place = ",".join(map(str, (left, top, right, bottom)))
        raise ValueError(f"its box {place} is outside its frames of {width}x{height}")
    side = max(right - left, bottom - top)
    if side > LARGEST_SQUARE * max(width, height):
        raise ValueError(
            f"its box is {side} pixels wide or high, far more than its frames of {width}x{height}; "
            "state the size that the box counts from as `width` and `height`"
        )
    left -= (side - (right - left)) // 2
    top -= (side - (bottom - top)) // 2
    return Box(left, top, left + side, top + side)


def _most(profile: NDArray[np.float64] | None, share: float, room: int) -> int:
    """Return the offset of a window at which it covers most of a profile.

    Among offsets within a hundredth of the maximum, the one nearest to the centre is chosen.

    Args:
        profile: amounts along an axis; None means uniform.
        share: length of the window, as a share of the profile.
        room: pixels by which the window can slide.
    """
    if profile is None or not profile.any():
        return room // 2
    length = max(1, round(share * len(profile)))
    sums = np.convolve(profile, np.ones(length), mode="valid")
    good = np.flatnonzero(sums >= 0.99 * sums.max())
    last = len(sums) - 1
    best = int(good[np.abs(good - last / 2).argmin()])
    return round(room * best / last) if last else room // 2
