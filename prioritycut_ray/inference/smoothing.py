"""Smooth the keypoints of a video, which jitter from frame to frame (``animate --smooth``)."""

from collections.abc import Iterable, Iterator

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from scipy.signal import savgol_filter
from torch import Tensor

from prioritycut_ray.errors import UserError
from prioritycut_ray.models.keypoints import Keypoints

SECONDS = 1 / 3
"""How much of a video a window spans: longer than jitter, shorter than a gesture."""
SMALLEST = 5
"""Smallest window in frames that smooths: a parabola passes through any three points."""
_ORDER = 2

Detected = tuple[Float[Tensor, "B 3 H W"], Keypoints]
"""A batch of frames and their keypoints."""


def window_of(fps: float) -> int:
    """Return the window of :func:`smoothed` for a frame rate: the odd number nearest to 1/3 s."""
    return max(SMALLEST, 2 * round((SECONDS * fps - 1) / 2) + 1)


def smoothed(batches: Iterable[Detected], window: int) -> Iterator[Detected]:
    """Smooth keypoints and jacobians in time by a Savitzky–Golay filter of order 2.

    Each value becomes that of the parabola that fits the window around its frame best; at both ends
    of the video, the parabola of the first or last window. Values that change linearly are
    unchanged, without lag. A video that is shorter than the window is filtered by the longest one
    that fits.

    Results depend neither on the size of the batches nor on frames outside the window; besides a
    batch, one window of keypoints and half a window of frames are in memory.

    Args:
        batches: frames and their keypoints, in order.
        window: length in frames, odd and at least :data:`SMALLEST`.

    Yields:
        The same frames with smoothed keypoints, in batches that are no larger.

    Raises:
        UserError: the window is invalid.
    """
    if window < SMALLEST or window % 2 == 0:
        raise UserError(
            f"smooth={window}: must be an odd number of frames, at least {SMALLEST}, or 0 to leave "
            "keypoints as they are"
        )
    half, largest = window // 2, 1
    rows: NDArray[np.float64] | None = None  # of the frames that wait, and of those before them
    waiting: Tensor | None = None
    like: Keypoints | None = None
    for frames, like in batches:
        largest = max(largest, len(frames))
        rows = _joined(rows, _rows(like))
        waiting = frames if waiting is None else torch.cat([waiting, frames])
        ready = max(0, len(waiting) - half)
        if len(rows) < window or not ready:
            continue
        before = len(rows) - len(waiting)
        values = _filtered(rows, window)[before : before + ready]
        yield from _batches(waiting[:ready], values, like, largest)
        waiting = waiting[ready:]
        rows = rows[-window:]
    if rows is not None and waiting is not None and like is not None and len(waiting):
        values = _filtered(rows, window)[len(rows) - len(waiting) :]
        yield from _batches(waiting, values, like, largest)


def _filtered(rows: NDArray[np.float64], window: int) -> NDArray[np.float64]:
    window = min(window, len(rows) - 1 + len(rows) % 2)
    result: NDArray[np.float64] = savgol_filter(rows, window, min(_ORDER, window - 1), axis=0)
    return result


def _rows(keypoints: Keypoints) -> NDArray[np.float64]:
    """Return one row for each frame, with all its numbers."""
    parts = [part.detach().flatten(1) for part in keypoints if part is not None]
    rows: NDArray[np.float64] = torch.cat(parts, dim=1).double().cpu().numpy()
    return rows


def _joined(rows: NDArray[np.float64] | None, more: NDArray[np.float64]) -> NDArray[np.float64]:
    return more if rows is None else np.concatenate([rows, more])


def _batches(
    frames: Tensor, rows: NDArray[np.float64], like: Keypoints, size: int
) -> Iterator[Detected]:
    """Yield frames with the keypoints of their rows, in batches of at most this size."""
    numbers = torch.from_numpy(rows).to(like.value)
    for batch, part in zip(frames.split(size), numbers.split(size), strict=True):
        count = like.value[0].numel()
        value = part[:, :count].unflatten(1, like.value.shape[1:])
        jacobian = like.jacobian
        if jacobian is not None:
            jacobian = part[:, count:].unflatten(1, jacobian.shape[1:])
        yield batch, Keypoints(value, jacobian)
