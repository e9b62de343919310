"""A video to pack: where its bytes are, and what is known about it before it is opened."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, NamedTuple

from prioritycut_ray.packing.manifest import FrameRange
from prioritycut_ray.storage.filesystem import filesystem
from prioritycut_ray.storage.paths import is_url
from prioritycut_ray.video.boxes import Box


class Rejected(NamedTuple):
    """A video that was left out, and why."""

    file: str
    reason: str


class Span(NamedTuple):
    """Where a member lies in its tar: first byte, and number of bytes."""

    offset: int
    size: int


class Entry(NamedTuple):
    """One video to pack.

    Attributes:
        source: absolute path or URL of the file, or of the tar around it.
        name: relative path without extension, which its key is made of.
        identity: who or what is shown.
        split: as the manifest or the folders say; empty if they do not.
        box: the part of each frame to keep; the centre square if there is none.
        frames: the part of the video to keep; all of it if there is none.
        span: where it lies in a tar.
        member: its name in the tar.
        size: bytes; 0 if unknown.
        version: changes when the file does.
        row: the manifest and line that name it; empty if none does.
        by_name: whether the identity is taken from the file's name, as nothing else gives one.
    """

    source: str
    name: str
    identity: str = ""
    split: str = ""
    box: Box | None = None
    frames: FrameRange | None = None
    span: Span | None = None
    member: str = ""
    size: int = 0
    version: str = ""
    row: str = ""
    by_name: bool = False

    @property
    def path(self) -> str:
        """Where it lies, through the tar if it is in one."""
        return f"{self.source}/{self.member}" if self.member else self.source

    @property
    def shown(self) -> str:
        """What to call it before people."""
        return printable(self.path)


def printable(name: str) -> str:
    """Spell a name so that it can be shown and stored: valid Unicode on one line."""
    clean = name.encode("utf-8", "backslashreplace").decode()
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in clean)


@contextmanager
def opened(entry: Entry) -> Iterator[IO[bytes]]:
    """Open an entry's file for reading, at the start of its bytes.

    Raises:
        OSError: if it cannot be opened.
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
