"""Looking at a data set: is it whole, what is in it, what does it look like."""

import base64
import html
import io
import json
import os
import posixpath
import tarfile
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from prioritycut_ray.data.loader import Decoding, load
from prioritycut_ray.data.shards import (
    INDEX_NAME,
    Clip,
    ClipIndex,
    ShardError,
    read_clip,
    read_index,
    unread_rest,
)
from prioritycut_ray.errors import UserError
from prioritycut_ray.packing.workspace import FOLDER_NAME, REJECTED_NAME
from prioritycut_ray.storage.filesystem import filesystem
from prioritycut_ray.video.decoding import frames_upright, read_frames
from prioritycut_ray.video.source import Frame, VideoError

FRAMES_SHOWN = 6
"""Frames of a clip in a contact sheet."""
SIDE_SHOWN = 96
"""Their side in pixels."""
SECONDS_PER_CLIP = 600
"""A decoder that takes longer over a whole clip hangs."""


class Verification(NamedTuple):
    """What :func:`verify` found.

    Attributes:
        clips: number of clips looked at.
        problems: what is wrong, one line each; none if the data set is whole.
        notes: what is odd but does no harm.
    """

    clips: int
    problems: list[str]
    notes: list[str]


class SplitFacts(NamedTuple):
    """One split in numbers."""

    clips: int
    identities: int
    frames: int
    seconds: float
    size_bytes: int


class Facts(NamedTuple):
    """A data set in numbers: see :func:`facts`."""

    fingerprint: str
    shards: int
    sizes: list[str]
    splits: dict[str, SplitFacts]
    shared_identities: list[str]


def verify(url: str, *, on_progress: Callable[[int, int], None] | None = None) -> Verification:
    """Read everything: index, shards, checksums, and every frame of every clip.

    Clips are decoded in processes of their own: a decoder that crashes or hangs is a problem of
    its clip.

    Args:
        url: the folder of a data set, a local path or any fsspec URL.
        on_progress: called with clips done and their number.

    Raises:
        UserError: if there is no index, or a damaged one.
    """
    index = read_index(url)
    problems = _shard_problems(url, index)
    shares = [[position] for position in range(len(index.clips))]
    look = partial(_clip_problem, url, index.clips)
    found = load(
        look,
        shares,
        os.cpu_count() or 1,
        lambda position: index.clips[position].key,
        SECONDS_PER_CLIP,
    )
    for done, problem in enumerate(found, start=1):
        problems += [problem] if problem else []
        if on_progress is not None:
            on_progress(done, len(index.clips))
    return Verification(len(index.clips), problems, _notes(url, index))


def facts(index: ClipIndex) -> Facts:
    """Sum up a data set from its index alone."""
    clips_of: dict[str, list[Clip]] = defaultdict(list)
    splits_of: dict[str, set[str]] = defaultdict(set)
    for clip in index.clips:
        clips_of[clip.split].append(clip)
        splits_of[clip.identity].add(clip.split)
    return Facts(
        fingerprint=index.fingerprint,
        shards=len({clip.shard for clip in index.clips}),
        sizes=sorted({f"{clip.width}x{clip.height}" for clip in index.clips}),
        splits={name: _split_facts(clips) for name, clips in sorted(clips_of.items())},
        shared_identities=sorted(name for name, splits in splits_of.items() if len(splits) > 1),
    )


def preview(url: str, out: Path, *, clips: int) -> int:
    """Show clips of a data set, spread evenly over it: a contact sheet, or a page that plays them.

    Args:
        url: the folder of a data set, a local path or any fsspec URL.
        out: the file to write; ``.png`` for a contact sheet, ``.html`` for one self-contained page.
        clips: how many to show at most.

    Returns:
        How many are shown.

    Raises:
        UserError: if there is no data set, a clip is damaged, or the file is of neither kind.
    """
    if out.suffix.lower() not in (".png", ".html"):
        raise UserError(f"{out}: is neither a .png nor a .html; choose one of them")
    index = read_index(url)
    count = min(clips, len(index.clips))
    chosen = [index.clips[position * len(index.clips) // count] for position in range(count)]
    if out.suffix.lower() == ".png":
        rows = [_filmstrip(read_clip(url, clip), clip) for clip in chosen]
        Image.fromarray(np.concatenate(rows)).save(out)
    else:
        out.write_text(_page(url, index, chosen), encoding="utf-8")
    return count


# ---------------------------------------------------------------------------------------------
# Is it whole
# ---------------------------------------------------------------------------------------------


def _clip_problem(
    url: str,
    clips: Sequence[Clip],
    positions: Sequence[int],
    avoid: Mapping[int, str],
    decoding: Decoding,
) -> str:
    """Look at one clip in a loader's process, which it may take down; empty if it is whole."""
    [position] = positions
    clip = clips[position]
    name = f"{clip.shard}: clip {clip.key!r}"
    if position in avoid:
        return f"{name}: {avoid[position]}"
    try:
        data = read_clip(url, clip)
    except ShardError as error:
        return str(error)
    try:
        with decoding(position):
            return _decoding_problem(data, clip, name)
    except VideoError as error:
        return f"{name}: {error.reason}"


def _decoding_problem(data: bytes, clip: Clip, name: str) -> str:
    shapes = Counter(frame.shape[:2] for frame in frames_upright(io.BytesIO(data)))
    read_frames(data, [0, clip.frames - 1], clip.width)  # By the reader that training uses.
    if dict(shapes) == {(clip.height, clip.width): clip.frames}:
        return ""
    there = ", ".join(f"{count} frames of {w}x{h}" for (h, w), count in shapes.items())
    return f"{name}: has {there}; the index says {clip.frames} of {clip.width}x{clip.height}"


def _shard_problems(url: str, index: ClipIndex) -> list[str]:
    """Compare the members of every shard with the index, as a stock tar reader sees them."""
    clips_of: dict[str, list[Clip]] = defaultdict(list)
    for clip in index.clips:
        clips_of[clip.shard].append(clip)
    return [
        f"{shard}: {problem}"
        for shard, clips in sorted(clips_of.items())
        for problem in _tar_problems(url, shard, clips)
    ]


def _tar_problems(url: str, shard: str, clips: Sequence[Clip]) -> Iterator[str]:
    fs, root = filesystem(url)
    expected = {f"{clip.key}.mp4": (clip.offset, clip.size) for clip in clips}
    found: dict[str, tuple[int, int]] = {}
    keys: set[str] = set()
    try:
        with fs.open(f"{root}/{shard}", "rb") as file, tarfile.open(fileobj=file, mode="r:") as tar:
            for member in tar:
                if member.name in found or member.name.removesuffix(".json") in keys:
                    yield f"member {member.name!r} comes twice"
                if member.name.endswith(".json"):
                    keys.add(member.name.removesuffix(".json"))
                    if not _is_json(tar, member):
                        yield f"member {member.name!r} is no JSON object"
                else:
                    found[member.name] = (member.offset_data, member.size)
            if rest := unread_rest(tar):
                yield rest
    except FileNotFoundError:
        yield "is missing; restore the file or pack it anew"
        return
    except (tarfile.TarError, OSError, EOFError) as error:
        yield f"is no whole tar ({error})"
        return
    for name in sorted(expected.keys() | found.keys()):
        if name not in found:
            yield f"has no member {name!r}, which the index lists"
        elif name not in expected:
            yield f"has a member {name!r}, which the index does not list"
        elif found[name] != expected[name]:
            yield f"member {name!r} is not where the index says"
        elif name.removesuffix(".mp4") not in keys:
            yield f"member {name!r} has no JSON beside it"


def _is_json(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bool:
    file = tar.extractfile(member)
    try:
        return isinstance(json.loads(file.read() if file else b""), dict)
    except ValueError:
        return False


def _notes(url: str, index: ClipIndex) -> list[str]:
    fs, root = filesystem(url)
    notes = [f"identity {name!r} is in several splits" for name in facts(index).shared_identities]
    known = {INDEX_NAME, REJECTED_NAME, *(clip.shard for clip in index.clips)}
    for name in sorted(posixpath.basename(path.rstrip("/")) for path in fs.ls(root, detail=False)):
        if name == FOLDER_NAME:
            notes.append(f"{name}: an unfinished `data append`; the data set is as it was before")
        elif name not in known:
            notes.append(f"{name}: is not part of the data set")
    return notes


# ---------------------------------------------------------------------------------------------
# What is in it, and what does it look like
# ---------------------------------------------------------------------------------------------


def _split_facts(clips: Sequence[Clip]) -> SplitFacts:
    return SplitFacts(
        clips=len(clips),
        identities=len({clip.identity for clip in clips}),
        frames=sum(clip.frames for clip in clips),
        seconds=sum(clip.frames / clip.fps for clip in clips),
        size_bytes=sum(clip.size for clip in clips),
    )


def _filmstrip(data: bytes, clip: Clip) -> Frame:
    """Lay frames of a clip side by side: ``uint8 [S, N S, 3]``."""
    spread = np.linspace(0, clip.frames - 1, FRAMES_SHOWN).round().astype(int)
    frames = read_frames(data, spread.tolist(), SIDE_SHOWN)
    return np.concatenate(list(frames), axis=1)


def _page(url: str, index: ClipIndex, clips: Sequence[Clip]) -> str:
    """Write one page that holds the videos, and needs nothing else."""
    figures = "\n".join(_figure(read_clip(url, clip), clip) for clip in clips)
    title = html.escape(url)
    return (
        f'<!doctype html>\n<html lang="en"><meta charset="utf-8"><title>{title}</title>\n'
        "<style>body{font:14px sans-serif;margin:2em}main{display:flex;flex-wrap:wrap;gap:1em}"
        "figure{margin:0;width:12em}video{width:100%}figcaption{overflow-wrap:anywhere}</style>\n"
        f"<h1>{title}</h1>\n<p>{len(clips)} of {len(index.clips)} clips, fingerprint "
        f"{index.fingerprint}</p>\n<main>\n{figures}\n</main></html>\n"
    )


def _figure(data: bytes, clip: Clip) -> str:
    source = base64.b64encode(data).decode()
    lines = (
        f"<b>{html.escape(clip.key)}</b>",
        f"{html.escape(clip.identity)}, {html.escape(clip.split)}",
        f"{clip.frames} frames at {clip.fps:.4g} fps, {clip.width}x{clip.height}",
    )
    return (
        f'<figure><video controls loop muted src="data:video/mp4;base64,{source}"></video>'
        f"<figcaption>{'<br>'.join(lines)}</figcaption></figure>"
    )
