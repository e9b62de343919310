"""Rows of a csv manifest: a video, who is in it, its split, and which part of it to use.

Nothing is dropped silently: an unknown column or an unclear row is an error.
"""

import csv
import io
import math
from collections import Counter
from typing import NamedTuple

from prioritycut_ray.errors import UserError
from prioritycut_ray.video.boxes import Box

BOX_COLUMNS = ("left", "top", "right", "bottom")
FRAME_COLUMNS = ("start", "end")
COLUMNS = ("file", "identity", "identity_id", "split", *FRAME_COLUMNS, *BOX_COLUMNS)
NOTE_COLUMNS = {
    *("width", "height", "fps", "frames", "bytes", "sha256", "category", "processing"),
    *("note", "notes", "comment", "license", "licence"),
    *("origin_repo", "origin_commit", "origin_path"),
}
"""Notes about a file that packing does not use."""
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


class Row(NamedTuple):
    """One row of a manifest.

    Attributes:
        line: its number in the file, from 1, including blank lines.
        file: as written.
        identity: as written; empty if not given.
        split: the same; common names as :data:`SPLIT_NAMES` spells them.
        box: the part of each frame to keep.
        frames: the part of the video to keep.
        problem: why the row cannot be used; empty if it can.
    """

    line: int
    file: str
    identity: str
    split: str
    box: Box | None
    frames: FrameRange | None
    problem: str


def read_rows(name: str, text: str) -> list[Row]:
    """Read a manifest.

    Column names are case-insensitive; spaces around names and values are ignored.

    Args:
        name: of the manifest, for errors.
        text: the whole csv.

    Raises:
        UserError: a column is unknown, or a row is unclear.
        csv.Error: it is not a csv file.
    """
    table = csv.reader(io.StringIO(text, newline=""), skipinitialspace=True)
    header = _header(name, next(filter(any, table), []))
    rows: list[Row] = []
    for raw in table:
        cells = [cell.strip() for cell in raw]
        if any(cells):
            rows.append(_row(f"{name}, line {table.line_num}", table.line_num, header, cells))
    if not rows:
        raise UserError(f"{name}: needs a header with the column 'file', and a row for each video")
    return rows


def _column(name: str) -> str:
    return "_".join(name.replace("-", " ").casefold().split())


def _header(name: str, cells: list[str]) -> list[str]:
    """Read the names of the columns; empty for an unnamed one.

    Raises:
        UserError: their meaning is unclear.
    """
    header = [_column(cell) for cell in cells]
    known = ", ".join(COLUMNS)
    if "file" not in header:
        found = ", ".join(repr(cell.strip()) for cell in cells) or "nothing"
        raise UserError(
            f"{name}: needs a header with the column 'file'; found {found}; the columns are "
            f"{known}, separated by commas"
        )
    for column, count in Counter(filter(None, header)).items():
        if column not in COLUMNS and column not in NOTE_COLUMNS:
            raise UserError(
                f"{name}: the column {column!r} is unknown; rename it to one of {known}, "
                "or remove it"
            )
        if count > 1:
            raise UserError(f"{name}: has the column {column!r} {count} times; remove all but one")
    if {"identity", "identity_id"} <= {*header}:
        raise UserError(f"{name}: has the columns 'identity' and 'identity_id'; remove one")
    return header


def _row(where: str, line: int, header: list[str], cells: list[str]) -> Row:
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
    if not named["file"]:
        raise UserError(f"{where}: 'file' is empty; fill it or remove the line")
    box, frames, problem = None, None, ""
    try:
        box = _box([named.get(column, "") for column in BOX_COLUMNS])
        frames = _frames(*(named.get(column, "") for column in FRAME_COLUMNS))
    except ValueError as error:
        problem = str(error)
    split = named.get("split", "")
    return Row(
        line=line,
        file=named["file"],
        identity=named.get("identity") or named.get("identity_id") or "",
        split=SPLIT_NAMES.get(split.casefold(), split),
        box=box,
        frames=frames,
        problem=problem,
    )


def _box(cells: list[str]) -> Box | None:
    """Read a box.

    Raises:
        ValueError: it is not a valid box; the message says why.
    """
    if not any(cells):
        return None
    given = ",".join(cells)
    try:
        values = [float(cell) for cell in cells]
    except ValueError:
        raise ValueError(f"the box {given} needs four numbers") from None
    if not all(map(math.isfinite, values)):
        raise ValueError(f"the box {given} needs four finite numbers")
    box = Box(*map(round, values))
    if not (0 <= box.left < box.right and 0 <= box.top < box.bottom):
        raise ValueError(f"the box {given} is empty or outside the frame")
    return box


def _frames(start: str, end: str) -> FrameRange | None:
    """Read a range of frames; an empty cell is the start or the end of the video.

    Raises:
        ValueError: it is not a valid range; the message says why.
    """
    if not start and not end:
        return None
    given = f"start {start or '(empty)'} and end {end or '(empty)'}"
    try:
        numbers = float(start or 0), float(end or "inf")
    except ValueError:
        raise ValueError(f"{given} must be frame numbers") from None
    first, last = numbers
    if not first.is_integer() or not (last.is_integer() or (not end and last == math.inf)):
        raise ValueError(f"{given} must be whole frame numbers, from 0 (not seconds)")
    if not 0 <= first < last:
        raise ValueError(f"{given} select no frames")
    return FrameRange(int(first), int(last) if end else None)
