"""Packing: any pile of videos, in parallel on Ray, into shards of one training size.

Every video is decoded in a Ray task of its own, because a decoder may crash or hang on a damaged
file: that costs one clip, not the run. The driver alone writes, in the order of the inputs, so
the output is the same however many tasks run at once.
"""

import csv
import glob
import hashlib
import io
import itertools
import os
import signal
import time
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import ray
from ray.exceptions import OutOfMemoryError, WorkerCrashedError

from prioritycut_ray.data.shards import ClipIndex, Member, ShardWriter, filesystem, make_keys
from prioritycut_ray.data.video import (
    VideoError,
    center_square,
    check_size,
    frames_upright,
    probe,
    resize,
    write_video,
)
from prioritycut_ray.errors import UserError
from prioritycut_ray.ray_session import start_ray

VIDEO_EXTENSIONS = frozenset(
    {".mp4", ".mov", ".m4v", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".gif"}
)
REJECTED_NAME = "rejected.csv"
TEST_SHARE = 0.1
# Time for one video: a floor, and more for large files. A decoder that takes longer hangs.
SECONDS_PER_VIDEO = 300
SECONDS_PER_MEGABYTE = 10


class Rejected(NamedTuple):
    """A video that was left out, and why."""

    file: str
    reason: str


class PackProgress(NamedTuple):
    """How far a run has come: videos done (rejected ones too), of how many, and the last one."""

    done: int
    total: int
    rejected: int
    file: str


@dataclass(frozen=True)
class PackReport:
    """What a run made.

    Attributes:
        index: as written to the output folder.
        clips: number of clips packed.
        frames: number of frames in them.
        size_bytes: of their mp4s together.
        rejected: what was left out; ``rejected.csv`` in the output folder says the same.
        warnings: things to know, one line each.
    """

    index: ClipIndex
    clips: int
    frames: int
    size_bytes: int
    rejected: tuple[Rejected, ...]
    warnings: tuple[str, ...]


class Entry(NamedTuple):
    """One video to pack.

    Attributes:
        path: where it is.
        name: relative path without extension, which its key is made of.
        identity: who or what is shown.
        split: as the manifest says; empty if it does not.
    """

    path: Path
    name: str
    identity: str
    split: str


def pack_videos(
    inputs: Sequence[str],
    out: str,
    *,
    size: int,
    on_progress: Callable[[PackProgress], None] | None = None,
) -> PackReport:
    """Pack videos into shards of square clips.

    Each video is turned upright, cut to its centre square, scaled to ``size`` (up too) and encoded
    with a short GOP, all its frames kept. One that is damaged or has no two frames is rejected.
    Ray is started if it is not running; on a cluster every node must see the inputs.

    Args:
        inputs: videos, folders (searched all through; hidden files are ignored), globs, or csv
            manifests with the columns ``file`` and, if you like, ``identity`` (or ``identity_id``)
            and ``split``; paths are relative to the manifest. The default identity is the file
            name; by default a tenth of the identities makes the split ``test``, the others
            ``train``.
        out: folder to make, a local path or any fsspec URL.
        size: side of the packed frames in pixels, a multiple of 32.
        on_progress: called after each video.

    Returns:
        What was made and what was left out.

    Raises:
        UserError: if an input does not exist or holds no video, if the output folder is in use,
            or if no video is usable.
    """
    check_size(size)
    entries = find_videos(inputs)
    _check_unused(out)
    start_ray()
    keys = make_keys(entry.name for entry in entries)
    packed: dict[str, Entry] = {}
    rejected: list[Rejected] = []
    warnings: list[str] = []
    with ShardWriter(out) as writer:
        for entry, key, result in zip(entries, keys, _process(entries, keys, size), strict=True):
            if isinstance(result, Rejected):
                rejected.append(result)
            else:
                writer.add(result)
                packed[key] = entry
                warnings += _warnings(entry, result)
            if on_progress is not None:
                done = len(packed) + len(rejected)
                on_progress(PackProgress(done, len(entries), len(rejected), str(entry.path)))
        _write_rejected(out, rejected)
        if not packed:
            raise UserError(_nothing_usable(out, rejected))
        index = writer.finish(dict(zip(packed, assign_splits([*packed.values()]), strict=True)))
    return PackReport(
        index=index,
        clips=len(index.clips),
        frames=sum(clip.frames for clip in index.clips),
        size_bytes=sum(clip.size for clip in index.clips),
        rejected=tuple(rejected),
        warnings=(*warnings, *_shared_identities(index)),
    )


# ---------------------------------------------------------------------------------------------
# What to pack
# ---------------------------------------------------------------------------------------------


def find_videos(inputs: Sequence[str]) -> list[Entry]:
    """List the videos that the inputs name, each once, in a fixed order.

    Raises:
        UserError: if an input does not exist, holds no video, or is no usable manifest.
    """
    found: dict[Path, Entry] = {}
    for given in inputs:
        for entry in _expand(given):
            found.setdefault(entry.path.resolve(), entry)
    if not found:
        raise UserError("there is nothing to pack: name videos, folders, globs or a csv manifest")
    return list(found.values())


def _expand(given: str) -> list[Entry]:
    path = Path(given)
    if path.is_dir():
        return _videos_among(path, path.rglob("*"))
    if path.suffix.lower() == ".csv" and path.exists():
        return _in_manifest(path)
    if path.exists():
        return [_entry(path, path.stem)]
    if glob.has_magic(given):
        return _in_glob(path)
    raise UserError(f"{given}: does not exist; name a video, folder, glob or csv manifest")


def _in_glob(pattern: Path) -> list[Entry]:
    plain = itertools.takewhile(lambda part: not glob.has_magic(part), pattern.parts)
    matches = glob.glob(str(pattern), recursive=True)
    below = {path for match in matches for path in (Path(match), *Path(match).rglob("*"))}
    return _videos_among(Path(*plain), below)


def _videos_among(root: Path, paths: Iterable[Path]) -> list[Entry]:
    """Take the videos among paths below a folder, sorted; hidden ones are no videos."""
    entries = []
    for path in sorted(paths):
        relative = path.relative_to(root)
        wanted = path.suffix.lower() in VIDEO_EXTENSIONS and all(map(_is_shown, relative.parts))
        if wanted and path.is_file():
            entries.append(_entry(path, str(relative.with_suffix(""))))
    if not entries:
        known = " ".join(sorted(VIDEO_EXTENSIONS))
        raise UserError(f"{root}: no videos found there; known extensions are {known}")
    return entries


def _is_shown(name: str) -> bool:
    return not name.startswith(".")


def _entry(path: Path, name: str) -> Entry:
    # Absolute: a worker may have another current folder.
    return Entry(path.absolute(), name, identity=path.stem, split="")


def _in_manifest(manifest: Path) -> list[Entry]:
    try:
        with manifest.open(encoding="utf-8-sig", newline="") as file:
            rows = list(csv.DictReader(file))
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{manifest}: is no csv in UTF-8 ({error})") from None
    if not rows or "file" not in rows[0]:
        raise UserError(f"{manifest}: needs a header with the column 'file', and a row a video")
    return [_manifest_entry(manifest, line, row) for line, row in enumerate(rows, start=2)]


def _manifest_entry(manifest: Path, line: int, row: dict[str, Any]) -> Entry:
    file = (row["file"] or "").strip()
    if not file:
        raise UserError(f"{manifest}, line {line}: 'file' is empty; fill it or remove the line")
    entry = _entry(manifest.parent / file, str(Path(file).with_suffix("")))
    identity = (row.get("identity") or row.get("identity_id") or "").strip()
    return entry._replace(
        identity=identity or entry.identity, split=(row.get("split") or "").strip()
    )


def assign_splits(entries: Sequence[Entry]) -> list[str]:
    """Choose a split for every video: the manifest's, else one and the same for its identity.

    The first tenth of the identities without a split, in the order of their SHA-256, is ``test``
    (at least one, if there are two); the others are ``train``.
    """
    known = {entry.identity: entry.split for entry in reversed(entries) if entry.split}
    free = sorted({e.identity for e in entries} - set(known), key=_digest)
    tests = max(1, round(TEST_SHARE * len(free))) if len(free) > 1 else 0
    default = {name: "test" if rank < tests else "train" for rank, name in enumerate(free)}
    return [entry.split or (known | default)[entry.identity] for entry in entries]


def _digest(identity: str) -> str:
    return hashlib.sha256(identity.encode("utf-8", "surrogatepass")).hexdigest()


def _shared_identities(index: ClipIndex) -> list[str]:
    splits: dict[str, set[str]] = defaultdict(set)
    for clip in index.clips:
        splits[clip.identity].add(clip.split)
    return [
        f"identity {identity!r} is in {' and '.join(sorted(names))}, as the manifest says"
        for identity, names in sorted(splits.items())
        if len(names) > 1
    ]


# ---------------------------------------------------------------------------------------------
# The tasks
# ---------------------------------------------------------------------------------------------


def _process(
    entries: Sequence[Entry], keys: Sequence[str], size: int
) -> Iterator[Member | Rejected]:
    """Pack every video in a task of its own; results come in the order of the entries."""
    # A crash is the file's fault: trying again would crash again.
    task = ray.remote(num_cpus=1, max_retries=0)(_pack_one)
    in_flight = 2 * max(1, int(ray.cluster_resources().get("CPU", 1)))
    waiting: deque[tuple[Entry, int, float, Any]] = deque()
    for entry, key in zip(entries, keys, strict=True):
        if len(waiting) == in_flight:
            yield _settled(*waiting.popleft())
        limit = _time_limit(entry.path)
        waiting.append((entry, limit, time.monotonic(), task.remote(entry, key, size, limit)))
    while waiting:
        yield _settled(*waiting.popleft())


def _time_limit(path: Path) -> int:
    size = path.stat().st_size if path.exists() else 0
    return SECONDS_PER_VIDEO + SECONDS_PER_MEGABYTE * (size >> 20)


def _settled(entry: Entry, limit: int, began: float, reference: Any) -> Member | Rejected:
    """Wait for a task; its death is a rejection."""
    try:
        result: Member | Rejected = ray.get(reference)
    except OutOfMemoryError:
        return Rejected(str(entry.path), "took more memory than there is")
    except WorkerCrashedError:
        if time.monotonic() - began >= limit:
            return Rejected(str(entry.path), f"took longer than {limit} s to decode")
        return Rejected(str(entry.path), "decoder crashed")
    return result


def _pack_one(entry: Entry, key: str, size: int, limit: int) -> Member | Rejected:
    """Make a training clip of one video; runs in a Ray worker, which it may take down."""
    # The default action ends the process: no Python handler runs while a decoder hangs.
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.alarm(limit)
    try:
        return _member(entry, key, size)
    except VideoError as error:
        return Rejected(str(entry.path), error.reason)
    except Exception as error:  # Whatever a strange file sets off must not end the run.
        return Rejected(str(entry.path), f"cannot be packed ({type(error).__name__}: {error})")
    finally:
        signal.alarm(0)


def _member(entry: Entry, key: str, size: int) -> Member:
    info = probe(entry.path)
    encoded = io.BytesIO()
    frames = 0

    def squares() -> Iterator[Any]:
        nonlocal frames
        for frame in frames_upright(entry.path):
            frames += 1
            yield resize(center_square(frame), size)

    write_video(encoded, squares(), info.fps)
    if frames < 2:
        raise VideoError(
            str(entry.path),
            "1 frame: no source/driving pair can be drawn; usable as a source image",
        )
    return Member(
        key=key,
        data=encoded.getvalue(),
        frames=frames,
        fps=info.fps,
        width=size,
        height=size,
        identity=entry.identity,
        original=entry.path.name,
        variable_rate=info.variable_rate,
    )


# ---------------------------------------------------------------------------------------------
# The output folder
# ---------------------------------------------------------------------------------------------


def _check_unused(out: str) -> None:
    fs, root = filesystem(out)
    if not fs.exists(root):
        return
    if not fs.isdir(root):
        raise UserError(f"{out}: is a file; choose another --out")
    # What a run without a usable video leaves behind does not stand in the way of the next one.
    names = {os.path.basename(path.rstrip("/")) for path in fs.ls(root, detail=False)}
    if names - {REJECTED_NAME}:
        raise UserError(f"{out}: is not empty; choose another --out or remove it")


def _write_rejected(out: str, rejected: Sequence[Rejected]) -> None:
    """Write or remove ``rejected.csv``."""
    fs, root = filesystem(out)
    path = f"{root}/{REJECTED_NAME}"
    if not rejected:
        if fs.exists(path):
            fs.rm_file(path)
        return
    text = io.StringIO(newline="")
    table = csv.writer(text)
    table.writerow(Rejected._fields)
    table.writerows(rejected)
    fs.pipe_file(path, text.getvalue().encode("utf-8", "surrogateescape"))


def _nothing_usable(out: str, rejected: Sequence[Rejected]) -> str:
    reasons = Counter(item.reason for item in rejected)
    first = "; ".join(f"{count} x {reason}" for reason, count in reasons.most_common(3))
    return (
        f"none of {len(rejected)} videos is usable ({first}); "
        f"{out}/{REJECTED_NAME} names each: replace or repair them"
    )


def _warnings(entry: Entry, member: Member) -> list[str]:
    if not member.variable_rate:
        return []
    return [
        f"{entry.path}: comes at a variable frame rate; all {member.frames} frames are kept, "
        f"and {member.fps:.2f} fps is only their average"
    ]
