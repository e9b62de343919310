"""What can be decoded, and what is wrong with it."""

import errno
import io
import os
import stat
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from prioritycut_ray.errors import UserError

Frame = NDArray[np.uint8]


Source = str | Path | io.BufferedIOBase


TOO_LARGE = 400_000_000
"""More pixels than cameras take: they would need gigabytes, however small the file is."""


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
    """What to call a file before people."""
    return str(source if isinstance(source, str | Path) else getattr(source, "name", "video"))


def said(error: Exception) -> str:
    """What a library says, on one line."""
    words = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return " ".join(words.split())


def check_regular(source: Source) -> None:
    """Refuse anything but a regular file: reading a pipe or a device may never end.

    Raises:
        VideoError: it is a folder, a pipe, a socket or a device.
    """
    if not isinstance(source, str | Path):
        return
    try:
        mode = os.stat(source).st_mode
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise VideoError(str(source), reason) from None
    if not stat.S_ISREG(mode):
        kind = os.strerror(errno.EISDIR) if stat.S_ISDIR(mode) else "is not a regular file"
        raise VideoError(str(source), kind)


def check_pixels(source: Source, width: int, height: int, most: int) -> None:
    """Refuse a picture that is too large.

    Raises:
        VideoError: it is.
    """
    if width * height > most:
        raise VideoError(
            name_of(source),
            f"has {width}x{height} pixels, more than {most / 1e6:.1f} megapixels; shrink it",
        )


SIZE_STEP = 32
