"""Inspect a data set: is it intact, what does it contain, what does it look like."""

import base64
import html
import io
import itertools
import json
import os
import posixpath
import random
import tarfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from prioritycut_ray.data.index import INDEX_NAME, ClipIndex, Clips, read_index
from prioritycut_ray.data.loader import Decoding, load
from prioritycut_ray.data.old_index import OLD_INDEX_NAME
from prioritycut_ray.data.shards import (
    Clip,
    ShardError,
    is_elsewhere,
    locate_shard,
    read_clip,
    unread_rest,
)
from prioritycut_ray.errors import UserError
from prioritycut_ray.packing.entries import printable
from prioritycut_ray.packing.workspace import FOLDER_NAME, REJECTED_NAME
from prioritycut_ray.storage.filesystem import filesystem
from prioritycut_ray.video.decoding import frames_upright
from prioritycut_ray.video.random_access import read_frames
from prioritycut_ray.video.source import Frame, VideoError

FRAMES_SHOWN = 6
"""Frames of a clip in a contact sheet."""
SIDE_SHOWN = 96
"""Their side in pixels."""
PATIENCE_S = 600
"""A decoder that takes longer over a whole clip hangs."""

_ROWS = 1 << 20

Decode = Callable[[io.BytesIO], Iterator[Frame]]


class Verification(NamedTuple):
    """The result of :func:`verify`.

    Attributes:
        clips: number of clips checked.
        total: number of clips in the data set.
        problems: one line each; none if the data set is intact.
        notes: oddities that do no harm, one line each.
    """

    clips: int
    total: int
    problems: list[str]
    notes: list[str]


class SplitSummary(NamedTuple):
    """One split in numbers."""

    clips: int
    identities: int
    frames: int
    seconds: float
    size_bytes: int


class DataSummary(NamedTuple):
    """A data set in numbers."""

    fingerprint: str
    shards: int
    sizes: list[str]
    splits: dict[str, SplitSummary]
    shared_identities: list[str]


def verify(
    url: str,
    *,
    sample: int | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> Verification:
    """Read everything: index, shards, checksums, and every frame of every clip; or a sample of it.

    Clips are decoded in processes of their own: a decoder that crashes or hangs is a problem of
    its clip only.

    Args:
        url: the folder of a data set, a local path or any fsspec URL.
        sample: the number of clips to check, drawn at random, always the same ones. Shards are then
            read where those clips are, and not from end to end.
        on_progress: called with the number of clips done and the total.

    Raises:
        UserError: the index is missing or damaged.
    """
    index = read_index(url, again=True)
    chosen: Sequence[int] = range(len(index))
    if sample is not None:
        chosen = sorted(random.Random(index.fingerprint).sample(chosen, min(sample, len(index))))
    problems = _shard_problems(url, index) if sample is None else []
    for done, problem in enumerate(clip_problems(url, index, chosen), start=1):
        problems += [problem] if problem else []
        if on_progress is not None:
            on_progress(done, len(chosen))
    return Verification(len(chosen), len(index), problems, _notes(url, index))


def clip_problems(
    url: str,
    index: ClipIndex,
    chosen: Sequence[int] | None = None,
    *,
    decode: Decode = frames_upright,
    patience_s: int = PATIENCE_S,
) -> Iterator[str]:
    """Read and decode clips, in processes that a clip may kill.

    Args:
        url: the folder of a data set, a local path or any fsspec URL.
        index: its index.
        chosen: positions of the clips in the index; all by default.
        decode: decodes all frames of an mp4.
        patience_s: seconds that decoding one clip may take.

    Yields:
        One line for each clip, in their order; empty if the clip is intact.
    """
    return load(
        partial(_clip_problem, url, index.clips, decode),
        _OneByOne(range(len(index)) if chosen is None else chosen),
        os.cpu_count() or 1,
        lambda position: index.clips[position].key,
        patience_s,
    )


def summarise(index: ClipIndex) -> DataSummary:
    """Summarise a data set from its index alone."""
    return DataSummary(
        fingerprint=index.fingerprint,
        shards=len(index.shards),
        sizes=sorted(f"{width}x{height}" for width, height in index.frame_sizes()),
        splits={name: _summarise_split(index.clips_of(name)) for name in index.splits},
        shared_identities=index.shared_identities(),
    )


def preview(url: str, out: Path, *, clips: int) -> int:
    """Show clips spread evenly over a data set: as a contact sheet, or as a page that plays them.

    Args:
        url: the folder of a data set, a local path or any fsspec URL.
        out: the file to write; ``.png`` for a contact sheet, ``.html`` for one self-contained page.
        clips: the maximum number of clips.

    Returns:
        The number of clips shown.

    Raises:
        UserError: there is no data set, a clip is damaged, or the file has another extension.
    """
    if out.suffix.lower() not in (".png", ".html"):
        raise UserError(f"{out}: is neither a .png nor a .html file; choose one of them")
    index = read_index(url)
    count = min(clips, len(index))
    chosen = [index.clips[position * len(index) // count] for position in range(count)]
    if out.suffix.lower() == ".png":
        rows = [_filmstrip(read_clip(url, clip), clip) for clip in chosen]
        Image.fromarray(np.concatenate(rows)).save(out)
    else:
        out.write_text(_page(url, index, chosen), encoding="utf-8")
    return count


# ---------------------------------------------------------------------------------------------
# Is it intact
# ---------------------------------------------------------------------------------------------


class _OneByOne(Sequence[Sequence[int]]):
    """Positions, one for each task."""

    def __init__(self, positions: Sequence[int]) -> None:
        self._positions = positions

    def __getitem__(self, place: int) -> list[int]:  # type: ignore[override]
        return [self._positions[place]]

    def __len__(self) -> int:
        return len(self._positions)


def _clip_problem(
    url: str,
    clips: Sequence[Clip],
    decode: Decode,
    positions: Sequence[int],
    avoid: Mapping[int, str],
    decoding: Decoding,
) -> str:
    """Check one clip in a loader worker, which it may take down; empty if the clip is intact."""
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
            return _decoding_problem(data, clip, name, decode)
    except VideoError as error:
        return f"{name}: {error.reason}"


def _decoding_problem(data: bytes, clip: Clip, name: str, decode: Decode) -> str:
    shapes = Counter(frame.shape[:2] for frame in decode(io.BytesIO(data)))
    read_frames(data, [0, clip.frames - 1], clip.width)  # With the decoder that training uses.
    if dict(shapes) == {(clip.height, clip.width): clip.frames}:
        return ""
    found = ", ".join(f"{count} frames of {w}x{h}" for (h, w), count in shapes.items())
    return f"{name}: has {found}; the index says {clip.frames} of {clip.width}x{clip.height}"


def _shard_problems(url: str, index: ClipIndex) -> list[str]:
    """Compare the members of every shard with the index, as a stock tar reader sees them."""
    codes = index.values("shard")
    rows = np.argsort(codes, kind="stable")
    places = np.searchsorted(codes, np.arange(len(index.shards) + 1), sorter=rows)
    return [
        f"{shard}: {problem}"
        for shard, (begin, end) in zip(index.shards, itertools.pairwise(places), strict=True)
        for problem in _tar_problems(
            url, shard, [index.clips[row] for row in rows[begin:end].tolist()]
        )
    ]


def _tar_problems(url: str, shard: str, clips: Sequence[Clip]) -> Iterator[str]:
    fs, path = locate_shard(url, shard)
    expected = {_member(clip): (clip.offset, clip.size) for clip in clips}
    is_own = not is_elsewhere(shard)
    found: dict[str, tuple[int, int]] = {}
    keys: set[str] = set()
    try:
        with fs.open(path, "rb") as file, tarfile.open(fileobj=file, mode="r:") as tar:
            for member in tar:
                if is_own and (member.name in found or member.name.removesuffix(".json") in keys):
                    yield f"member {member.name!r} occurs twice"
                if is_own and member.name.endswith(".json"):
                    keys.add(member.name.removesuffix(".json"))
                    if not _is_json(tar, member):
                        yield f"member {member.name!r} is not a JSON object"
                else:
                    found.setdefault(printable(member.name), (member.offset_data, member.size))
            if rest := unread_rest(tar):
                yield rest
    except FileNotFoundError:
        yield "is missing; restore the file or pack it again"
        return
    except (tarfile.TarError, OSError, EOFError) as error:
        yield f"is not an intact tar archive ({error})"
        return
    # Shards of others may hold members that are not clips.
    for name in sorted(expected.keys() | (found.keys() if is_own else set())):
        if name not in found:
            yield f"has no member {name!r}, which the index lists"
        elif name not in expected:
            yield f"has a member {name!r}, which the index does not list"
        elif found[name] != expected[name]:
            yield f"member {name!r} is not where the index says"
        elif is_own and name.removesuffix(".mp4") not in keys:
            yield f"member {name!r} has no JSON beside it"


def _member(clip: Clip) -> str:
    """Return the name of a clip's video in its shard."""
    facts = json.loads(clip.extra) if clip.extra else {}
    return str(facts.get("member", f"{clip.key}.mp4"))


def _is_json(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bool:
    file = tar.extractfile(member)
    try:
        return isinstance(json.loads(file.read() if file else b""), dict)
    except ValueError:
        return False


def _notes(url: str, index: ClipIndex) -> list[str]:
    fs, root = filesystem(url)
    notes = [f"identity {name!r} is in several splits" for name in index.shared_identities()]
    known = {INDEX_NAME, OLD_INDEX_NAME, REJECTED_NAME, *index.shards}
    for name in sorted(posixpath.basename(path.rstrip("/")) for path in fs.ls(root, detail=False)):
        if name == FOLDER_NAME:
            notes.append(f"{name}: an unfinished `data append`; the data set is as it was before")
        elif name not in known:
            notes.append(f"{name}: is not part of the data set")
    return notes


# ---------------------------------------------------------------------------------------------
# What does it contain, and what does it look like
# ---------------------------------------------------------------------------------------------


def _summarise_split(clips: Clips) -> SplitSummary:
    # In parts, so that no whole column is copied.
    parts = [clips[first : first + _ROWS] for first in range(0, len(clips), _ROWS)]
    return SplitSummary(
        clips=len(clips),
        identities=len(clips.identity_codes()),
        frames=int(clips.values("frames").sum(dtype=np.int64)),
        seconds=float(sum((part.values("frames") / part.values("fps")).sum() for part in parts)),
        size_bytes=int(clips.values("size").sum()),
    )


def _filmstrip(data: bytes, clip: Clip) -> Frame:
    """Lay frames of a clip side by side: ``uint8 [S, N S, 3]``."""
    spread = np.linspace(0, clip.frames - 1, FRAMES_SHOWN).round().astype(int)
    frames = read_frames(data, spread.tolist(), SIDE_SHOWN)
    return np.concatenate(list(frames), axis=1)


def _page(url: str, index: ClipIndex, clips: Sequence[Clip]) -> str:
    """Make one self-contained page that embeds the videos."""
    figures = "\n".join(_figure(read_clip(url, clip), clip) for clip in clips)
    title = html.escape(url)
    return (
        f'<!doctype html>\n<html lang="en"><meta charset="utf-8"><title>{title}</title>\n'
        "<style>body{font:14px sans-serif;margin:2em}main{display:flex;flex-wrap:wrap;gap:1em}"
        "figure{margin:0;width:12em}video{width:100%}figcaption{overflow-wrap:anywhere}</style>\n"
        f"<h1>{title}</h1>\n<p>{len(clips)} of {len(index)} clips, fingerprint "
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
