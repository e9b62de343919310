"""Copy a video stream into an mp4 of its own without encoding it again."""

import io
from fractions import Fraction
from typing import Any, NamedTuple

import av
import numpy as np
from av.container import InputContainer
from av.video import VideoStream

from prioritycut_ray.errors import reason_of
from prioritycut_ray.video.decoding import guessed_colours, open_video
from prioritycut_ray.video.encoding import open_mp4
from prioritycut_ray.video.images import is_picture_file
from prioritycut_ray.video.source import Source, VideoError, name_of


class Copied(NamedTuple):
    """A video stream in an mp4 of its own.

    Attributes:
        data: the whole mp4, with its index first.
        frames: number of frames.
        key_distance: maximum number of frames from one key frame to the next.
    """

    data: bytes
    frames: int
    key_distance: int


class StreamFacts(NamedTuple):
    """A video stream that training can read as it is.

    Attributes:
        side: width and height in pixels.
        key_distance: maximum number of frames from one key frame to the next.
    """

    side: int
    key_distance: int


def check_stream(source: Source) -> StreamFacts:
    """Check that training can read a video stream as it is; only its first frame is decoded.

    Args:
        source: a file path, or a seekable binary file.

    Raises:
        VideoError: it is not H.264, yuv420p, square pixels, upright, and as wide as high.
    """
    if is_picture_file(source):
        raise VideoError(name_of(source), "cannot be read where it lies: it is a picture, not h264")
    with open_video(source) as (container, stream):
        try:
            if reason := _why_not_copied(container, stream, stream.width):
                raise VideoError(name_of(source), f"cannot be read where it lies: it {reason}")
            container.seek(0)
            sizes = (packet.is_keyframe for packet in container.demux(stream) if packet.size)
            keys = [number for number, is_key in enumerate([*sizes, True]) if is_key]
        except (av.FFmpegError, StopIteration) as error:
            reason = f"cannot be read where it lies: {reason_of(error)}"
            raise VideoError(name_of(source), reason) from None
    return StreamFacts(stream.width, int(np.diff(keys).max(initial=0)))


def copy_stream(source: Source, size: int) -> Copied:
    """Copy a video stream into an mp4 of its own, without encoding it again.

    Args:
        source: a file path, or a seekable binary file; it must decode completely.
        size: side of the frames in pixels.

    Raises:
        VideoError: it is not what training reads: H.264, yuv420p, square pixels, upright,
            ``size`` by ``size``.
    """
    if is_picture_file(source):
        raise VideoError(name_of(source), "cannot be copied: it is a picture, not h264")
    with open_video(source) as (container, stream):
        try:
            if reason := _why_not_copied(container, stream, size):
                raise VideoError(name_of(source), f"cannot be copied: it {reason}")
            container.seek(0)
            return _copied(container, stream)
        except av.FFmpegError as error:
            raise VideoError(name_of(source), f"cannot be copied: {reason_of(error)}") from None


def _copied(container: InputContainer, stream: VideoStream) -> Copied:
    encoded = io.BytesIO()
    keys: list[int] = []
    frames = 0
    with open_mp4(encoded) as target:
        copy = target.add_stream_from_template(stream)
        for packet in container.demux(stream):
            if packet.size == 0:
                continue
            if packet.is_keyframe:
                keys.append(frames)
            frames += 1
            packet.stream = copy
            target.mux(packet)
    return Copied(encoded.getvalue(), frames, int(np.diff([*keys, frames]).max(initial=0)))


def _why_not_copied(container: InputContainer, stream: VideoStream, size: int) -> str:
    """Say why training cannot use a stream as it is; empty if it can."""
    found = f"{stream.width}x{stream.height}"
    if stream.codec_context.name != "h264":
        return f"is {stream.codec_context.name}, not h264"
    if stream.codec_context.pix_fmt not in ("yuv420p", "yuvj420p"):
        return f"is {stream.codec_context.pix_fmt}, not yuv420p"
    if (stream.width, stream.height) != (size, size):
        return f"is {found}, not {size}x{size}"
    if Fraction(stream.sample_aspect_ratio or 1) != 1:
        return f"has pixels of {stream.sample_aspect_ratio}, not square ones"
    first: Any = next(container.decode(stream))
    if guessed_colours(first) is not None:
        return "does not name its colour space (BT.601 or BT.709)"
    turned = first.side_data.get("DISPLAYMATRIX") is not None
    return "is stored rotated or mirrored" if turned else ""
