"""Make training clips of one video: decode it once, cut it, scale it, encode it.

The result for a video is an :class:`Outcome`. A *part* is an outcome followed by its clips: a line
of JSON, then the mp4s one after the other. A packing run keeps the parts until it is finished.
"""

import hashlib
import io
import itertools
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import IO, NamedTuple

import pydantic
from pydantic import BaseModel, ConfigDict
from tenacity import (
    retry,
    retry_if_exception_type,
    retry_if_not_exception_type,
    stop_after_attempt,
    wait_exponential,
)

from prioritycut_ray.packing.entries import Entry, opened, printable
from prioritycut_ray.packing.manifest import FrameRange, TimeRange
from prioritycut_ray.packing.pictures import open_pictures
from prioritycut_ray.packing.scenes import (
    Frame,
    count_and_cuts,
    even_length,
    numbered_segments,
)
from prioritycut_ray.storage.paths import is_url
from prioritycut_ray.video.boxes import Box, Region, square_around
from prioritycut_ray.video.decoding import VideoInfo, frames_upright, probe
from prioritycut_ray.video.encoding import PRESETS, write_video
from prioritycut_ray.video.images import center_square, crop_beyond, resize
from prioritycut_ray.video.random_access import read_frames
from prioritycut_ray.video.remux import copy_stream
from prioritycut_ray.video.source import Source, VideoError

TOO_SHORT = "1 frame: no source/driving pair can be drawn; usable as a source image"
# Beyond this, reading one frame of a copied stream means decoding many.
LONG_GOP = 60
_CHUNK = 1 << 20


class Recipe(NamedTuple):
    """How clips are made.

    Attributes:
        size: side of the frames in pixels, a multiple of 32.
        copy: keep the streams that are fit for training as they are.
        max_frames: longer videos are cut into segments; 2 or more.
        preset: one of :data:`~prioritycut_ray.video.encoding.PRESETS`, unless copied.
    """

    size: int
    copy: bool
    max_frames: int
    preset: str = "default"


class Segment(BaseModel):
    """A clip made of a video, or of a part of one.

    Attributes:
        size: bytes of the mp4.
        sha256: of the mp4.
        frames: number of frames.
        first_frame: its first frame in the video, from 0.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    size: int
    sha256: str
    frames: int
    first_frame: int


class Outcome(BaseModel):
    """The result for one video.

    Attributes:
        rejected: why it cannot be used; empty if it can.
        lasting: whether another try would give the same result.
        fps: frames per second.
        variable_rate: whether ``fps`` is only an average.
        warnings: one line each.
        segments: the clips, in order.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    rejected: str = ""
    lasting: bool = True
    fps: float = 0.0
    variable_rate: bool = False
    warnings: tuple[str, ...] = ()
    segments: tuple[Segment, ...] = ()


def write_part(outcome: Outcome, clips: Sequence[bytes] = ()) -> bytes:
    """Join an outcome and its clips."""
    return b"".join([outcome.model_dump_json().encode(), b"\n", *clips])


def read_part(part: bytes) -> tuple[Outcome, list[bytes]]:
    """Split a part into its outcome and its clips, and verify them.

    Raises:
        ValueError: it is damaged.
    """
    head, _, payload = part.partition(b"\n")
    try:
        outcome = Outcome.model_validate_json(head)
    except pydantic.ValidationError:
        raise ValueError("its head is damaged") from None
    ends = [*itertools.accumulate((segment.size for segment in outcome.segments), initial=0)]
    clips = [payload[begin:end] for begin, end in itertools.pairwise(ends)]
    sums = [hashlib.sha256(clip).hexdigest() for clip in clips]
    if len(payload) != ends[-1] or sums != [segment.sha256 for segment in outcome.segments]:
        raise ValueError("its clips are damaged")
    return outcome, clips


def make_part(entry: Entry, recipe: Recipe) -> bytes:
    """Make training clips of one video.

    Raises:
        VideoError: it cannot be used; another try would not help.
    """
    if entry.pictures is not None:
        if recipe.copy:
            raise VideoError(entry.shown, "cannot be copied: it is stored as pictures")
        start = _part_of(entry, entry.pictures.fps).start
        film = open_pictures(entry, entry.pictures, start)
        return _encoded(film.frames, film.info, entry, recipe)
    with _at_hand(entry) as source:
        info = probe(source)
        if not recipe.copy:
            start = _part_of(entry, info.fps).start
            return _encoded(frames_upright(source, start), info, entry, recipe)
        if entry.box is not None or entry.frames is not None:
            part = "box" if entry.box else "range of frames"
            raise VideoError(entry.shown, f"cannot be copied: the manifest selects a {part}")
        return _copied(source, info, recipe)


# ---------------------------------------------------------------------------------------------
# Bytes
# ---------------------------------------------------------------------------------------------


@contextmanager
def _at_hand(entry: Entry) -> Iterator[Source]:
    """Provide a video as a local file; a remote one, or a member of a tar, is copied first."""
    try:
        if is_url(entry.source) or entry.span is not None:
            with tempfile.TemporaryFile() as copy:
                _fetch(entry, copy)
                yield copy
        elif printable(entry.source) == entry.source:
            yield entry.source
        else:  # The decoder takes only Unicode names.
            with open(entry.source, "rb") as file:
                yield file
    except (FileNotFoundError, PermissionError, IsADirectoryError) as error:
        raise VideoError(entry.shown, error.strerror or "No such file or directory") from None


@retry(
    retry=retry_if_exception_type(OSError)
    & retry_if_not_exception_type((FileNotFoundError, PermissionError, VideoError)),
    stop=stop_after_attempt(4),
    wait=wait_exponential(multiplier=0.5, max=8),
    reraise=True,
)
def _fetch(entry: Entry, target: IO[bytes]) -> None:
    target.seek(0)
    target.truncate()
    with opened(entry) as source:
        if entry.span is None:
            shutil.copyfileobj(source, target, _CHUNK)
        else:
            _copy_bytes(source, target, entry)
    target.seek(0)


def _copy_bytes(source: IO[bytes], target: IO[bytes], entry: Entry) -> None:
    missing = entry.size
    while missing and (chunk := source.read(min(missing, _CHUNK))):
        missing -= target.write(chunk)
    if missing:
        raise VideoError(entry.shown, f"is cut off after {entry.size - missing} bytes")


# ---------------------------------------------------------------------------------------------
# Frames
# ---------------------------------------------------------------------------------------------


def _part_of(entry: Entry, fps: float) -> FrameRange:
    """Return the frames to use of a video of this rate."""
    if isinstance(entry.frames, TimeRange):
        return entry.frames.frames(fps)
    return entry.frames or FrameRange(0, None)


def _encoded(shown: Iterator[Frame], info: VideoInfo, entry: Entry, recipe: Recipe) -> bytes:
    """Make clips of the frames of a video, from the first one that is wanted."""
    start, end = _part_of(entry, info.fps)
    longest = even_length((end or max(info.packets, start)) - start, recipe.max_frames)
    segments: list[Segment] = []
    clips: list[bytes] = []
    frames = left_out = 0
    squares = _squares(_wanted(shown, entry, info), entry.box, recipe.size)
    for _, group in itertools.groupby(numbered_segments(squares, longest), lambda item: item[0]):
        # Frames are encoded one by one: a whole video would not fit into memory.
        encoded = io.BytesIO()
        preset = PRESETS[recipe.preset]
        length = write_video(encoded, (frame for _, frame in group), info.fps, **preset._asdict())
        if length >= 2:
            clips.append(encoded.getvalue())
            segments.append(_segment(clips[-1], length, start + frames))
        left_out += length < 2
        frames += length
    if not segments:
        scattered = f"{frames} frames, but no two adjacent ones between hard cuts"
        raise VideoError(entry.shown, TOO_SHORT if frames == 1 else scattered)
    notes = _rate_notes(info, frames)
    if end is not None and frames < end - start:
        notes.append(f"ends {end - start - frames} frames before the end of its segment")
    if left_out:
        notes.append(f"{left_out} of its {frames} frames stand alone between cuts and are left out")
    return write_part(_outcome(info, segments, notes), clips)


def _wanted(shown: Iterator[Frame], entry: Entry, info: VideoInfo) -> Iterator[Frame]:
    """End a video where its part ends.

    Raises:
        VideoError: the part is not in the video. One that is given by time may end later than the
            video: another copy of it may be a little longer.
    """
    start, end = _part_of(entry, info.fps)
    number = start
    for number, frame in enumerate(shown, start=start + 1):
        yield frame
        if number == end:
            return
    if number > start and (end is None or isinstance(entry.frames, TimeRange)):
        return
    part = f"start {start} and end {'(empty)' if end is None else end}"
    count = number if number > start else info.packets
    raise VideoError("video", f"{part} are outside its {count} frames")


def _squares(shown: Iterator[Frame], box: Box | Region | None, size: int) -> Iterator[Frame]:
    return (resize(center_square(_boxed(frame, box)), size) for frame in shown)


def _boxed(frame: Frame, box: Box | Region | None) -> Frame:
    if box is None:
        return frame
    height, width = frame.shape[:2]
    if isinstance(box, Region):
        try:
            return crop_beyond(frame, square_around(box, width, height))
        except ValueError as error:
            raise VideoError("video", str(error)) from None
    if box.right > width or box.bottom > height:
        place = ",".join(map(str, box))
        raise VideoError("video", f"its box {place} is not inside its frames of {width}x{height}")
    return frame[box.top : box.bottom, box.left : box.right]


def _copied(source: Source, info: VideoInfo, recipe: Recipe) -> bytes:
    shown, cuts = count_and_cuts(_squares(frames_upright(source), None, recipe.size))
    if shown < 2:
        raise VideoError("video", TOO_SHORT)
    copied = copy_stream(source, recipe.size)
    if shown != copied.frames:
        hidden = f"{copied.frames - shown} of its {copied.frames} frames are hidden"
        raise VideoError("video", f"cannot be copied: {hidden} by an edit list")
    read_frames(copied.data, [0, shown - 1], recipe.size)  # With the decoder that training uses.
    notes = _rate_notes(info, shown)
    if cuts:
        notes.append(f"has a hard cut at frame {cuts[0]}; with --copy it is not split there")
    if copied.key_distance > LONG_GOP:
        notes.append(
            f"has up to {copied.key_distance} frames from one key frame to the next, "
            "which makes single frames slow to read; omit --copy to encode it again"
        )
    segment = _segment(copied.data, shown, 0)
    return write_part(_outcome(info, [segment], notes), [copied.data])


def _segment(data: bytes, frames: int, first_frame: int) -> Segment:
    digest = hashlib.sha256(data).hexdigest()
    return Segment(size=len(data), sha256=digest, frames=frames, first_frame=first_frame)


def _outcome(info: VideoInfo, segments: Sequence[Segment], notes: Sequence[str]) -> Outcome:
    return Outcome(
        fps=info.fps,
        variable_rate=info.variable_rate,
        warnings=tuple(notes),
        segments=tuple(segments),
    )


def _rate_notes(info: VideoInfo, frames: int) -> list[str]:
    if not info.variable_rate:
        return []
    return [
        f"has a variable frame rate; all {frames} frames are kept, "
        f"and {info.fps:.2f} fps is only their average"
    ]
