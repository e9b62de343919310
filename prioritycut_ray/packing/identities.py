"""Which entries are the same video, who is in each, and what its folders say of its split."""

import os
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from itertools import takewhile

from prioritycut_ray.errors import UserError
from prioritycut_ray.packing.entries import Entry, printable
from prioritycut_ray.packing.manifest import SPLIT_NAMES, FrameRange
from prioritycut_ray.storage.paths import is_url


def each_once(entries: Sequence[Entry]) -> tuple[list[Entry], list[str]]:
    """Keep each video once, or once for each distinct row of a manifest.

    Returns:
        The entries that are kept, in order, and a note for each row that repeats another.

    Raises:
        UserError: two rows say different things of the same frames.
    """
    same: dict[tuple[object, ...], list[Entry]] = defaultdict(list)
    for entry in entries:
        place = entry.source if is_url(entry.source) else os.path.realpath(entry.source)
        same[place, entry.span].append(entry)
    kept: set[int] = set()
    notes: list[str] = []
    for group in same.values():
        # What a manifest says of a file counts wherever else the file is found.
        rows = [entry for entry in group if entry.row] or group[:1]
        for number, entry in enumerate(rows):
            earlier = [other for other in rows[:number] if id(other) in kept]
            if twin := next((other for other in earlier if _repeats(other, entry)), None):
                notes.append(f"{entry.row}: repeats {_line(twin, entry)}; it is packed once")
            else:
                kept.add(id(entry))
    return [entry for entry in entries if id(entry) in kept], notes


def _repeats(one: Entry, other: Entry) -> bool:
    """Whether two rows of a video ask for the same clips.

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


def _overlap(one: FrameRange | None, other: FrameRange | None) -> bool:
    (start, end), (begin, stop) = one or (0, None), other or (0, None)
    return (stop is None or start < stop) and (end is None or begin < end)


def _line(one: Entry, seen_from: Entry) -> str:
    manifest, _, line = one.row.rpartition(", ")
    return line if seen_from.row.startswith(f"{manifest}, line") else one.row


# ---------------------------------------------------------------------------------------------
# Splits
# ---------------------------------------------------------------------------------------------


def split_by_folders(entries: Sequence[Entry], folders: Sequence[str]) -> list[Entry]:
    """Set missing splits from folders named ``train``, ``test`` and the like.

    The common folder of all inputs and the folders below it count. So does the name of a tar.

    Args:
        entries: the videos.
        folders: the folders that the inputs name.

    Raises:
        UserError: a video is in the folders of several splits, or of none while others are.
    """
    above = max(0, len(_common(folders)) - 1)
    found = [entry.split or _folder_split(entry, above) for entry in entries]
    pairs = [*zip(entries, found, strict=True)]
    splits = {split for entry, split in pairs if not entry.split}
    if "" in splits and len(splits) > 1:
        stray = entries[found.index("")]
        raise UserError(
            f"{stray.shown}: is not in a split folder, but other videos are (in "
            f"{' and '.join(sorted(splits - {''}))}); move it into one of them, pack it "
            "separately, or set its split in a manifest"
        )
    return [entry._replace(split=split) for entry, split in pairs]


def _folder_split(entry: Entry, above: int) -> str:
    # Shards are often named after their split, with a number.
    parts = [re.sub(r"([-_.]?\d+)?\.tar$", "", part, flags=re.I) for part in _parts(entry.path)]
    words = (part.casefold() for part in parts[above:-1])
    splits = sorted({SPLIT_NAMES[word] for word in words if word in SPLIT_NAMES})
    if len(splits) > 1:
        raise UserError(
            f"{entry.shown}: is in the folders of several splits ({' and '.join(splits)}); set its "
            "split in a manifest"
        )
    return splits[0] if splits else ""


def folder_of(entry: Entry) -> str:
    """Name the folder that an entry's file lies in."""
    return entry.source.rpartition("/")[0]


def _parts(path: str) -> list[str]:
    return (path if is_url(path) else os.path.normpath(path)).split("/")


def _common(paths: Iterable[str]) -> list[str]:
    """Take the parts that all paths begin with."""
    columns = zip(*map(_parts, paths), strict=False)
    return [column[0] for column in takewhile(lambda column: len({*column}) == 1, columns)]


# ---------------------------------------------------------------------------------------------
# Identities
# ---------------------------------------------------------------------------------------------


def name_identities(entries: Sequence[Entry]) -> list[Entry]:
    """Name each missing identity after its file.

    The name is the file's path below the input folder. If that is ambiguous, it is the path below
    the common folder of the files in question, with its extension.
    """
    taken = {entry.identity for entry in entries if entry.identity}
    files: dict[str, set[str]] = defaultdict(set)
    for entry in entries:
        if not entry.identity:
            files[entry.name].add(entry.path)

    def named(entry: Entry) -> Entry:
        alike = files[entry.name]
        identity = printable(entry.name)
        if len(alike) > 1 or identity in taken:
            parts = _parts(entry.path)
            above = len(_common(path.rpartition("/")[0] for path in alike))
            above = min(above, len(parts) - len(_parts(entry.name)))
            identity = printable("/".join(parts[above:]))
        return entry._replace(identity=identity, by_name=True)

    return [entry if entry.identity else named(entry) for entry in entries]
