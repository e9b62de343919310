"""Sources of frames, and the error for those that cannot be used."""

import errno
import io
import os
import stat
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from prioritycut_ray.errors import UserError, reason_of

Frame = NDArray[np.uint8]
"""RGB ``[H, W, 3]`` in 0..255."""
Source = str | Path | io.BufferedIOBase
"""A file path, or a seekable binary file."""
TOO_LARGE = 400_000_000
"""More pixels than any camera has: decoding them would take gigabytes, however small the file."""


class TimedFrame(NamedTuple):
    """A frame and when it is shown.

    Attributes:
        image: RGB ``uint8 [H, W, 3]``.
        start: seconds, counted as the file counts them; None if it does not.
        duration: seconds; 0 if unknown.
    """

    image: Frame
    start: float | None
    duration: float


class VideoError(UserError):
    """A video or image that cannot be used; the message is ``<name>: <reason>``.

    Attributes:
        reason: the message without the name.
    """

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(name, reason)
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.args[0]}: {self.reason}"


def name_of(source: Source) -> str:
    """Return the name of a file, for messages."""
    return str(source if isinstance(source, str | Path) else getattr(source, "name", "video"))


def check_regular(source: Source) -> None:
    """Check that a path is a regular file: reading a pipe or a device may never end.

    Raises:
        VideoError: it is a folder, a pipe, a socket or a device.
    """
    if not isinstance(source, str | Path):
        return
    try:
        mode = os.stat(source).st_mode
    except (OSError, ValueError) as error:
        raise VideoError(str(source), reason_of(error)) from None
    if not stat.S_ISREG(mode):
        kind = os.strerror(errno.EISDIR) if stat.S_ISDIR(mode) else "is not a regular file"
        raise VideoError(str(source), kind)


def check_pixels(source: Source, width: int, height: int, most: int) -> None:
    """Check that a picture is not too large.

    Raises:
        VideoError: it has more than ``most`` pixels.
    """
    if width * height > most:
        raise VideoError(
            name_of(source),
            f"has {width}x{height} pixels, more than {most / 1e6:.1f} megapixels; shrink it",
        )
