"""Find entries that are the same video."""

import os
from collections import defaultdict
from collections.abc import Sequence

from prioritycut_ray.errors import UserError
from prioritycut_ray.packing.entries import Entry
from prioritycut_ray.packing.manifest import FrameRange, TimeRange
from prioritycut_ray.storage.paths import is_url


def each_once(entries: Sequence[Entry]) -> tuple[list[Entry], list[str]]:
    """Keep each video once, or once for each distinct row of a manifest.

    Returns:
        The entries to keep, in order, and a note for each row that repeats another.

    Raises:
        UserError: two rows say different things about the same frames.
    """
    same: dict[tuple[object, ...], list[Entry]] = defaultdict(list)
    for entry in entries:
        place = entry.source if is_url(entry.source) else os.path.realpath(entry.source)
        same[place, entry.span].append(entry)
    kept: set[int] = set()
    notes: list[str] = []
    for group in same.values():
        # What a manifest says about a file applies wherever else the file is found.
        rows = [entry for entry in group if entry.row] or group[:1]
        for number, entry in enumerate(rows):
            earlier = [other for other in rows[:number] if id(other) in kept]
            if twin := next((other for other in earlier if _repeats(other, entry)), None):
                notes.append(f"{entry.row}: repeats {_line(twin, entry)}; it is packed once")
            else:
                kept.add(id(entry))
    return [entry for entry in entries if id(entry) in kept], notes


def _repeats(one: Entry, other: Entry) -> bool:
    """Return whether two rows of a video ask for the same clips.

    Raises:
        UserError: they share frames, but give them different identities or splits.
    """
    if one.box != other.box or not _overlap(one.frames, other.frames):
        return False
    for what in ("identity", "split"):
        first, second = getattr(one, what), getattr(other, what)
        if first != second:
            raise UserError(
                f"{other.row}: contradicts {_line(one, other)}: the {what} of the same frames of "
                f"{one.shown} is {second!r} here and {first!r} there; keep one of them"
            )
    return one.frames == other.frames


def _overlap(one: FrameRange | TimeRange | None, other: FrameRange | TimeRange | None) -> bool:
    """Return whether two parts of a video share frames; numbers and times cannot be compared."""
    if one is not None and other is not None and one[2:] != other[2:]:
        return False
    (start, end), (begin, stop) = (one or (0, None))[:2], (other or (0, None))[:2]
    return (stop is None or start < stop) and (end is None or begin < end)


def _line(one: Entry, seen_from: Entry) -> str:
    manifest, _, line = one.row.rpartition(", ")
    return line if seen_from.row.startswith(f"{manifest}, line") else one.row
