"""What to pack: files, folders, globs, csv manifests and WebDataset shards, local or on fsspec.

Nothing is decoded here. What cannot be a video is set aside by name, so that one bad file does not
stop a run. No file is ever written, and no member of a tar is given a place by its name.
"""

import csv
import glob
import itertools
import json
import os
import posixpath
import stat
import tarfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from prioritycut_ray.data.shards import unread_rest
from prioritycut_ray.errors import UserError
from prioritycut_ray.packing.entries import Entry, Rejected, Span, opened, printable
from prioritycut_ray.packing.identities import (
    each_once,
    folder_of,
    name_identities,
    split_by_folders,
)
from prioritycut_ray.packing.manifest import SPLIT_NAMES, Row, read_rows
from prioritycut_ray.storage.filesystem import FileSystem, filesystem
from prioritycut_ray.storage.paths import absolute, expanded, is_url

VIDEO_EXTENSIONS = frozenset(
    {
        ".mp4",
        ".mov",
        ".m4v",
        ".mkv",
        ".webm",
        ".avi",
        ".mpg",
        ".mpeg",
        ".ts",
        ".mts",
        ".m2ts",
        ".vob",
        ".flv",
        ".wmv",
        ".3gp",
        ".ogv",
        ".gif",
    }
)
EXTENSIONS = VIDEO_EXTENSIONS | {".tar"}
LONGEST_JSON = 1 << 20
# What file systems call the state of a file, the surest first.
_VERSION_KEYS = ("ETag", "etag", "mtime", "LastModified", "last_modified", "updated", "created")


class Found(NamedTuple):
    """What the inputs hold.

    Attributes:
        entries: videos to try, each once, in a fixed order.
        rejected: what is set aside.
        notes: what was understood of it that is worth a word, one line each.
    """

    entries: list[Entry]
    rejected: list[Rejected]
    notes: list[str]


def find_videos(inputs: Sequence[str]) -> Found:
    """List the videos that the inputs name.

    Args:
        inputs: videos, WebDataset shards (``.tar``), folders (searched all through; hidden files
            are ignored, links to folders are not followed), globs, csv manifests; each a local
            path or an fsspec URL.

    Raises:
        UserError: if an input does not exist, holds no video, or is no usable manifest; if rows
            contradict each other; or if it is not clear which split a video is for.
    """
    found: list[Entry] = []
    rejected: list[Rejected] = []
    folders: list[str] = []
    for given in inputs:
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
    """What one input holds, and the folder that it names; empty for files, that name none."""

    items: Iterable[Entry | Rejected]
    folder: str = ""


def _expand(given: str) -> _Listing:
    given = expanded(given)
    if is_url(given):
        return _expand_url(given)
    if "\0" in given:
        raise UserError(f"{printable(given)}: is no file name")
    path = Path(given)
    if path.is_dir():
        return _Listing(_wanted(path, _walk(path)), absolute(given))
    if os.path.lexists(path):
        return _Listing(_local(str(path.absolute()), path.stem))
    if glob.has_magic(given):
        return _in_glob(path)
    raise UserError(f"{printable(given)}: does not exist; name a video, folder, glob or manifest")


def _inside(entry: Entry) -> Iterable[Entry | Rejected]:
    """Look into what stands for many videos."""
    match PurePosixPath(entry.source).suffix.lower():
        case ".csv":
            return _in_manifest(entry.source)
        case ".tar":
            return _in_shard(entry)
        case _:
            return [entry]


# ---------------------------------------------------------------------------------------------
# Local files
# ---------------------------------------------------------------------------------------------


def _local(source: str, name: str) -> Iterable[Entry | Rejected]:
    entry = _local_or_not(source, name)
    return [entry] if isinstance(entry, Rejected) else _inside(entry)


def _walk(root: Path) -> Iterator[Path | Rejected]:
    """List what is below a folder. Links to folders are not followed: they may lead in circles."""
    unreadable: list[OSError] = []
    for folder, folders, files in os.walk(root, onerror=unreadable.append):
        folders[:] = [name for name in folders if _is_shown(name)]
        yield from (Path(folder, name) for name in files)
    for error in unreadable:
        yield Rejected(printable(str(error.filename)), f"cannot be listed ({error.strerror})")


def _plain_parts(
    parts: Sequence[str], is_folder: Callable[[Sequence[str]], bool]
) -> tuple[list[str], list[str]]:
    """The folders that a pattern begins with, and the rest; ``clips [1]`` may name a folder."""
    count = 0
    while count < len(parts) - 1:
        if glob.has_magic(parts[count]) and not is_folder(parts[: count + 1]):
            break
        count += 1
    return [*parts[:count]], [*parts[count:]]


def _in_glob(pattern: Path) -> _Listing:
    plain, rest = _plain_parts(pattern.parts, lambda parts: Path(*parts).is_dir())
    root = Path(*plain)
    # pathlib's, unlike glob's, does not run in circles through links; nor may what it matches.
    matches = [*root.glob(str(Path(*rest)))]
    folders = (path for path in matches if path.is_dir() and not path.is_symlink())
    below = (item for path in folders for item in _walk(path))
    files = (path for path in matches if not path.is_dir())
    return _Listing(_wanted(root, itertools.chain(files, below)), absolute(str(root)))


def _wanted(root: Path, items: Iterable[Path | Rejected]) -> list[Entry | Rejected]:
    """Take the videos and shards among paths below a folder, sorted; hidden ones are none."""
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
        raise UserError(f"{printable(place)}: no videos found there; known extensions are {known}")
    return items


def _is_shown(name: str) -> bool:
    return not name.startswith(".")


def _local_or_not(source: str, name: str) -> Entry | Rejected:
    """Make an entry of a local file, unless it is no file."""
    try:
        state = os.stat(source)
    except (OSError, ValueError) as error:
        if os.path.islink(source):
            return Rejected(printable(source), "is a link that leads nowhere")
        reason = getattr(error, "strerror", None) or str(error)
        return Rejected(printable(source), reason)
    if not stat.S_ISREG(state.st_mode):
        kind = "a folder" if stat.S_ISDIR(state.st_mode) else "no regular file"
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
        raise UserError(f"{url}: cannot be read ({printable(str(error))})") from error
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
        raise UserError(f"{shown}: is not a csv in UTF-8 ({error})") from None
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
    """Find the file that a row names, relative to the manifest, an absolute path, or a URL."""
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
        return Rejected(printable(file), f"cannot be read ({printable(str(error))})")


# ---------------------------------------------------------------------------------------------
# WebDataset shards of others
# ---------------------------------------------------------------------------------------------


class _Sample(NamedTuple):
    """The members of one key of a tar."""

    video: tarfile.TarInfo | None = None
    facts: dict[str, Any] | None = None


def _in_shard(shard: Entry) -> list[Entry | Rejected]:
    """List the samples of a tar: a video and a JSON of the same key each."""
    shown = shard.shown
    result: list[Entry | Rejected] = []
    samples: dict[str, _Sample] = {}
    try:
        with opened(shard) as file, tarfile.open(fileobj=file, mode="r:") as tar:
            result += _read_members(shard, tar, samples)
    except (OSError, tarfile.TarError) as error:
        reason = getattr(error, "strerror", None) or "is no tar archive"
        return [Rejected(shown, reason)]
    except Exception as error:  # Whatever a strange file sets off must not end the run.
        result.append(Rejected(shown, f"is a damaged tar ({printable(str(error))})"))
    for key, sample in samples.items():
        if sample.video is None:
            result.append(Rejected(f"{shown}/{printable(key)}", "has no video beside its JSON"))
        elif sample.facts is None:
            member = printable(sample.video.name)
            result.append(Rejected(f"{shown}/{member}", "has no usable JSON beside it"))
        else:
            result.append(_sample_entry(shard, key, sample.video, sample.facts))
    return result or [Rejected(shown, "holds no samples")]


def _read_members(
    shard: Entry, tar: tarfile.TarFile, samples: dict[str, _Sample]
) -> Iterator[Rejected]:
    """Sort the members of a tar into samples; what is of no use comes back by name."""
    shown, size = shard.shown, shard.size
    seen: set[str] = set()
    try:
        for member in tar:
            if member.isdir():
                continue
            if reason := _why_not_read(member, seen, size):
                yield Rejected(f"{shown}/{printable(member.name)}", reason)
                continue
            seen.add(member.name)
            yield from _take(shown, tar, member, samples)
        damage = unread_rest(tar)
    except (tarfile.TarError, OSError, EOFError):
        damage = "is damaged or cut off"
    if damage:
        yield Rejected(shown, f"{damage}; the samples before that are used")


def _why_not_read(member: tarfile.TarInfo, seen: set[str], size: int) -> str:
    path = PurePosixPath(member.name)
    if path.is_absolute() or ".." in path.parts or "\0" in member.name:
        return "its name leads out of the archive; it is not read"
    if not member.isreg() or member.issparse():
        return "is no regular file"
    if member.offset_data + member.size > size:
        return "is cut off with the end of the archive"
    if member.name in seen:
        return "comes twice; the first one is used"
    if member.size == 0:
        return "is empty (0 bytes)"
    return ""


def _take(
    shown: str, tar: tarfile.TarFile, member: tarfile.TarInfo, samples: dict[str, _Sample]
) -> Iterator[Rejected]:
    """Put a member into its sample. As in webdataset, the key ends at the first dot."""
    folder, _, base = member.name.rpartition("/")
    stem, _, extension = base.partition(".")
    key = f"{folder}/{stem}" if folder else stem
    sample = samples.get(key, _Sample())
    if f".{extension.lower()}" in VIDEO_EXTENSIONS:
        if sample.video is not None:
            yield Rejected(f"{shown}/{printable(member.name)}", "is a second video of its key")
            return
        samples[key] = sample._replace(video=member)
    elif extension.lower() == "json":
        facts = _json_object(tar, member)
        if facts is None:
            yield Rejected(f"{shown}/{printable(member.name)}", "is no JSON object")
        samples[key] = sample._replace(facts=facts)


def _json_object(tar: tarfile.TarFile, member: tarfile.TarInfo) -> dict[str, Any] | None:
    if member.size > LONGEST_JSON:
        return None
    file = tar.extractfile(member)
    try:
        value = json.loads(file.read() if file else b"")
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _sample_entry(shard: Entry, key: str, video: tarfile.TarInfo, facts: dict[str, Any]) -> Entry:
    split = _word(facts.get("split"))
    return shard._replace(
        name=f"{shard.name}/{key}",
        identity=_word(facts.get("identity")) or _word(facts.get("identity_id")),
        split=SPLIT_NAMES.get(split.casefold(), split),
        span=Span(video.offset_data, video.size),
        member=video.name,
        size=video.size,
    )


def _word(value: Any) -> str:
    """Read a name out of JSON, which may be a number."""
    return printable(str(value).strip()) if isinstance(value, str | int) else ""
