"""What to pack: files, folders, globs, csv files and WebDataset shards, local or on fsspec.

Nothing is decoded here. What cannot be a video is rejected by name, so one bad file does not stop a
run. Nothing is written, and no member of a tar is extracted.
"""

import glob
import itertools
import os
import posixpath
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from braceexpand import braceexpand

from prioritycut_ray.errors import UserError, reason_of
from prioritycut_ray.packing.duplicates import each_once
from prioritycut_ray.packing.entries import (
    VIDEO_EXTENSIONS,
    Entry,
    Rejected,
    printable,
)
from prioritycut_ray.packing.files import is_shown, local_or_not, remote_entry, version_of, walk
from prioritycut_ray.packing.folders import folder_of
from prioritycut_ray.packing.identities import name_identities
from prioritycut_ray.packing.layout import PLAIN, Layout
from prioritycut_ray.packing.pictures import (
    PictureFile,
    find_picture_clips,
    is_picture,
    strip_entry,
)
from prioritycut_ray.packing.splits import split_by_folders
from prioritycut_ray.packing.tables import CsvFile, read_csv, table_entries
from prioritycut_ray.packing.tar_samples import read_samples
from prioritycut_ray.storage.filesystem import FileSystem, filesystem
from prioritycut_ray.storage.paths import absolute, expanded, is_url

EXTENSIONS = VIDEO_EXTENSIONS | {".tar"}


class Found(NamedTuple):
    """What the inputs contain.

    Attributes:
        entries: videos to pack, each once, in a fixed order.
        rejected: what cannot be packed.
        notes: decisions worth knowing, one line each.
    """

    entries: list[Entry]
    rejected: list[Rejected]
    notes: list[str]


def find_videos(inputs: Sequence[str], layout: Layout = PLAIN) -> Found:
    """List the videos that the inputs name.

    Args:
        inputs: videos, WebDataset shards (``.tar``), folders (searched recursively; hidden files
            are ignored, links to folders are not followed), globs, csv files; each a local path or
            an fsspec URL. Braces are expanded: ``shard-{000000..000123}.tar``. If a csv file is
            published metadata, its videos are looked for in the folders among the inputs, of which
            nothing else is used, and below its own folder.
        layout: how clips are stored as pictures, and what names an identity.

    Raises:
        UserError: an input does not exist, contains no video, or is not a usable csv file; rows
            contradict each other; or the split of a video is unclear.
    """
    layout.check()
    given = [*itertools.chain.from_iterable(map(expand_braces, inputs))]
    listings = _with_rows([_expand(one, layout) for one in given], layout)
    found: list[Entry] = []
    folders: list[str] = []
    for listing in listings:
        entries = [item for item in listing.items if isinstance(item, Entry)]
        folders += [listing.folder] if listing.folder else [folder_of(e) for e in entries]
        found += entries
    items = itertools.chain.from_iterable(listing.items for listing in listings)
    rejected = [*dict.fromkeys(item for item in items if isinstance(item, Rejected))]
    if not found and not rejected:
        raise UserError("there is nothing to pack: name videos, folders, globs or a csv file")
    once, repeats = each_once(found)
    named = name_identities(split_by_folders(once, folders), layout.identity_from)
    notes = itertools.chain.from_iterable(listing.notes for listing in listings)
    return Found(named, rejected, [*notes, *repeats])


class _Listing(NamedTuple):
    """What one input contains, the folder that it names (empty for a file), and notes."""

    items: Sequence[Entry | Rejected]
    folder: str = ""
    notes: Sequence[str] = ()


def _with_rows(given: Sequence[_Listing | CsvFile], layout: Layout) -> list[_Listing]:
    """List the videos of csv files; published metadata finds them in the folders beside it."""
    are_places = any(one.table.is_metadata for one in given if isinstance(one, CsvFile))
    folders = [one for one in given if isinstance(one, _Listing) and one.folder]
    places = [item for one in folders for item in one.items if isinstance(item, Entry)]
    listings = []
    for one in given:
        if isinstance(one, CsvFile):
            listings.append(_Listing(*table_entries(one, places, layout)))
        elif are_places and one.folder:
            note = f"{printable(one.folder)}: only the videos that the csv file names are packed"
            listings.append(_Listing([], "", [note]))
        else:
            listings.append(one)
    return listings


def expand_braces(given: str) -> Iterator[str]:
    """Expand ``{000000..000123}`` and ``{a,b}`` in an input, as webdataset does."""
    given = expanded(given)
    # A file or folder may have braces in its name.
    end = given.find("/", given.rfind("{"))
    if "{" not in given or _exists(given if end < 0 else given[:end]):
        yield given
        return
    try:
        yield from filter(None, braceexpand(given))  # A shell drops empty words, too.
    except ValueError:  # braceexpand's UnbalancedBracesError
        raise UserError(
            f"{printable(given)}: its braces are not balanced; write {{000000..000123}} or {{a,b}}"
        ) from None


def _exists(given: str) -> bool:
    if not is_url(given):
        return os.path.lexists(given)
    fs, path = filesystem(given)
    return bool(fs.exists(path))


def _expand(given: str, layout: Layout) -> _Listing | CsvFile:
    if is_url(given):
        return _expand_url(given, layout)
    if "\0" in given:
        raise UserError(f"{printable(given)}: is not a valid file name")
    path = Path(given)
    if path.is_dir():
        return _wanted(path, walk(path), layout)
    if os.path.lexists(path):
        return _local_file(str(path.absolute()), path.stem, layout)
    if glob.has_magic(given):
        return _in_glob(path, layout)
    raise UserError(f"{printable(given)}: does not exist; name a video, folder, glob or csv file")


def _is_csv(source: str) -> bool:
    return PurePosixPath(source).suffix.lower() == ".csv"


def _inside(entry: Entry, layout: Layout) -> Sequence[Entry | Rejected]:
    """List the videos of a shard; any other file is itself a video, or a strip of frames."""
    if PurePosixPath(entry.source).suffix.lower() == ".tar":
        return read_samples(entry)
    is_strip = layout.strip_width is not None and is_picture(entry.source)
    return [strip_entry(entry, layout) if is_strip else entry]


# ---------------------------------------------------------------------------------------------
# Local files
# ---------------------------------------------------------------------------------------------


def _local_file(source: str, name: str, layout: Layout) -> _Listing | CsvFile:
    entry = local_or_not(source, name)
    if isinstance(entry, Rejected):
        return _Listing([entry])
    return read_csv(source) if _is_csv(source) else _Listing(_inside(entry, layout))


def _local(source: str, name: str, layout: Layout) -> Sequence[Entry | Rejected]:
    entry = local_or_not(source, name)
    return [entry] if isinstance(entry, Rejected) else _inside(entry, layout)


def _plain_parts(
    parts: Sequence[str], is_folder: Callable[[Sequence[str]], bool]
) -> tuple[list[str], list[str]]:
    """Split a pattern into its leading folders and the rest; ``clips [1]`` may be a folder."""
    count = 0
    while count < len(parts) - 1:
        if glob.has_magic(parts[count]) and not is_folder(parts[: count + 1]):
            break
        count += 1
    return [*parts[:count]], [*parts[count:]]


def _in_glob(pattern: Path, layout: Layout) -> _Listing:
    plain, rest = _plain_parts(pattern.parts, lambda parts: Path(*parts).is_dir())
    root = Path(*plain)
    # pathlib's glob, unlike glob's, does not follow cycles of links; nor may its matches.
    matches = [*root.glob(str(Path(*rest)))]
    folders = (path for path in matches if path.is_dir() and not path.is_symlink())
    below = (item for path in folders for item in walk(path))
    files = (path for path in matches if not path.is_dir())
    return _wanted(root, itertools.chain(files, below), layout)


def _wanted(root: Path, items: Iterable[Path | Rejected], layout: Layout) -> _Listing:
    """List the videos, shards and pictures among paths below a folder, without hidden ones."""
    listed = [*items]
    result: list[Entry | Rejected] = [item for item in listed if isinstance(item, Rejected)]
    pictures: list[PictureFile] = []
    videos: set[PurePosixPath] = set()
    for path in sorted({item for item in listed if isinstance(item, Path)}):
        name = PurePosixPath(path.relative_to(root))
        if not all(map(is_shown, name.parts)):
            continue
        if path.suffix.lower() in EXTENSIONS:
            videos.add(name.parent)
            result += _local(str(path.absolute()), str(name.with_suffix("")), layout)
        elif is_picture(path.name):
            picture = _local_picture(path, name, layout)
            result += [picture] if isinstance(picture, Rejected) else []
            pictures += [picture] if isinstance(picture, PictureFile) else []
    return _with_pictures(str(root), result, pictures, videos, layout)


def _local_picture(path: Path, name: PurePosixPath, layout: Layout) -> PictureFile | Rejected:
    source = str(path.absolute())
    if not layout.has_pictures:
        return PictureFile(source, name, 0, "")
    entry = local_or_not(source, "")
    if isinstance(entry, Rejected):
        return entry
    return PictureFile(source, name, entry.size, entry.version)


def _with_pictures(
    folder: str,
    videos: Sequence[Entry | Rejected],
    pictures: Sequence[PictureFile],
    folders_of_videos: set[PurePosixPath],
    layout: Layout,
) -> _Listing:
    clips, notes = find_picture_clips(folder, pictures, folders_of_videos, layout)
    items = [*videos, *clips]
    if not items and notes:
        raise UserError(notes[0])
    if not items:
        known = " ".join(sorted(EXTENSIONS))
        raise UserError(f"{printable(folder)}: no videos found; known extensions are {known}")
    return _Listing(items, absolute(folder), notes)


# ---------------------------------------------------------------------------------------------
# URLs
# ---------------------------------------------------------------------------------------------


def _expand_url(url: str, layout: Layout) -> _Listing | CsvFile:
    fs, path = filesystem(url)
    try:
        if fs.isfile(path):
            if _is_csv(path):
                return read_csv(url)
            entry = remote_entry(url, PurePosixPath(path).stem, fs.info(path))
            return _Listing(_inside(entry, layout))
        if fs.isdir(path):
            return _in_remote_folder(fs, path, fs.find(path, detail=True), layout)
        if glob.has_magic(path):
            plain, rest = _plain_parts(path.split("/"), lambda parts: fs.isdir("/".join(parts)))
            root = "/".join(plain)
            found = fs.glob("/".join([glob.escape(root), *rest]), detail=True)
            return _in_remote_folder(fs, root, found, layout)
    except UserError:
        raise
    except Exception as error:  # Each file system has errors of its own.
        raise UserError(f"{url}: cannot be read ({printable(reason_of(error))})") from error
    raise UserError(f"{url}: does not exist; name a video, folder, glob or csv file")


def _in_remote_folder(
    fs: FileSystem, root: str, infos: Mapping[str, Mapping[str, Any]], layout: Layout
) -> _Listing:
    result: list[Entry | Rejected] = []
    pictures: list[PictureFile] = []
    videos: set[PurePosixPath] = set()
    for path, info in sorted(infos.items()):
        name = PurePosixPath(posixpath.relpath(path, root or "/"))
        if info["type"] != "file" or not all(map(is_shown, name.parts)):
            continue
        if name.suffix.lower() in EXTENSIONS:
            videos.add(name.parent)
            entry = remote_entry(fs.unstrip_protocol(path), str(name.with_suffix("")), info)
            result += _inside(entry, layout)
        elif is_picture(path):
            source, size = fs.unstrip_protocol(path), int(info.get("size") or 0)
            pictures.append(PictureFile(source, name, size, version_of(info)))
    return _with_pictures(fs.unstrip_protocol(root), result, pictures, videos, layout)
