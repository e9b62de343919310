"""Rows of a csv file: a video, who is in it, its split, and which part of it to use.

There are two kinds, told apart by their header. A *manifest* of this project has a column ``file``,
and counts the video's own frames and pixels. *Published metadata*, in the columns that the authors
of First Order Motion publish for VoxCeleb and Tai-Chi-HD, has a column ``video_id`` or ``bbox``,
and counts the frames and pixels of the copy of the video that the authors had.

Nothing is dropped silently: an unknown column or an unclear row is an error.
"""

import csv
import io
import math
import re
from collections import Counter
from collections.abc import Mapping
from typing import NamedTuple

from prioritycut_ray.errors import UserError
from prioritycut_ray.video.boxes import Box, Region

BOX_COLUMNS = ("left", "top", "right", "bottom")
FRAME_COLUMNS = ("start", "end")
COLUMNS = ("file", "identity", "identity_id", "split", *FRAME_COLUMNS, *BOX_COLUMNS)
METADATA_COLUMNS = ("video_id", "bbox", "fps", "width", "height", "person_id", "partition")
NOTE_COLUMNS = {
    *("width", "height", "fps", "frames", "bytes", "sha256", "category", "processing"),
    *("note", "notes", "comment", "license", "licence"),
    *("origin_repo", "origin_commit", "origin_path"),
}
"""Notes about a file that packing does not use."""
SYNONYMS = (("identity", "identity_id", "person_id"), ("split", "partition"))
"""Columns that mean the same, of which a header may have one."""
DELIMITERS = ",;\t"
LARGEST_FRACTION = 2
"""Boxes without a larger coordinate are in fractions of the frame, which they may exceed a bit."""
SPLIT_NAMES = {
    "train": "train",
    "training": "train",
    "test": "test",
    "testing": "test",
    "val": "val",
    "valid": "val",
    "validation": "val",
}
"""Common names of splits in manifests and folders, in lower case, and the split they mean."""


class FrameRange(NamedTuple):
    """A part of a video: frame numbers from 0, without the end; None is the end of the video."""

    start: int
    end: int | None


class TimeRange(NamedTuple):
    """A part of a video by time, in frames of a stated rate.

    Attributes:
        start: its beginning; divided by ``fps`` it is in seconds.
        end: its end, exclusive; None is the end of the video.
        fps: frames per second that the other two count; 1 if they are seconds.
    """

    start: float
    end: float | None
    fps: float

    def frames(self, fps: float) -> FrameRange:
        """Return the frames of a video of another rate that are in it.

        As in the published preprocessing (github.com/AliaksandrSiarohin/video-preprocessing,
        load_videos.py), frame i is in it if ``start / self.fps <= i / fps < end / self.fps``.
        """
        first, last = (
            None if bound is None else math.ceil(bound * fps / self.fps - 1e-6)
            for bound in (self.start, self.end)
        )
        return FrameRange(first or 0, last)


class Row(NamedTuple):
    """One row of a manifest.

    Attributes:
        line: its number in the file, from 1, including blank lines.
        file: as written; empty if only ``video_id`` names the video.
        video_id: name of the video without folder and extension; empty if ``file`` is given.
        identity: as written, or what follows ``#`` in ``video_id``; empty if not given.
        split: the same; common names as :data:`SPLIT_NAMES` spells them.
        box: the part of each frame to keep.
        frames: the part of the video to keep.
        problem: why the row cannot be used; empty if it can.
    """

    line: int
    file: str
    video_id: str
    identity: str
    split: str
    box: Box | Region | None
    frames: FrameRange | TimeRange | None
    problem: str


class Table(NamedTuple):
    """A csv file of videos.

    Attributes:
        rows: in the order of the file.
        is_metadata: whether it is published metadata.
        notes: decisions worth knowing, one line each.
    """

    rows: list[Row]
    is_metadata: bool
    notes: list[str]


def read_table(name: str, text: str) -> Table:
    """Read a manifest, or published metadata.

    Column names are case-insensitive; spaces around names and values are ignored. Columns are
    separated by commas, semicolons or tabs.

    Args:
        name: of the file, for messages.
        text: the whole csv.

    Raises:
        UserError: a column is unknown, or a row is unclear.
        csv.Error: it is not a csv file.
    """
    table = csv.reader(
        io.StringIO(text, newline=""), skipinitialspace=True, delimiter=_delimiter(text)
    )
    header = _header(name, next(filter(any, table), []))
    is_metadata = bool({"video_id", "bbox"} & {*header})
    rows: list[Row] = []
    for raw in table:
        cells = [cell.strip() for cell in raw]
        if any(cells):
            where = f"{name}, line {table.line_num}"
            named = _named(where, header, cells)
            rows.append(_row(where, table.line_num, named, is_metadata))
    if not rows:
        raise UserError(f"{name}: needs a header with the column 'file', and a row for each video")
    return Table(rows, is_metadata, _notes(name, header, is_metadata))


def _delimiter(text: str) -> str:
    """Return what separates the columns of the first line that is not blank."""
    first = next((line for line in text.splitlines() if line.strip()), "")
    return max(DELIMITERS, key=first.count)


def _column(name: str) -> str:
    return "_".join(name.replace("-", " ").casefold().split())


def _header(name: str, cells: list[str]) -> list[str]:
    """Read the names of the columns; empty for an unnamed one.

    Raises:
        UserError: their meaning is unclear.
    """
    header = [_column(cell) for cell in cells]
    known = ", ".join(COLUMNS)
    if "file" not in header and "video_id" not in header:
        found = ", ".join(repr(cell.strip()) for cell in cells) or "nothing"
        raise UserError(
            f"{name}: needs a header with the column 'file' or 'video_id'; found {found}; the "
            f"columns are {known}, separated by commas, semicolons or tabs"
        )
    is_metadata = bool({"video_id", "bbox"} & {*header})
    usual = {*COLUMNS, *NOTE_COLUMNS, "person_id", "partition"}
    for column, count in Counter(filter(None, header)).items():
        if not is_metadata and column not in usual:
            raise UserError(
                f"{name}: the column {column!r} is unknown; rename it to one of {known}, "
                "or remove it"
            )
        if count > 1:
            raise UserError(f"{name}: has the column {column!r} {count} times; remove all but one")
    for synonyms in (*SYNONYMS, *(("bbox", column) for column in BOX_COLUMNS)):
        if len(both := [column for column in synonyms if column in header]) > 1:
            raise UserError(f"{name}: has the columns {both[0]!r} and {both[1]!r}; remove one")
    return header


def _notes(name: str, header: list[str], is_metadata: bool) -> list[str]:
    if not is_metadata:
        return []
    notes = []
    if "fps" not in header and {*FRAME_COLUMNS} & {*header}:
        notes.append(f"{name}: has no column 'fps', so its start and end are taken as seconds")
    known = {*COLUMNS, *METADATA_COLUMNS, *NOTE_COLUMNS, ""}
    if unused := [column for column in header if column not in known]:
        notes.append(f"{name}: the columns {', '.join(map(repr, unused))} are not used")
    return notes


def _named(where: str, header: list[str], cells: list[str]) -> dict[str, str]:
    """Return the cells of a row by column.

    Raises:
        UserError: they do not match the header.
    """
    # A note at the end of a line may contain commas.
    too_many = any(cells[len(header) :]) and header[-1] not in NOTE_COLUMNS
    if len(cells) < len(header) or too_many:
        raise UserError(
            f"{where}: has {len(cells)} cells, but the header has {len(header)}; quote values that "
            "contain a comma, and keep empty cells"
        )
    pairs = [*zip(header, cells, strict=False)]
    if lost := [cell for column, cell in pairs if cell and not column]:
        raise UserError(f"{where}: {lost[0]!r} is in a column without a name; add the name")
    named = dict(pairs)
    if not named.get("file") and not named.get("video_id"):
        column = "file" if "file" in header else "video_id"
        raise UserError(f"{where}: {column!r} is empty; fill it or remove the line")
    return named


def _row(where: str, line: int, named: Mapping[str, str], is_metadata: bool) -> Row:
    box: Box | Region | None = None
    frames: FrameRange | TimeRange | None = None
    problem = ""
    try:
        box = _region(named) if is_metadata else _box(named)
        frames = _times(named) if is_metadata else _frames(named)
    except ValueError as error:
        problem = str(error)
    file = named.get("file", "")
    video, _, person = named.get("video_id", "").partition("#")
    identity, split = (next(filter(None, map(named.get, names)), "") for names in SYNONYMS)
    return Row(
        line=line,
        file=file,
        video_id="" if file else video,
        identity=identity or person.rpartition("#")[2],
        split=SPLIT_NAMES.get(split.casefold(), split),
        box=box,
        frames=frames,
        problem=problem,
    )


# ---------------------------------------------------------------------------------------------
# The part of a video that a manifest names
# ---------------------------------------------------------------------------------------------


def _box(named: Mapping[str, str]) -> Box | None:
    """Read a box in pixels of the video.

    Raises:
        ValueError: it is not a valid box; the message says why.
    """
    if (values := _corners([named.get(column, "") for column in BOX_COLUMNS])) is None:
        return None
    box = Box(*map(round, values))
    if not (0 <= box.left < box.right and 0 <= box.top < box.bottom):
        raise ValueError(f"the box {_shown(values)} is empty or outside the frame")
    return box


def _corners(cells: list[str]) -> list[float] | None:
    if not any(cells):
        return None
    given = ",".join(cells)
    try:
        values = [float(cell) for cell in cells]
    except ValueError:
        raise ValueError(f"the box {given} needs four numbers") from None
    if len(values) != 4:
        raise ValueError(f"the box {given} needs four numbers")
    if not all(map(math.isfinite, values)):
        raise ValueError(f"the box {given} needs four finite numbers")
    return values


def _shown(values: list[float]) -> str:
    return ",".join(f"{value:g}" for value in values)


def _frames(named: Mapping[str, str]) -> FrameRange | None:
    """Read a range of frames; an empty cell is the start or the end of the video.

    Raises:
        ValueError: it is not a valid range; the message says why.
    """
    start, end = named.get("start", ""), named.get("end", "")
    if not start and not end:
        return None
    first, last = _bounds(start, end)
    given = f"start {start or '(empty)'} and end {end or '(empty)'}"
    if not first.is_integer() or not (last is None or last.is_integer()):
        raise ValueError(f"{given} must be whole frame numbers, from 0 (not seconds)")
    return FrameRange(int(first), None if last is None else int(last))


def _bounds(start: str, end: str) -> tuple[float, float | None]:
    given = f"start {start or '(empty)'} and end {end or '(empty)'}"
    try:
        first, last = float(start or 0), float(end or "inf")
    except ValueError:
        raise ValueError(f"{given} must be frame numbers") from None
    if not math.isfinite(first) or (end and not math.isfinite(last)):
        raise ValueError(f"{given} must be finite numbers")
    if not 0 <= first < last:
        raise ValueError(f"{given} select no frames")
    return first, last if end else None


# ---------------------------------------------------------------------------------------------
# The part of a video that published metadata names
# ---------------------------------------------------------------------------------------------


def _region(named: Mapping[str, str]) -> Region | None:
    """Read a box in pixels of a frame of the stated size, or in fractions of it.

    Raises:
        ValueError: it is not a valid box; the message says why.
    """
    text = named.get("bbox", "").strip("()[] ")
    # VoxCeleb's and Tai-Chi-HD's are written 624-48-1018-553.
    separators = r"-" if re.fullmatch(r"[\d.]+(-[\d.]+)+", text) else r"[\s,;]+"
    cells = re.split(separators, text) if text else [named.get(name, "") for name in BOX_COLUMNS]
    if (values := _corners(cells)) is None:
        return None
    left, top, right, bottom = values
    if not (left < right and top < bottom):
        raise ValueError(f"the box {_shown(values)} is empty; it must be left, top, right, bottom")
    if max(map(abs, values)) <= LARGEST_FRACTION:
        return Region(left, top, right, bottom, 1, 1)
    width, height = _number(named, "width"), _number(named, "height")
    if (width is None) != (height is None):
        raise ValueError("the size that the box counts from needs both width and height")
    return Region(left, top, right, bottom, width, height)


def _times(named: Mapping[str, str]) -> TimeRange | None:
    """Read a range of times, in frames of the stated rate, or in seconds.

    Raises:
        ValueError: it is not a valid range; the message says why.
    """
    start, end = named.get("start", ""), named.get("end", "")
    if not start and not end:
        return None
    return TimeRange(*_bounds(start, end), _number(named, "fps") or 1.0)


def _number(named: Mapping[str, str], column: str) -> float | None:
    """Read a number above 0; None for an empty cell."""
    if not (cell := named.get(column, "")):
        return None
    try:
        value = float(cell)
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"its {column} {cell} must be a number above 0")
    return value
