"""Packing: any pile of videos, in parallel on Ray, into shards of one training size.

Every video is decoded in a Ray task of its own, because a decoder may crash or hang on a damaged
file: that costs one clip, not the run. What a task has made is stored at once, so a run that is
killed goes on where it was. The driver alone writes, and it writes shards at the end, in the order
of the inputs, so the output is the same however many tasks run at once and however often it began.
"""

import csv
import functools
import hashlib
import io
import json
import signal
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import ray
from ray.exceptions import OutOfMemoryError, WorkerCrashedError

from prioritycut_ray.data.shards import (
    ClipIndex,
    Member,
    ShardWriter,
    make_keys,
    read_index,
)
from prioritycut_ray.errors import UserError
from prioritycut_ray.packing.clips import (
    Outcome,
    Recipe,
    make_part,
    read_part,
    write_part,
)
from prioritycut_ray.packing.entries import Entry, Rejected, printable
from prioritycut_ray.packing.inputs import find_videos
from prioritycut_ray.packing.splits import (
    PackedClip,
    assign_splits,
    missing_splits,
    shared_identities,
    split_warnings,
)
from prioritycut_ray.packing.workspace import REJECTED_NAME, Workspace
from prioritycut_ray.ray_cluster.session import start_ray
from prioritycut_ray.storage.filesystem import filesystem
from prioritycut_ray.storage.paths import absolute
from prioritycut_ray.video.decoding import check_size
from prioritycut_ray.video.source import VideoError

# As long as VoxCeleb's clips are usually cut: 34 s at 30 fps.
MAX_FRAMES = 1024
# Time for one video: a floor, and more for large files. A decoder that takes longer hangs.
SECONDS_PER_VIDEO = 300
SECONDS_PER_MEGABYTE = 10
# Raised when the same video and recipe would give other clips: old parts are then made anew.
PART_VERSION = 2


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
        kept: number of videos that an earlier run of the same command had finished.
        known: number of clips that were in the data set already.
        rejected: what was left out; ``rejected.csv`` in the output folder says the same.
        warnings: things to know, one line each.
    """

    index: ClipIndex
    clips: int
    frames: int
    size_bytes: int
    kept: int
    known: int
    rejected: tuple[Rejected, ...]
    warnings: tuple[str, ...]


OnProgress = Callable[[PackProgress], None]


def pack_videos(
    inputs: Sequence[str],
    out: str,
    *,
    size: int,
    copy: bool = False,
    max_frames: int = MAX_FRAMES,
    strict: bool = False,
    on_progress: OnProgress | None = None,
) -> PackReport:
    """Pack videos into shards of square clips.

    Each video is turned upright, cut to its centre square or to the box that a manifest gives,
    split at hard cuts and into segments, scaled to ``size`` (up too) and encoded with a short GOP,
    all its frames kept. One that is damaged or has no two frames is rejected. Ray is started if it
    is not running; on a cluster every node must see the inputs. After a kill, the same call goes
    on where the last one was.

    Args:
        inputs: videos, WebDataset shards, folders (searched all through; hidden files are ignored),
            globs, or csv manifests with the columns ``file`` and, if you like, ``identity`` (or
            ``identity_id``), ``split``, the frame numbers ``start`` and ``end``, and ``left``,
            ``top``, ``right``, ``bottom``; paths are relative to the manifest; all may be fsspec
            URLs. The default identity of a file is its path below the folder. Folders named
            ``train``, ``test`` or ``val`` are splits; by default a tenth of the identities makes
            the split ``test``, the others ``train``.
        out: folder to make, a local path or any fsspec URL.
        size: side of the packed frames in pixels, a multiple of 32.
        copy: keep the streams as they are; those unfit for training are rejected.
        max_frames: longer videos are cut into segments of equal length; 2 or more.
        strict: make no data set if anything is rejected.
        on_progress: called after each video.

    Returns:
        What was made and what was left out.

    Raises:
        UserError: if an input does not exist or holds no video, if the output folder is in use, if
            no video is usable, or with ``strict`` if one is not.
    """
    check_size(size)
    recipe = Recipe(size, copy, max_frames)
    return _run("shard", inputs, out, recipe, None, strict, on_progress)


def append_videos(
    url: str,
    inputs: Sequence[str],
    *,
    copy: bool = False,
    max_frames: int = MAX_FRAMES,
    strict: bool = False,
    on_progress: OnProgress | None = None,
) -> PackReport:
    """Add videos to a data set, at its frame size, in shards of their own.

    Until the new index replaces the old one, at once, nothing shows. Clips that are in the data set
    already, byte by byte, are not added again. An identity keeps its split; a tenth of all
    identities, counting the old ones, is for tests. One process at a time may append.

    Args:
        url: the folder of the data set, a local path or any fsspec URL.
        inputs: as for :func:`pack_videos`.
        copy: as for :func:`pack_videos`.
        max_frames: as for :func:`pack_videos`.
        strict: add nothing if anything is rejected.
        on_progress: called after each video.

    Returns:
        What was added and what was left out.

    Raises:
        UserError: as :func:`pack_videos`, or if there is no data set.
    """
    base = read_index(url)
    sizes = {(clip.width, clip.height) for clip in base.clips}
    if len(sizes) > 1:
        raise UserError(f"{url}: its clips have several sizes; pack a new data set instead")
    recipe = Recipe(base.clips[0].width, copy, max_frames)
    return _run("data append", inputs, url, recipe, base, strict, on_progress)


def _run(
    command: str,
    inputs: Sequence[str],
    out: str,
    recipe: Recipe,
    base: ClipIndex | None,
    strict: bool,
    on_progress: OnProgress | None,
) -> PackReport:
    entries, unusable, notes = find_videos(inputs)
    # What it makes is not what it packs.
    entries = [entry for entry in entries if not _is_below(entry.source, out)]
    unusable = [item for item in unusable if not _is_below(item.file, out)]
    job = {"command": command, "inputs": [absolute(given) for given in inputs], **recipe._asdict()}
    work = Workspace(out)
    with work.claimed(job, appending=base is not None):
        outcomes, kept = _outcomes(entries, unusable, recipe, work, on_progress)
        rejected = (*unusable, *_rejections(entries, outcomes))
        _write_rejected(out, rejected, {entry.shown for entry in entries} if base else None)
        if strict and rejected:
            raise UserError(_refused(out, rejected))
        packed = _clips(entries, outcomes)
        if not packed:
            work.clear()
            raise UserError(_nothing_usable(out, rejected))
        known = {clip.sha256 for clip in base.clips} if base else set()
        new = [clip for clip in packed if clip.segment.sha256 not in known]
        index = _assemble(new, out, recipe, base, work) if new or base is None else base
        work.clear()
    added = index.clips[len(base.clips) if base else 0 :]
    return PackReport(
        index=index,
        clips=len(added),
        frames=sum(clip.frames for clip in added),
        size_bytes=sum(clip.size for clip in added),
        kept=kept,
        known=len(packed) - len(new),
        rejected=rejected,
        warnings=(
            *notes,
            *_warnings(entries, outcomes),
            *split_warnings(new, base),
            *shared_identities(index, entries),
            *missing_splits(index),
        ),
    )


def _is_below(source: str, out: str) -> bool:
    """Tell whether a file lies in the output folder."""
    return absolute(source).startswith(f"{absolute(out).rstrip('/')}/")


def _rejections(entries: Sequence[Entry], outcomes: Sequence[Outcome]) -> list[Rejected]:
    pairs = zip(entries, outcomes, strict=True)
    return [Rejected(entry.shown, outcome.rejected) for entry, outcome in pairs if outcome.rejected]


def _warnings(entries: Sequence[Entry], outcomes: Sequence[Outcome]) -> list[str]:
    pairs = zip(entries, outcomes, strict=True)
    return [f"{entry.shown}: {note}" for entry, outcome in pairs for note in outcome.warnings]


def _clips(entries: Sequence[Entry], outcomes: Sequence[Outcome]) -> list[PackedClip]:
    return [
        PackedClip(entry, outcome, number)
        for entry, outcome in zip(entries, outcomes, strict=True)
        for number in range(len(outcome.segments))
    ]


# ---------------------------------------------------------------------------------------------
# Splits
# ---------------------------------------------------------------------------------------------


# ---------------------------------------------------------------------------------------------
# The tasks
# ---------------------------------------------------------------------------------------------


class _Attempt(NamedTuple):
    """A running task: which entry, the seconds it may take, when it was sent, and which try."""

    position: int
    limit: int
    began: float
    number: int


def _outcomes(
    entries: Sequence[Entry],
    rejected: Sequence[Rejected],
    recipe: Recipe,
    work: Workspace,
    on_progress: OnProgress | None,
) -> tuple[list[Outcome], int]:
    """Make a part of every entry, or find it finished; return outcomes in order, and how many."""
    outcomes: dict[int, Outcome] = {}
    total, failed = len(entries) + len(rejected), len(rejected)

    def settle(position: int, outcome: Outcome) -> None:
        nonlocal failed
        outcomes[position] = outcome
        failed += bool(outcome.rejected)
        if on_progress is not None:
            done = len(outcomes) + len(rejected)
            on_progress(PackProgress(done, total, failed, entries[position].shown))

    names = [_part_name(entry, recipe) for entry in entries]
    for position, name in enumerate(names):
        if (finished := _finished(work, name)) is not None:
            settle(position, finished)
    kept = len(outcomes)
    missing = [position for position in range(len(entries)) if position not in outcomes]
    for position, part in _process(entries, missing, recipe) if missing else ():
        outcome, _ = read_part(part)
        if outcome.lasting:
            work.keep(names[position], part)
        settle(position, outcome)
    return [outcomes[position] for position in range(len(entries))], kept


def _part_name(entry: Entry, recipe: Recipe) -> str:
    """Name a part by all that it depends on; a file that has changed since makes another name."""
    place = (entry.source, entry.size, entry.version, entry.span)
    facts = (PART_VERSION, *place, entry.box, entry.frames, recipe)
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:32]


def _finished(work: Workspace, name: str) -> Outcome | None:
    part = work.kept(name)
    try:
        return None if part is None else read_part(part)[0]
    except ValueError:
        return None  # Damaged since: made anew.


def _process(
    entries: Sequence[Entry], positions: Sequence[int], recipe: Recipe
) -> Iterator[tuple[int, bytes]]:
    """Make the part of every entry in a task of its own; they come in any order."""
    start_ray()
    # Ray itself must not try again: a hanging decoder would cost its time several times.
    task = ray.remote(num_cpus=1, max_retries=0)(_pack_one)
    in_flight = 2 * max(1, int(ray.cluster_resources().get("CPU", 1)))
    waiting = deque((position, 1) for position in positions)
    running: dict[Any, _Attempt] = {}
    while waiting or running:
        while waiting and len(running) < in_flight:
            position, number = waiting.popleft()
            limit = _time_limit(entries[position])
            reference = task.remote(entries[position], recipe, limit)
            running[reference] = _Attempt(position, limit, time.monotonic(), number)
        [reference], _ = ray.wait([*running], num_returns=1)
        attempt = running.pop(reference)
        part = _settled(reference, attempt)
        if part is None:
            waiting.append((attempt.position, attempt.number + 1))
        else:
            yield attempt.position, part


def _time_limit(entry: Entry) -> int:
    return SECONDS_PER_VIDEO + SECONDS_PER_MEGABYTE * (entry.size >> 20)


def _settled(reference: Any, attempt: _Attempt) -> bytes | None:
    """Take the part that a task made, or what its death means; nothing if it is to be repeated."""
    try:
        part: bytes = ray.get(reference)
    except OutOfMemoryError:
        reason = "took more memory than there is"
    except WorkerCrashedError:
        if time.monotonic() - attempt.began >= attempt.limit:
            return _failure(f"took longer than {attempt.limit} s to decode")
        reason = "decoder crashed"
    else:
        return part
    # Once may be the node's fault, or that of a neighbour that took all the memory.
    return None if attempt.number == 1 else _failure(f"{reason}, twice")


def _failure(reason: str) -> bytes:
    return write_part(Outcome(rejected=reason, lasting=False))


def _pack_one(entry: Entry, recipe: Recipe, limit: int) -> bytes:
    """Make the part of one video; runs in a Ray worker, which it may take down."""
    # The default action ends the process: no Python handler runs while a decoder hangs.
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.alarm(limit)
    try:
        return make_part(entry, recipe)
    except VideoError as error:
        return write_part(Outcome(rejected=error.reason))
    except Exception as error:  # Whatever a strange file sets off must not end the run.
        return _failure(f"cannot be packed ({type(error).__name__}: {printable(str(error))})")
    finally:
        signal.alarm(0)


# ---------------------------------------------------------------------------------------------
# The output folder
# ---------------------------------------------------------------------------------------------


def _assemble(
    packed: Sequence[PackedClip], out: str, recipe: Recipe, base: ClipIndex | None, work: Workspace
) -> ClipIndex:
    """Write the clips into shards, then the index."""
    old = base.clips if base is not None else ()
    keys = make_keys((clip.name for clip in packed), used=(clip.key for clip in old))
    splits = assign_splits([clip.entry for clip in packed], old)
    # A long video has many clips in one part.
    clips_of_part = functools.lru_cache(maxsize=1)(lambda name: _finished_clips(work, name))
    with ShardWriter(out, base=base) as writer:
        for key, clip, split in zip(keys, packed, splits, strict=True):
            data = clips_of_part(_part_name(clip.entry, recipe))[clip.number]
            writer.add(_member(key, clip, data, recipe.size)._replace(split=split))
        if base is not None and read_index(out) != base:
            raise UserError(f"{out}: has changed meanwhile; give the same command again")
        return writer.finish(dict(zip(keys, splits, strict=True)))


def _finished_clips(work: Workspace, name: str) -> list[bytes]:
    try:
        return read_part(work.kept(name) or b"")[1]
    except ValueError as error:
        raise UserError(
            f"{work.out}: a finished part was damaged meanwhile ({error}); "
            "give the same command again"
        ) from None


def _member(key: str, clip: PackedClip, data: bytes, size: int) -> Member:
    return Member(
        key=key,
        data=data,
        frames=clip.segment.frames,
        fps=clip.outcome.fps,
        width=size,
        height=size,
        identity=clip.entry.identity,
        original=printable((clip.entry.member or clip.entry.source).rpartition("/")[2]),
        variable_rate=clip.outcome.variable_rate,
        first_frame=clip.segment.first_frame,
    )


def _write_rejected(out: str, rejected: Sequence[Rejected], tried: set[str] | None) -> None:
    """Write or remove ``rejected.csv``; when appending, the rows of videos not tried now stay."""
    fs, root = filesystem(out)
    path = f"{root}/{REJECTED_NAME}"
    rows = [*rejected]
    if tried is not None and fs.exists(path):
        there = csv.DictReader(io.StringIO(fs.cat_file(path).decode(), newline=""))
        gone = tried | {item.file for item in rejected}
        old = (Rejected(row["file"], row["reason"]) for row in there)
        rows = [item for item in old if item.file not in gone] + rows
    if not rows:
        if fs.exists(path):
            fs.rm_file(path)
        return
    text = io.StringIO(newline="")
    table = csv.writer(text)
    table.writerow(Rejected._fields)
    table.writerows(rows)
    fs.pipe_file(path, text.getvalue().encode())


def _refused(out: str, rejected: Sequence[Rejected]) -> str:
    first = "; ".join(f"{item.file}: {item.reason}" for item in rejected[:3])
    more = f"; and {len(rejected) - 3} more" if len(rejected) > 3 else ""
    return (
        f"{len(rejected)} rejected, and --strict asks for none ({first}{more}); "
        f"{out}/{REJECTED_NAME} names each: repair or remove them and give the same command again"
    )


def _nothing_usable(out: str, rejected: Sequence[Rejected]) -> str:
    reasons = Counter(item.reason for item in rejected)
    first = "; ".join(f"{count} x {reason}" for reason, count in reasons.most_common(3))
    return (
        f"none of {len(rejected)} videos is usable ({first}); "
        f"{out}/{REJECTED_NAME} names each: replace or repair them"
    )
