"""The videos that a csv file names: a manifest, or published metadata."""

import csv
import functools
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import PurePosixPath
from typing import NamedTuple

from prioritycut_ray.errors import UserError
from prioritycut_ray.packing.entries import (
    VIDEO_EXTENSIONS,
    Entry,
    Rejected,
    opened,
    printable,
)
from prioritycut_ray.packing.files import IS_FOLDER, any_entry, stems_below
from prioritycut_ray.packing.layout import Layout
from prioritycut_ray.packing.manifest import Row, Table, read_table
from prioritycut_ray.packing.pictures import (
    folder_entry,
    is_picture,
    pictures_in,
    strip_entry,
)
from prioritycut_ray.storage.paths import expanded, is_url


class CsvFile(NamedTuple):
    """A csv file among the inputs: its absolute path or URL, and its contents."""

    source: str
    table: Table


class TableEntries(NamedTuple):
    """What the rows of a csv file name; notes have one line each."""

    items: list[Entry | Rejected]
    folder: str
    notes: list[str]


def read_csv(source: str) -> CsvFile:
    """Read a csv file.

    Raises:
        UserError: it cannot be read, is not a csv file in UTF-8, or is unclear.
    """
    shown = printable(source)
    try:
        with opened(Entry(source, "")) as file:
            text = file.read().decode("utf-8-sig")
        return CsvFile(source, read_table(shown, text))
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{shown}: is not a csv in UTF-8 ({error}); save it as UTF-8") from None


def table_entries(file: CsvFile, places: Iterable[Entry], layout: Layout) -> TableEntries:
    """Find the videos that the rows name.

    Args:
        file: the csv file; paths are relative to it.
        places: videos that a ``video_id`` may name, before those below the folder of the file.
        layout: of pictures.
    """
    shown, table = printable(file.source), file.table
    notes = [*table.notes]
    videos: Mapping[str, str] = {}
    if any(row.video_id for row in table.rows):
        videos = _videos_by_id(file, places, notes)
    items: list[Entry | Rejected] = []
    missing = 0
    # Many rows may name one file.
    look_up = functools.cache(any_entry)
    for row in table.rows:
        entry = _named_entry(file.source, row, videos, layout, look_up)
        missing += isinstance(entry, Rejected)
        items.append(_with_row(entry, row, shown))
    if missing:
        notes.append(
            f"{shown}: {missing} of its {len(table.rows)} rows have no usable file; rejected.csv "
            "lists them"
        )
    return TableEntries(items, "", notes)


def _with_row(entry: Entry | Rejected, row: Row, shown: str) -> Entry | Rejected:
    if isinstance(entry, Rejected):
        return Rejected(entry.file, f"line {row.line} of the manifest: {entry.reason}")
    if row.problem:
        return Rejected(entry.shown, f"line {row.line} of the manifest: {row.problem}")
    return entry._replace(
        identity=printable(row.identity),
        split=printable(row.split),
        box=row.box,
        frames=row.frames,
        row=f"{shown}, line {row.line}",
    )


def _videos_by_id(file: CsvFile, places: Iterable[Entry], notes: list[str]) -> Mapping[str, str]:
    """Return the video of each name without extension: the one with the fewest folders above."""
    stems = stems_below(_folder_of(file), VIDEO_EXTENSIONS)
    for entry in places:
        if entry.pictures is None and entry.span is None:
            for name in {PurePosixPath(entry.source).stem, entry.name}:
                known = stems.setdefault(name, [])
                if entry.source not in known:
                    known.insert(0, entry.source)
    wanted = {_without_extension(row.video_id) for row in file.table.rows}
    if several := [stem for stem, sources in stems.items() if len(sources) > 1 and stem in wanted]:
        paths = stems[several[0]]
        notes.append(
            f"{printable(file.source)}: {len(several)} of its videos are there several times; "
            f"{printable(paths[0])} is used, not {printable(paths[1])}, and so on"
        )
    return {stem: sources[0] for stem, sources in stems.items()}


def _without_extension(video_id: str) -> str:
    path = PurePosixPath(video_id)
    return str(path.with_suffix("")) if path.suffix.lower() in VIDEO_EXTENSIONS else video_id


def _folder_of(file: CsvFile) -> str:
    return file.source.rpartition("/")[0]


def _named_entry(
    manifest: str,
    row: Row,
    videos: Mapping[str, str],
    layout: Layout,
    look_up: Callable[[str, str], Entry | Rejected],
) -> Entry | Rejected:
    """Find the file that a row names: by its name, relative to the manifest, absolute, or a URL."""
    folder = manifest.rpartition("/")[0]
    if row.video_id:
        video_id = _without_extension(row.video_id)
        source = videos.get(video_id)
        if source is None:
            return Rejected(printable(f"{folder}/{video_id}.mp4"), "No such file or directory")
        return look_up(source, video_id)
    file = expanded(row.file, folder)
    below = file.removeprefix(f"{folder}/")
    name = str(PurePosixPath(below).with_suffix(""))
    if not is_url(file):
        file = f"{folder}/{file}" if is_url(manifest) else os.path.join(folder, file)
    entry = look_up(file, name)
    if isinstance(entry, Rejected):
        return _frames(entry, file, below, layout) if entry.reason == IS_FOLDER else entry
    is_strip = layout.strip_width is not None and is_picture(file)
    return strip_entry(entry, layout) if is_strip else entry


def _frames(refused: Rejected, folder: str, name: str, layout: Layout) -> Entry | Rejected:
    """Return a folder as a clip of frames, or why it is not one."""
    if layout.fps is None:
        return Rejected(refused.file, f"{IS_FOLDER}; state --fps if it holds the frames of a clip")
    pictures = pictures_in(folder)
    if not pictures:
        return Rejected(refused.file, f"{IS_FOLDER} without pictures")
    return folder_entry(pictures, name.rstrip("/"), layout.fps)
