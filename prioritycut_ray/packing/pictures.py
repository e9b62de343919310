"""Clips that are stored as pictures: a folder of frames, or a strip of frames side by side.

Both are layouts of First Order Motion's data sets (frames_dataset.py in
github.com/AliaksandrSiarohin/first-order-model), where clips of all kinds may lie in one folder.
"""

import hashlib
import io
import json
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import PurePosixPath
from typing import NamedTuple

from prioritycut_ray.packing.entries import (
    PICTURE_EXTENSIONS,
    VIDEO_EXTENSIONS,
    Entry,
    Pictures,
    opened,
    printable,
)
from prioritycut_ray.packing.files import is_shown, version_of
from prioritycut_ray.packing.layout import Layout
from prioritycut_ray.packing.manifest import SPLIT_NAMES
from prioritycut_ray.storage.filesystem import filesystem
from prioritycut_ray.storage.paths import is_url
from prioritycut_ray.storage.reading import read_bytes
from prioritycut_ray.video.decoding import VideoInfo
from prioritycut_ray.video.images import picture_size, read_picture_file
from prioritycut_ray.video.source import TOO_LARGE, Frame, VideoError


class PictureFile(NamedTuple):
    """A picture below an input.

    Attributes:
        source: absolute path or URL.
        name: its path below the input, with the extension.
        size: bytes.
        version: changes when the file does.
    """

    source: str
    name: PurePosixPath
    size: int
    version: str


class PictureClips(NamedTuple):
    """The clips that pictures make up.

    Attributes:
        entries: in the order of their names.
        notes: pictures that are left out, one line each.
    """

    entries: list[Entry]
    notes: list[str]


# ---------------------------------------------------------------------------------------------
# Which pictures are clips
# ---------------------------------------------------------------------------------------------


def find_picture_clips(
    root: str, files: Sequence[PictureFile], beside_videos: set[PurePosixPath], layout: Layout
) -> PictureClips:
    """Sort the pictures of an input into clips.

    With a strip width, the pictures of a folder are strips if the first, the middle or the last of
    them is: at least two frames wide, at most two frames high, and either a multiple of the width
    or far wider than high. Otherwise they are the frames of one clip, if there are no videos beside
    them, nor folders that are splits, nor folders of clips beside a single picture.

    Args:
        root: name of the input, for messages.
        files: the pictures.
        beside_videos: the folders that contain videos.
        layout: of pictures.
    """
    folders: dict[PurePosixPath, list[PictureFile]] = defaultdict(list)
    for file in sorted(files, key=lambda file: natural_order(str(file.name))):
        folders[file.name.parent].append(file)
    below = _folders_below({*folders, *beside_videos})
    entries: list[Entry] = []
    thumbnails = 0
    unread: list[str] = []
    for folder, pictures in folders.items():
        if layout.strip_width is not None and _are_strips(pictures, layout.strip_width):
            entries += [_strip(file, layout) for file in pictures]
        elif folder in beside_videos or _is_above_clips(pictures, below[folder]):
            thumbnails += len(pictures)
        elif layout.fps is None:
            unread.append(pictures[0].source.rpartition("/")[0])
        else:
            entries.append(folder_entry(pictures, str(folder), layout.fps))
    notes = []
    if unread:
        notes.append(
            f"{printable(root)}: {len(unread)} folders of pictures are not packed, such as "
            f"{printable(unread[0])}; state --fps to pack each of them as a clip"
        )
    if thumbnails:
        notes.append(
            f"{printable(root)}: {thumbnails} pictures beside videos or splits are not packed; if "
            "they are strips of frames, state --strip-width"
        )
    return PictureClips(entries, notes)


def _folders_below(places: Iterable[PurePosixPath]) -> Mapping[PurePosixPath, set[str]]:
    """Return the names of the folders in each folder that have clips in or below them."""
    names: dict[PurePosixPath, set[str]] = defaultdict(set)
    for place in places:
        for folder in (place, *place.parents):
            if folder != folder.parent:
                names[folder.parent].add(folder.name.casefold())
    return names


def _is_above_clips(pictures: Sequence[PictureFile], below: set[str]) -> bool:
    return not below.isdisjoint(SPLIT_NAMES) or (len(pictures) == 1 and bool(below))


def _are_strips(pictures: Sequence[PictureFile], width: int) -> bool:
    samples = {0, len(pictures) // 2, len(pictures) - 1}
    return any(_is_strip(_size(pictures[number]), width) for number in sorted(samples))


def _is_strip(size: tuple[int, int] | None, width: int) -> bool:
    if size is None:
        return False
    across, down = size
    # One that is not a multiple, but far wider than high, is a strip of another width: it is named.
    fits = across % width == 0 or across >= 4 * down
    return across >= 2 * width and down <= 2 * width and fits


def _size(file: PictureFile) -> tuple[int, int] | None:
    if not is_url(file.source):
        return picture_size(file.source)
    try:
        with opened(Entry(file.source, "")) as picture:
            return picture_size(io.BytesIO(picture.read()))
    except OSError:
        return None


def _strip(file: PictureFile, layout: Layout) -> Entry:
    return strip_entry(
        Entry(file.source, str(file.name.with_suffix("")), size=file.size, version=file.version),
        layout,
    )


def strip_entry(entry: Entry, layout: Layout) -> Entry:
    """Return a picture file as a strip of frames."""
    return entry._replace(pictures=Pictures(layout.strip_fps, layout.strip_width))


def folder_entry(pictures: Sequence[PictureFile], name: str, fps: float) -> Entry:
    """Return the entry of a folder of frames.

    Args:
        pictures: the frames, at least one.
        name: of the folder below the input; ``.`` if it is the input.
        fps: frames per second.
    """
    folder = pictures[0].source.rpartition("/")[0]
    name = folder.rpartition("/")[2] if name == "." else name
    path = PurePosixPath(name)
    return Entry(
        source=folder,
        # The published tools name such folders like the video: `id10283#abc#1#90.mp4/0000000.png`.
        name=str(path.with_suffix("")) if path.suffix.lower() in VIDEO_EXTENSIONS else name,
        size=sum(file.size for file in pictures),
        version=_version(pictures),
        pictures=Pictures(fps, None),
    )


def pictures_in(folder: str) -> list[PictureFile]:
    """List the pictures that are directly in a folder, in natural order; hidden ones are ignored.

    Args:
        folder: a local path or an fsspec URL.
    """
    fs, root = filesystem(folder)
    infos = [info for info in fs.ls(root, detail=True) if info["type"] == "file"]
    named = [(info["name"].rpartition("/")[2], info) for info in infos]
    found = [
        PictureFile(
            f"{folder.rstrip('/')}/{name}",
            PurePosixPath(name),
            int(info.get("size") or 0),
            version_of(info),
        )
        for name, info in named
        if is_picture(name) and is_shown(name)
    ]
    return sorted(found, key=lambda file: natural_order(file.name.name))


def _version(pictures: Sequence[PictureFile]) -> str:
    facts = [(file.name.name, file.size, file.version) for file in pictures]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def is_picture(name: str) -> bool:
    """Return whether a file is a picture by its name."""
    return PurePosixPath(name).suffix.lower() in PICTURE_EXTENSIONS


def natural_order(name: str) -> tuple[list[tuple[str, int]], str]:
    """Return a sorting key that puts ``frame10.png`` after ``frame9.png``."""
    parts = re.findall(r"([^0-9]*)([0-9]*)", name)
    return [(text, int(number or 0)) for text, number in parts], name


# ---------------------------------------------------------------------------------------------
# Their frames
# ---------------------------------------------------------------------------------------------


class Film(NamedTuple):
    """The frames of a clip, RGB ``uint8 [H, W, 3]``, and the rate and number of all of them."""

    info: VideoInfo
    frames: Iterator[Frame]


def open_pictures(entry: Entry, pictures: Pictures, skip: int = 0) -> Film:
    """Read the frames of a clip that is stored as pictures, without the first ``skip`` ones.

    Raises:
        VideoError: it cannot be used; also while the frames are read.
    """
    if pictures.strip_width is not None:
        strip = _read(entry.source, entry.shown)
        frames = _cut(strip, pictures.strip_width, entry.shown)
        return Film(VideoInfo(pictures.fps, False, len(frames)), iter(frames[skip:]))
    files = pictures_in(entry.source)
    rest = (_read_frame(entry, file) for file in files[skip:])
    return Film(VideoInfo(pictures.fps, False, len(files)), rest)


def _read_frame(entry: Entry, file: PictureFile) -> Frame:
    name = printable(file.name.name)
    try:
        return _read(file.source, name)
    except VideoError as error:
        raise VideoError(entry.shown, f"its frame {name} {error.reason}") from None


def _read(source: str, shown: str) -> Frame:
    """Read a picture whole."""
    fs, path = filesystem(source)
    try:
        picture = read_picture_file(io.BytesIO(read_bytes(fs, path, shown)), TOO_LARGE)
    except (FileNotFoundError, PermissionError, IsADirectoryError) as error:
        raise VideoError(shown, error.strerror or "No such file or directory") from None
    if picture is None:
        raise VideoError(shown, "is not a picture")
    if picture.image.shape[1] != picture.width:
        raise VideoError(
            shown, f"has {picture.width}x{picture.height} pixels, too many for one picture"
        )
    return picture.image


def _cut(strip: Frame, width: int, shown: str) -> list[Frame]:
    """Cut a strip ``[H, N W, 3]`` into its frames ``[H, W, 3]``."""
    if strip.shape[1] % width:
        raise VideoError(
            shown,
            f"is {strip.shape[1]} pixels wide, which is not a multiple of --strip-width {width}",
        )
    return [strip[:, left : left + width] for left in range(0, strip.shape[1], width)]
