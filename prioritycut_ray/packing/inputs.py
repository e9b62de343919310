"""What to pack: files, folders, globs, csv manifests and WebDataset shards, local or on fsspec.

Nothing is decoded here. What cannot be a video is rejected by name, so one bad file does not stop a
run. Nothing is written, and no member of a tar is extracted.
"""

import csv
import glob
import itertools
import os
import posixpath
import stat
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
    opened,
    printable,
)
from prioritycut_ray.packing.folders import folder_of
from prioritycut_ray.packing.identities import name_identities
from prioritycut_ray.packing.manifest import Row, read_rows
from prioritycut_ray.packing.splits import split_by_folders
from prioritycut_ray.packing.tar_samples import read_samples
from prioritycut_ray.storage.filesystem import FileSystem, filesystem
from prioritycut_ray.storage.paths import absolute, expanded, is_url

EXTENSIONS = VIDEO_EXTENSIONS | {".tar"}
# What file systems call the version of a file, the most reliable first.
_VERSION_KEYS = ("ETag", "etag", "mtime", "LastModified", "last_modified", "updated", "created")


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


def find_videos(inputs: Sequence[str]) -> Found:
    """List the videos that the inputs name.

    Args:
        inputs: videos, WebDataset shards (``.tar``), folders (searched recursively; hidden files
            are ignored, links to folders are not followed), globs, csv manifests; each a local
            path or an fsspec URL. Braces are expanded: ``shard-{000000..000123}.tar``.

    Raises:
        UserError: an input does not exist, contains no video, or is not a usable manifest; rows
            contradict each other; or the split of a video is unclear.
    """
    found: list[Entry] = []
    rejected: list[Rejected] = []
    folders: list[str] = []
    for given in itertools.chain.from_iterable(map(_expand_braces, inputs)):
        listing = _expand(given)
        items = [*listing.items]
        entries = [item for item in items if isinstance(item, Entry)]
        folders += [listing.folder] if listing.folder else [folder_of(e) for e in entries]
        found += entries
        rejected += [item for item in items if isinstance(item, Rejected)]
    if not found and not rejected:
        raise UserError("there is nothing to pack: name videos, folders, globs or a csv manifest")
    once, notes = each_once(found)
    return Found(
        name_identities(split_by_folders(once, folders)), [*dict.fromkeys(rejected)], notes
    )


class _Listing(NamedTuple):
    """What one input contains, and the folder that it names; empty for a file."""

    items: Iterable[Entry | Rejected]
    folder: str = ""


def _expand_braces(given: str) -> Iterator[str]:
    """Expand ``{000000..000123}`` and ``{a,b}``, as webdataset does."""
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


def _expand(given: str) -> _Listing:
    if is_url(given):
        return _expand_url(given)
    if "\0" in given:
        raise UserError(f"{printable(given)}: is not a valid file name")
    path = Path(given)
    if path.is_dir():
        return _Listing(_wanted(path, _walk(path)), absolute(given))
    if os.path.lexists(path):
        return _Listing(_local(str(path.absolute()), path.stem))
    if glob.has_magic(given):
        return _in_glob(path)
    raise UserError(f"{printable(given)}: does not exist; name a video, folder, glob or manifest")


def _inside(entry: Entry) -> Iterable[Entry | Rejected]:
    """List the videos of a manifest or a shard; any other file is itself a video."""
    match PurePosixPath(entry.source).suffix.lower():
        case ".csv":
            return _in_manifest(entry.source)
        case ".tar":
            return read_samples(entry)
        case _:
            return [entry]


# ---------------------------------------------------------------------------------------------
# Local files
# ---------------------------------------------------------------------------------------------


def _local(source: str, name: str) -> Iterable[Entry | Rejected]:
    entry = _local_or_not(source, name)
    return [entry] if isinstance(entry, Rejected) else _inside(entry)


def _walk(root: Path) -> Iterator[Path | Rejected]:
    """List everything below a folder. Links to folders are not followed: they may form cycles."""
    unreadable: list[OSError] = []
    for folder, folders, files in os.walk(root, onerror=unreadable.append):
        folders[:] = [name for name in folders if _is_shown(name)]
        yield from (Path(folder, name) for name in files)
    for error in unreadable:
        yield Rejected(printable(str(error.filename)), f"cannot be listed ({error.strerror})")


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


def _in_glob(pattern: Path) -> _Listing:
    plain, rest = _plain_parts(pattern.parts, lambda parts: Path(*parts).is_dir())
    root = Path(*plain)
    # pathlib's glob, unlike glob's, does not follow cycles of links; nor may its matches.
    matches = [*root.glob(str(Path(*rest)))]
    folders = (path for path in matches if path.is_dir() and not path.is_symlink())
    below = (item for path in folders for item in _walk(path))
    files = (path for path in matches if not path.is_dir())
    return _Listing(_wanted(root, itertools.chain(files, below)), absolute(str(root)))


def _wanted(root: Path, items: Iterable[Path | Rejected]) -> list[Entry | Rejected]:
    """Return the videos and shards among paths below a folder, sorted, without hidden ones."""
    listed = [*items]
    result: list[Entry | Rejected] = [item for item in listed if isinstance(item, Rejected)]
    for path in sorted({item for item in listed if isinstance(item, Path)}):
        relative = path.relative_to(root)
        if path.suffix.lower() in EXTENSIONS and all(map(_is_shown, relative.parts)):
            result += _local(str(path.absolute()), str(relative.with_suffix("")))
    return _or_refuse(str(root), result)


def _or_refuse(place: str, items: list[Entry | Rejected]) -> list[Entry | Rejected]:
    if not items:
        known = " ".join(sorted(EXTENSIONS))
        raise UserError(f"{printable(place)}: no videos found; known extensions are {known}")
    return items


def _is_shown(name: str) -> bool:
    return not name.startswith(".")


def _local_or_not(source: str, name: str) -> Entry | Rejected:
    """Make an entry of a local file, or say why it cannot be one."""
    try:
        state = os.stat(source)
    except (OSError, ValueError) as error:
        if os.path.islink(source):
            return Rejected(printable(source), "is a broken link")
        return Rejected(printable(source), reason_of(error))
    if not stat.S_ISREG(state.st_mode):
        kind = "a folder" if stat.S_ISDIR(state.st_mode) else "not a regular file"
        return Rejected(printable(source), f"is {kind}")
    return Entry(
        source=source,
        name=name,
        size=state.st_size,
        version=str(state.st_mtime_ns),
    )


# ---------------------------------------------------------------------------------------------
# URLs
# ---------------------------------------------------------------------------------------------


def _expand_url(url: str) -> _Listing:
    fs, path = filesystem(url)
    try:
        if fs.isfile(path):
            return _Listing(_inside(_remote_entry(url, PurePosixPath(path).stem, fs.info(path))))
        if fs.isdir(path):
            return _in_remote_folder(fs, path, fs.find(path, detail=True))
        if glob.has_magic(path):
            plain, rest = _plain_parts(path.split("/"), lambda parts: fs.isdir("/".join(parts)))
            root = "/".join(plain)
            found = fs.glob("/".join([glob.escape(root), *rest]), detail=True)
            return _in_remote_folder(fs, root, found)
    except UserError:
        raise
    except Exception as error:  # Each file system has errors of its own.
        raise UserError(f"{url}: cannot be read ({printable(reason_of(error))})") from error
    raise UserError(f"{url}: does not exist; name a video, folder, glob or manifest")


def _in_remote_folder(
    fs: FileSystem, root: str, infos: Mapping[str, Mapping[str, Any]]
) -> _Listing:
    result: list[Entry | Rejected] = []
    for path, info in sorted(infos.items()):
        relative = PurePosixPath(posixpath.relpath(path, root or "/"))
        wanted = relative.suffix.lower() in EXTENSIONS
        if info["type"] == "file" and wanted and all(map(_is_shown, relative.parts)):
            name = str(relative.with_suffix(""))
            result += _inside(_remote_entry(fs.unstrip_protocol(path), name, info))
    folder = fs.unstrip_protocol(root)
    return _Listing(_or_refuse(folder, result), folder)


def _remote_entry(url: str, name: str, info: Mapping[str, Any]) -> Entry:
    version = next((str(info[key]) for key in _VERSION_KEYS if info.get(key)), "")
    return Entry(
        source=url,
        name=name,
        size=int(info.get("size") or 0),
        version=version,
    )


# ---------------------------------------------------------------------------------------------
# Manifests
# ---------------------------------------------------------------------------------------------


def _in_manifest(manifest: str) -> list[Entry | Rejected]:
    shown = printable(manifest)
    try:
        with opened(Entry(manifest, "")) as file:
            text = file.read().decode("utf-8-sig")
        rows = read_rows(shown, text)
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{shown}: is not a csv in UTF-8 ({error}); save it as UTF-8") from None
    return [_manifest_entry(manifest, row) for row in rows]


def _manifest_entry(manifest: str, row: Row) -> Entry | Rejected:
    entry = _named_entry(manifest, row.file)
    if isinstance(entry, Rejected):
        return entry
    if row.problem:
        return Rejected(entry.shown, f"line {row.line} of the manifest: {row.problem}")
    return entry._replace(
        identity=printable(row.identity),
        split=printable(row.split),
        box=row.box,
        frames=row.frames,
        row=f"{printable(manifest)}, line {row.line}",
    )


def _named_entry(manifest: str, file: str) -> Entry | Rejected:
    """Find the file that a row names: relative to the manifest, absolute, or a URL."""
    folder = manifest.rpartition("/")[0]
    file = expanded(file, folder)
    below = file.removeprefix(f"{folder}/")
    name = str(PurePosixPath(below).with_suffix(""))
    if not is_url(manifest) and not is_url(file):
        return _local_or_not(os.path.join(folder, file), name)
    if not is_url(file):
        file = f"{folder}/{file}"
    try:
        fs, path = filesystem(file)
        return _remote_entry(file, name, fs.info(path))
    except FileNotFoundError:
        return Rejected(printable(file), "No such file or directory")
    except (UserError, OSError) as error:
        return Rejected(printable(file), f"cannot be read ({printable(reason_of(error))})")
