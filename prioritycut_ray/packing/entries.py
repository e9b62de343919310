"""A video to pack: where its bytes are, and what is known about it before decoding."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, NamedTuple

from prioritycut_ray.packing.manifest import FrameRange, TimeRange
from prioritycut_ray.storage.filesystem import filesystem
from prioritycut_ray.storage.paths import is_url
from prioritycut_ray.video.boxes import Box, Region

VIDEO_EXTENSIONS = frozenset(
    {
        *(".mp4", ".mov", ".m4v", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".ts", ".mts", ".m2ts"),
        *(".vob", ".flv", ".wmv", ".3gp", ".ogv", ".gif"),
    }
)


PICTURE_EXTENSIONS = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".webp"})
"""Frames of a clip, or strips of frames side by side."""


class Rejected(NamedTuple):
    """A video that was left out, and why."""

    file: str
    reason: str


class Span(NamedTuple):
    """Where a member lies in its tar: first byte and number of bytes."""

    offset: int
    size: int


class Pictures(NamedTuple):
    """How the frames of a clip are stored as pictures.

    Attributes:
        fps: frames per second.
        strip_width: width of a frame in a strip; None: each picture of a folder is a frame.
    """

    fps: float
    strip_width: int | None


class Entry(NamedTuple):
    """One video to pack.

    Attributes:
        source: absolute path or URL of the file, of the tar around it, or of the folder of frames.
        name: relative path without extension, from which its key is made.
        identity: who or what is shown.
        split: as given by the manifest or the folders; empty if neither does.
        box: the part of each frame to keep: the centre square of a Box, the square around a
            Region; None keeps the centre square of the frame.
        frames: the part of the video to keep; None keeps all of it.
        span: where it lies in a tar.
        member: its name in the tar.
        size: bytes; 0 if unknown.
        version: changes when the file does.
        row: the manifest and line that name it; empty without a manifest.
        by_name: whether the identity is taken from the file name because nothing else gives one.
        pictures: how the frames are stored as pictures; None for a video.
    """

    source: str
    name: str
    identity: str = ""
    split: str = ""
    box: Box | Region | None = None
    frames: FrameRange | TimeRange | None = None
    span: Span | None = None
    member: str = ""
    size: int = 0
    version: str = ""
    row: str = ""
    by_name: bool = False
    pictures: Pictures | None = None

    @property
    def path(self) -> str:
        """Path of the file, or of the member below its tar."""
        return f"{self.source}/{self.member}" if self.member else self.source

    @property
    def shown(self) -> str:
        """Printable path, for messages."""
        return printable(self.path)


def printable(name: str) -> str:
    """Escape a name so that it can be shown and stored: valid Unicode on one line."""
    clean = name.encode("utf-8", "backslashreplace").decode()
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in clean)


@contextmanager
def opened(entry: Entry) -> Iterator[IO[bytes]]:
    """Open an entry's file for reading, at its first byte.

    Raises:
        OSError: it cannot be opened.
    """
    if not is_url(entry.source):
        with open(entry.source, "rb") as file:
            file.seek(entry.span.offset if entry.span else 0)
            yield file
        return
    fs, path = filesystem(entry.source)
    with fs.open(path, "rb") as file:
        file.seek(entry.span.offset if entry.span else 0)
        yield file
