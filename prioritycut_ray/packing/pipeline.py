"""Packing: videos of any kind, in parallel on Ray, into shards of one training size.

Every video is decoded in a Ray task of its own, and its result is stored at once, so a killed run
resumes where it stopped. Only the driver writes, and it writes the shards at the end, in the order
of the inputs: the output does not depend on the number of tasks or of restarts.
"""

import functools
import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from prioritycut_ray.data.index import ClipIndex, read_index, upgrade_index
from prioritycut_ray.data.shard_writer import Member, ShardWriter, make_keys
from prioritycut_ray.errors import UserError
from prioritycut_ray.packing.clips import Outcome, Recipe, Segment, read_part
from prioritycut_ray.packing.entries import Entry, Rejected, printable
from prioritycut_ray.packing.inputs import find_videos
from prioritycut_ray.packing.layout import PLAIN, Layout
from prioritycut_ray.packing.rejections import nothing_usable, refused, write_rejected
from prioritycut_ray.packing.splits import (
    assign_splits,
    missing_splits,
    shared_identities,
    split_warnings,
)
from prioritycut_ray.packing.tasks import make_part_within, make_parts
from prioritycut_ray.packing.workspace import Workspace
from prioritycut_ray.storage.paths import absolute
from prioritycut_ray.video.encoding import PRESETS
from prioritycut_ray.video.random_access import check_size

# As long as VoxCeleb's clips are usually cut: 34 s at 30 fps.
MAX_FRAMES = 1024
# Increased when the same video and recipe would give other clips: old parts are then redone.
PART_VERSION = 3


class PackProgress(NamedTuple):
    """Progress of a run: videos done (including rejected ones), their total, and the last one."""

    done: int
    total: int
    rejected: int
    file: str


@dataclass(frozen=True)
class PackReport:
    """The result of a run.

    Attributes:
        index: as written to the output folder.
        clips: number of clips packed.
        frames: number of frames in them.
        size_bytes: total size of their mp4s.
        splits: number of them in each split that got some.
        kept: number of videos that an interrupted run of the same command had finished.
        known: number of clips that were already in the data set.
        rejected: what was left out; ``rejected.csv`` in the output folder says the same.
        warnings: one line each.
    """

    index: ClipIndex
    clips: int
    frames: int
    size_bytes: int
    splits: dict[str, int]
    kept: int
    known: int
    rejected: tuple[Rejected, ...]
    warnings: tuple[str, ...]


class PackedClip(NamedTuple):
    """A clip to write: its video, and which of the video's segments it is."""

    entry: Entry
    outcome: Outcome
    number: int

    @property
    def segment(self) -> Segment:
        """The clip's place in its video."""
        return self.outcome.segments[self.number]

    @property
    def name(self) -> str:
        """The name from which its key is made."""
        frames = self.entry.frames
        part = "" if frames is None else f"_{frames.start:g}-{_number_or_end(frames.end)}"
        alone = len(self.outcome.segments) == 1
        return f"{self.entry.name}{part}" + ("" if alone else f"_{self.number:04d}")


def _number_or_end(number: float | None) -> str:
    return "end" if number is None else f"{number:.10g}"


OnProgress = Callable[[PackProgress], None]


def pack_videos(
    inputs: Sequence[str],
    out: str,
    *,
    size: int,
    copy: bool = False,
    preset: str = "default",
    max_frames: int = MAX_FRAMES,
    layout: Layout = PLAIN,
    strict: bool = False,
    on_progress: OnProgress | None = None,
) -> PackReport:
    """Pack videos into shards of square clips.

    Each video is turned upright, cut to its centre square or to the box that a manifest gives,
    split at hard cuts and into segments, scaled to ``size`` (up or down) and encoded with a short
    GOP; all its frames are kept. A damaged video, or one of fewer than two frames, is rejected. Ray
    is started if it is not running; on a cluster every node must see the inputs. After a kill, the
    same call resumes.

    Args:
        inputs: videos, WebDataset shards, folders (searched recursively; hidden files are ignored),
            globs, or csv files: manifests with the column ``file``, or published metadata with
            ``video_id`` (docs/your-data.md); all may be fsspec URLs, and braces
            (``shard-{000000..000123}.tar``) are expanded. The default identity of a file is its
            name before the first ``#``, or its path below the folder. Folders named ``train``,
            ``test`` or ``val`` are splits; by default a tenth of the identities is in ``test``, the
            others in ``train``.
        out: folder to create, a local path or any fsspec URL.
        size: side of the packed frames in pixels, a multiple of 32.
        copy: keep the streams as they are; those unfit for training are rejected.
        preset: how clips are encoded: ``default``, or ``random-access``: key frames only, which
            are read faster and take more bytes.
        max_frames: longer videos are cut into segments of equal length; 2 or more.
        layout: how clips are stored as pictures, and what names an identity.
        strict: fail if anything is rejected.
        on_progress: called after each video.

    Returns:
        What was packed and what was left out.

    Raises:
        UserError: an input does not exist or contains no video, the output folder is in use, no
            video is usable, or (with ``strict``) one is not.
    """
    check_size(size)
    recipe = _recipe(size, copy, preset, max_frames)
    return _run("shard", inputs, layout, out, recipe, None, strict, on_progress)


def append_videos(
    url: str,
    inputs: Sequence[str],
    *,
    copy: bool = False,
    preset: str = "default",
    max_frames: int = MAX_FRAMES,
    layout: Layout = PLAIN,
    strict: bool = False,
    on_progress: OnProgress | None = None,
) -> PackReport:
    """Add videos to a data set, at its frame size, in shards of their own.

    Nothing is visible until the new index replaces the old one atomically. Clips that are already
    in the data set, byte for byte, are not added again. An identity keeps its split; a tenth of all
    identities, including the old ones, is for tests. Only one process may append at a time.

    Args:
        url: the folder of the data set, a local path or any fsspec URL.
        inputs: as for :func:`pack_videos`.
        copy: as for :func:`pack_videos`.
        preset: as for :func:`pack_videos`, for the new clips.
        max_frames: as for :func:`pack_videos`.
        layout: as for :func:`pack_videos`.
        strict: fail if anything is rejected.
        on_progress: called after each video.

    Returns:
        What was added and what was left out.

    Raises:
        UserError: as for :func:`pack_videos`, or there is no data set.
    """
    base = read_index(url)
    sizes = base.frame_sizes()
    if len(sizes) > 1:
        raise UserError(f"{url}: its clips have several sizes; pack a new data set instead")
    [(size, _)] = sizes
    recipe = _recipe(size, copy, preset, max_frames)
    return _run("data append", inputs, layout, url, recipe, base, strict, on_progress)


def _recipe(size: int, copy: bool, preset: str, max_frames: int) -> Recipe:
    if preset not in PRESETS:
        raise UserError(f"preset {preset!r} is unknown: choose {' or '.join(PRESETS)}")
    if copy and preset != "default":
        raise UserError(f"--copy does not encode: omit it, or omit --preset {preset}")
    return Recipe(size, copy, max_frames, preset)


def _run(
    command: str,
    inputs: Sequence[str],
    layout: Layout,
    out: str,
    recipe: Recipe,
    base: ClipIndex | None,
    strict: bool,
    on_progress: OnProgress | None,
) -> PackReport:
    entries, unusable, notes = find_videos(inputs, layout)
    # The output folder is never an input.
    entries = [entry for entry in entries if not _is_below(entry.source, out)]
    unusable = [item for item in unusable if not _is_below(item.file, out)]
    job = {
        "command": command,
        "inputs": [absolute(given) for given in inputs],
        **recipe._asdict(),
        **layout._asdict(),
    }
    work = Workspace(out)
    with work.claimed(job, appending=base is not None):
        # Decode and encode every video, or reuse what an interrupted run has finished.
        outcomes, kept = _outcomes(entries, unusable, recipe, work, on_progress)
        # Name what was left out.
        rejected = (*unusable, *_rejections(entries, outcomes))
        write_rejected(out, rejected, {entry.shown for entry in entries} if base else None)
        if strict and rejected:
            raise UserError(refused(out, rejected))
        packed = _clips(entries, outcomes)
        if not packed:
            work.clear()
            raise UserError(nothing_usable(out, rejected))
        # Write the clips that are not in the data set yet, then the index.
        sums = [clip.segment.sha256 for clip in packed]
        known = base.known_checksums(sums) if base is not None else set()
        new = [clip for clip in packed if clip.segment.sha256 not in known]
        if new or base is None:
            index = _assemble(new, out, recipe, base, work)
        else:
            upgrade_index(out)
            index = base
        work.clear()
    return PackReport(
        index=index,
        clips=len(new),
        frames=sum(clip.segment.frames for clip in new),
        size_bytes=sum(clip.segment.size for clip in new),
        splits=_added(index, base),
        kept=kept,
        known=len(packed) - len(new),
        rejected=rejected,
        warnings=(
            *notes,
            *_warnings(entries, outcomes),
            *split_warnings([clip.entry for clip in new], base),
            *shared_identities(index, entries),
            *missing_splits(index),
        ),
    )


def _added(index: ClipIndex, base: ClipIndex | None) -> dict[str, int]:
    """Count the clips of each split that are new."""
    before = {name: len(base.clips_of(name)) for name in base.splits} if base is not None else {}
    counts = {name: len(index.clips_of(name)) - before.get(name, 0) for name in index.splits}
    return {name: count for name, count in counts.items() if count}


def _is_below(source: str, out: str) -> bool:
    """Return whether a file lies in the output folder."""
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
# Outcomes
# ---------------------------------------------------------------------------------------------


def _outcomes(
    entries: Sequence[Entry],
    rejected: Sequence[Rejected],
    recipe: Recipe,
    work: Workspace,
    on_progress: OnProgress | None,
) -> tuple[list[Outcome], int]:
    """Return the outcome of every entry, in order, and how many were finished already."""
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
    for position, part in make_parts(entries, missing, recipe, make=make_part_within):
        outcome, _ = read_part(part)
        if outcome.lasting:
            work.keep(names[position], part)
        settle(position, outcome)
    return [outcomes[position] for position in range(len(entries))], kept


def _part_name(entry: Entry, recipe: Recipe) -> str:
    """Name a part by everything it depends on; a file that has changed gives another name."""
    place = (entry.source, entry.size, entry.version, entry.span)
    facts = (PART_VERSION, *place, entry.box, entry.frames, entry.pictures, recipe)
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:32]


def _finished(work: Workspace, name: str) -> Outcome | None:
    part = work.kept(name)
    try:
        return None if part is None else read_part(part)[0]
    except ValueError:
        return None  # Damaged since: redo it.


# ---------------------------------------------------------------------------------------------
# The output folder
# ---------------------------------------------------------------------------------------------


def _assemble(
    packed: Sequence[PackedClip], out: str, recipe: Recipe, base: ClipIndex | None, work: Workspace
) -> ClipIndex:
    """Write the clips into shards, then the index."""
    keys = make_keys((clip.name for clip in packed), used=() if base is None else base.keys())
    old = {} if base is None else base.splits_of_identities()
    splits = assign_splits([clip.entry for clip in packed], old)
    # A long video has many clips in one part.
    clips_of_part = functools.lru_cache(maxsize=1)(lambda name: _finished_clips(work, name))
    with ShardWriter(out, base=base) as writer:
        for key, clip, split in zip(keys, packed, splits, strict=True):
            data = clips_of_part(_part_name(clip.entry, recipe))[clip.number]
            writer.add(_member(key, clip, data, recipe.size)._replace(split=split))
        if base is not None and read_index(out) != base:
            raise UserError(f"{out}: was changed by another process; run the same command again")
        return writer.finish(dict(zip(keys, splits, strict=True)))


def _finished_clips(work: Workspace, name: str) -> list[bytes]:
    try:
        return read_part(work.kept(name) or b"")[1]
    except ValueError as error:
        raise UserError(
            f"{work.out}: a finished part was damaged in the meantime ({error}); "
            "run the same command again"
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
