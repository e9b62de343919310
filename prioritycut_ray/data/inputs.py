"""What to pack: files, folders, globs, csv manifests and WebDataset shards, local or on fsspec.

Nothing is decoded here. What cannot be a video is set aside by name, so that one bad file does not
stop a run. No file is ever written, and no member of a tar is given a place by its name.
"""

import csv
import glob
import io
import itertools
import json
import math
import os
import posixpath
import stat
import tarfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import IO, Any, NamedTuple

from prioritycut_ray.errors import UserError
from prioritycut_ray.paths import resolved
from prioritycut_ray.storage import FileSystem, filesystem

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
BOX_COLUMNS = ("left", "top", "right", "bottom")
LONGEST_JSON = 1 << 20
# What file systems call the state of a file, the surest first.
_VERSION_KEYS = ("ETag", "etag", "mtime", "LastModified", "last_modified", "updated", "created")


class Rejected(NamedTuple):
    """A video that was left out, and why."""

    file: str
    reason: str


class Box(NamedTuple):
    """A part of the upright frame, in pixels; right and bottom are outside of it."""

    left: int
    top: int
    right: int
    bottom: int


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
        split: as the manifest says; empty if it does not.
        box: the part to keep; the centre square if there is none.
        span: where it lies in a tar.
        member: its name in the tar.
        size: bytes; 0 if unknown.
        version: changes when the file does.
    """

    source: str
    name: str
    identity: str
    split: str = ""
    box: Box | None = None
    span: Span | None = None
    member: str = ""
    size: int = 0
    version: str = ""

    @property
    def shown(self) -> str:
        """What to call it before people."""
        return printable(f"{self.source}/{self.member}" if self.member else self.source)


class Found(NamedTuple):
    """What the inputs hold: videos to try, each once, in a fixed order; and what is set aside."""

    entries: list[Entry]
    rejected: list[Rejected]


def find_videos(inputs: Sequence[str]) -> Found:
    """List the videos that the inputs name.

    Args:
        inputs: videos, WebDataset shards (``.tar``), folders (searched all through; hidden files
            are ignored, links to folders are not followed), globs, csv manifests; each a local
            path or an fsspec URL.

    Raises:
        UserError: if an input does not exist, holds no video, or is no usable manifest.
    """
    found: dict[tuple[Any, ...], Entry] = {}
    rejected: dict[str, Rejected] = {}
    for given in inputs:
        for item in _expand(given):
            if isinstance(item, Rejected):
                rejected.setdefault(item.file, item)
                continue
            place = item.source if is_url(item.source) else os.path.realpath(item.source)
            found.setdefault((place, item.span, item.box), item)
    if not found and not rejected:
        raise UserError("there is nothing to pack: name videos, folders, globs or a csv manifest")
    return Found([*found.values()], [*rejected.values()])


def absolute(given: str) -> str:
    """Name an input in a way that does not depend on the current folder, nor on this process.

    Raises:
        UserError: it holds a variable that is not set, or names an unknown user.
    """
    place = resolved(given)
    return place if is_url(place) else os.path.abspath(place)


def is_url(given: str) -> bool:
    """Tell an fsspec URL from a local path."""
    return "://" in given


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


def _expand(given: str) -> Iterable[Entry | Rejected]:
    if is_url(given):
        return _expand_url(given)
    if "\0" in given:
        raise UserError(f"{printable(given)}: is no file name")
    path = Path(given)
    if path.is_dir():
        return _wanted(path, _walk(path))
    if os.path.lexists(path):
        return _local(str(path.absolute()), path.stem)
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


def _in_glob(pattern: Path) -> list[Entry | Rejected]:
    plain = [*itertools.takewhile(lambda part: not glob.has_magic(part), pattern.parts)]
    root, rest = Path(*plain), pattern.parts[len(plain) :]
    # pathlib's, unlike glob's, does not run in circles through links; nor may what it matches.
    matches = [*root.glob(str(Path(*rest)))]
    folders = (path for path in matches if path.is_dir() and not path.is_symlink())
    below = (item for path in folders for item in _walk(path))
    return _wanted(root, itertools.chain((path for path in matches if not path.is_dir()), below))


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
        identity=printable(PurePosixPath(source).stem),
        size=state.st_size,
        version=str(state.st_mtime_ns),
    )


# ---------------------------------------------------------------------------------------------
# URLs
# ---------------------------------------------------------------------------------------------


def _expand_url(url: str) -> Iterable[Entry | Rejected]:
    fs, path = filesystem(url)
    try:
        if fs.isfile(path):
            return _inside(_remote_entry(url, PurePosixPath(path).stem, fs.info(path)))
        if fs.isdir(path):
            return _in_remote_folder(fs, path, fs.find(path, detail=True))
        if glob.has_magic(path):
            plain = itertools.takewhile(lambda p: not glob.has_magic(p), path.split("/"))
            return _in_remote_folder(fs, "/".join(plain), fs.glob(path, detail=True))
    except UserError:
        raise
    except Exception as error:  # Each file system has errors of its own.
        raise UserError(f"{url}: cannot be read ({printable(str(error))})") from error
    raise UserError(f"{url}: does not exist; name a video, folder, glob or manifest")


def _in_remote_folder(
    fs: FileSystem, root: str, infos: Mapping[str, Mapping[str, Any]]
) -> list[Entry | Rejected]:
    result: list[Entry | Rejected] = []
    for path, info in sorted(infos.items()):
        relative = PurePosixPath(posixpath.relpath(path, root or "/"))
        wanted = relative.suffix.lower() in EXTENSIONS
        if info["type"] == "file" and wanted and all(map(_is_shown, relative.parts)):
            name = str(relative.with_suffix(""))
            result += _inside(_remote_entry(fs.unstrip_protocol(path), name, info))
    return _or_refuse(fs.unstrip_protocol(root), result)


def _remote_entry(url: str, name: str, info: Mapping[str, Any]) -> Entry:
    version = next((str(info[key]) for key in _VERSION_KEYS if info.get(key)), "")
    return Entry(
        source=url,
        name=name,
        identity=printable(PurePosixPath(url).stem),
        size=int(info.get("size") or 0),
        version=version,
    )


# ---------------------------------------------------------------------------------------------
# Manifests
# ---------------------------------------------------------------------------------------------


def _in_manifest(manifest: str) -> list[Entry | Rejected]:
    shown = printable(manifest)
    try:
        with opened(Entry(manifest, "", "")) as file:
            text = file.read().decode("utf-8-sig")
        rows = list(csv.DictReader(io.StringIO(text, newline="")))
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{shown}: is no csv in UTF-8 ({error})") from None
    if not rows or "file" not in rows[0]:
        raise UserError(f"{shown}: needs a header with the column 'file', and a row a video")
    return [_manifest_entry(manifest, line, row) for line, row in enumerate(rows, start=2)]


def _manifest_entry(manifest: str, line: int, row: dict[str, Any]) -> Entry | Rejected:
    file = (row["file"] or "").strip()
    if not file:
        shown = printable(manifest)
        raise UserError(f"{shown}, line {line}: 'file' is empty; fill it or remove the line")
    entry = _named_entry(manifest, file)
    if isinstance(entry, Rejected):
        return entry
    try:
        box = _box(row)
    except ValueError as error:
        return Rejected(entry.shown, f"line {line} of the manifest: {error}")
    identity = (row.get("identity") or row.get("identity_id") or "").strip()
    return entry._replace(
        identity=printable(identity) or entry.identity,
        split=printable((row.get("split") or "").strip()),
        box=box,
    )


def _named_entry(manifest: str, file: str) -> Entry | Rejected:
    """Find the file that a row names, relative to the manifest, an absolute path, or a URL."""
    name = str(PurePosixPath(file).with_suffix(""))
    if not is_url(manifest) and not is_url(file):
        return _local_or_not(os.path.join(os.path.dirname(manifest), file), name)
    if not is_url(file):
        file = f"{manifest.rpartition('/')[0]}/{file}"
    try:
        fs, path = filesystem(file)
        return _remote_entry(file, name, fs.info(path))
    except FileNotFoundError:
        return Rejected(printable(file), "No such file or directory")
    except (UserError, OSError) as error:
        return Rejected(printable(file), f"cannot be read ({printable(str(error))})")


def _box(row: Mapping[str, Any]) -> Box | None:
    """Read the columns left, top, right and bottom.

    Raises:
        ValueError: if they are no box; the message says why.
    """
    cells = [(row.get(column) or "").strip() for column in BOX_COLUMNS]
    if not any(cells):
        return None
    try:
        values = [float(cell) for cell in cells]
    except ValueError:
        raise ValueError(f"the box {','.join(cells)} needs four numbers") from None
    if not all(map(math.isfinite, values)):
        raise ValueError(f"the box {','.join(cells)} needs four finite numbers")
    box = Box(*map(round, values))
    if not (0 <= box.left < box.right and 0 <= box.top < box.bottom):
        raise ValueError(f"the box {','.join(cells)} is empty, or outside of the frame")
    return box


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
    end = 0
    try:
        for member in tar:
            end = member.offset_data + (member.size + 511) // 512 * 512
            if member.isdir():
                continue
            if reason := _why_not_read(member, seen, size):
                yield Rejected(f"{shown}/{printable(member.name)}", reason)
                continue
            seen.add(member.name)
            yield from _take(shown, tar, member, samples)
    except (tarfile.TarError, OSError, EOFError):
        yield Rejected(shown, "is damaged or cut off; the samples before the damage are used")
        return
    # A whole tar ends with two empty blocks, which a cut at the end of a member takes away.
    if size < end + 512:
        yield Rejected(shown, "is cut off; the samples before the cut are used")


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
    name, identity = f"{shard.name}/{key}", facts.get("identity")
    return shard._replace(
        name=name,
        identity=printable(identity if isinstance(identity, str) and identity else name),
        span=Span(video.offset_data, video.size),
        member=video.name,
        size=video.size,
    )
