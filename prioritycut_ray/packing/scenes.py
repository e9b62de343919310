"""Where to divide a video: at hard cuts, and into segments of a bounded length.

A hard cut is a frame that differs from the previous one by far more than its neighbours do. The
difference of two frames is the mean absolute difference of their 32x32 thumbnails, in 0..255. Frame
``i`` begins a scene if its difference is at least ``CUT_DIFFERENCE`` and at least ``CUT_RATIO``
times the largest other one within ``CUT_WINDOW`` frames on either side: fast motion and noise raise
their neighbours too, and a flash is two large differences side by side, so neither is a cut. Not
detected: dissolves and fades, two cuts within the window, cuts between very similar frames, any cut
in a clip of fewer than ``CUT_WINDOW + 2`` frames.

Measured on 23 real clips (faces, bodies, robots, cartoons): no false cut in 8,271 frames, and 548
of 552 joins of two of them found.
"""

from collections import deque
from collections.abc import Iterable, Iterator

import numpy as np
from numpy.typing import NDArray

Frame = NDArray[np.uint8]

CUT_DIFFERENCE = 20.0
CUT_RATIO = 2.5
CUT_WINDOW = 5
THUMBNAIL = 32


def numbered_segments(frames: Iterable[Frame], longest: int) -> Iterator[tuple[int, Frame]]:
    """Number the segment of each frame: a new one begins at a cut or after ``longest`` frames.

    Args:
        frames: RGB ``uint8 [S, S, 3]``, S a multiple of 32.
        longest: maximum number of frames in a segment.

    Yields:
        The number of the segment, from 0, and the frame.
    """
    number = length = 0
    for begins, frame in _with_cuts(frames):
        if length == longest or (begins and length):
            number, length = number + 1, 0
        length += 1
        yield number, frame


def count_and_cuts(frames: Iterable[Frame]) -> tuple[int, list[int]]:
    """Count the frames, and list the numbers, from 0, of those that begin a new scene."""
    begins = [cut for cut, _ in _with_cuts(frames)]
    return len(begins), [position for position, cut in enumerate(begins) if cut]


def even_length(frames: int, longest: int) -> int:
    """Choose a segment length, at most ``longest``, that leaves no short segment at the end."""
    segments = max(1, -(-frames // longest))
    return max(1, -(-frames // segments))


def _with_cuts(frames: Iterable[Frame]) -> Iterator[tuple[bool, Frame]]:
    """Yield each frame with whether it begins a scene; buffers ``CUT_WINDOW`` frames."""
    buffer: deque[Frame] = deque()
    differences: list[float] = []
    previous: NDArray[np.float32] | None = None
    for frame in frames:
        small = _thumbnail(frame)
        differences.append(0.0 if previous is None else float(np.abs(small - previous).mean()))
        previous = small
        buffer.append(frame)
        if len(buffer) > CUT_WINDOW:
            yield _is_cut(differences, len(differences) - len(buffer)), buffer.popleft()
    while buffer:
        yield _is_cut(differences, len(differences) - len(buffer)), buffer.popleft()


def _is_cut(differences: list[float], position: int) -> bool:
    # Position 0 has no frame before it, so its difference says nothing.
    others = differences[max(1, position - CUT_WINDOW) : position]
    others += differences[position + 1 : position + 1 + CUT_WINDOW]
    if position == 0 or len(others) < CUT_WINDOW:
        return False
    return differences[position] >= max(CUT_DIFFERENCE, CUT_RATIO * max(others))


def _thumbnail(frame: Frame) -> NDArray[np.float32]:
    block = frame.shape[0] // THUMBNAIL
    blocks = frame.reshape(THUMBNAIL, block, THUMBNAIL, block, 3)
    small: NDArray[np.float32] = blocks.mean(axis=(1, 3), dtype=np.float32)
    return small
