"""Encode frames and sound as an mp4 file."""

import io
from collections.abc import Iterable, Sequence
from fractions import Fraction
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import av
import numpy as np
from av.audio import AudioStream
from av.container import OutputContainer
from av.video.reformatter import (
    ColorPrimaries,
    ColorRange,
    Colorspace,
    ColorTrc,
    VideoReformatter,
)

from prioritycut_ray.errors import UserError
from prioritycut_ray.storage.atomic import write_atomically
from prioritycut_ray.video.sound import SOUND_RATE, Sound, sound_in_step
from prioritycut_ray.video.source import Frame, Source

TICK = Fraction(1, 90_000)
"""Unit of the times in a file, in seconds."""
AAC_SAMPLES = 1024
"""Samples in an AAC frame."""
# The muxer keeps packets until those of the other streams arrive, however late that is.
_MP4_OPTIONS = {"movflags": "+faststart", "max_interleave_delta": "0"}


class Preset(NamedTuple):
    """How clips are encoded; see :func:`write_video`."""

    gop: int
    crf: int


PRESETS = {
    "default": Preset(gop=8, crf=18),
    # A key frame takes more bits for the same quality than one that is predicted.
    "random-access": Preset(gop=1, crf=14),
}
"""For small data sets, or for fast reading; both look alike (``benchmarks/data.py presets``)."""


class Timing(NamedTuple):
    """When the frames of a video are shown.

    Attributes:
        starts: time of each frame in seconds since the first, ascending.
        end: time at which the last frame ends.
    """

    starts: Sequence[float]
    end: float


def write_video(
    target: Source,
    frames: Iterable[Frame],
    fps: float,
    *,
    gop: int = PRESETS["default"].gop,
    crf: int = PRESETS["default"].crf,
    timing: Timing | None = None,
    sound: Sound | None = None,
) -> int:
    """Encode frames as H.264 in an mp4 with its index first.

    Only the encoded bytes are held in memory, so the frames may come from a generator. The same
    frames give the same bytes. A file appears under its name only when it is complete.

    Args:
        target: a file path, or a binary file open for writing.
        frames: RGB frames ``uint8 [H, W, 3]``, all of one even size.
        fps: frames per second, more than 0; rounded to a fraction with denominator 1001 or less.
        gop: distance between key frames: the most that a reader must decode to reach a frame.
        crf: 0 (lossless except for colour) to 51; 18 is hard to tell from the original.
        timing: of exactly these frames, in units of 1/90000 s; by default evenly at ``fps``.
        sound: encoded as AAC; it ends where it is damaged.

    Returns:
        The number of frames.

    Raises:
        UserError: a side is odd, sizes differ, there are no frames, or the rate is not positive.
    """
    if not 0 < fps < float("inf"):
        raise UserError(f"cannot write a video at {fps} fps: choose a rate above 0")
    encoded = io.BytesIO()
    rate = max(Fraction(fps).limit_denominator(1001), Fraction(1, 1001))
    count = _encode(encoded, frames, rate, gop, crf, timing, sound)
    if isinstance(target, str | Path):
        write_atomically(Path(target), encoded.getbuffer())
    else:
        target.write(encoded.getbuffer())
    return count


def open_mp4(target: io.BytesIO) -> OutputContainer:
    """Open an mp4 for writing, with its index first."""
    # To move the index to the front, the muxer opens its own output again for reading.
    reopen = lambda url, flags, options: io.BytesIO(target.getvalue())  # noqa: E731
    return av.open(target, "w", format="mp4", options=_MP4_OPTIONS, io_open=reopen)


def _encode(
    target: io.BytesIO,
    frames: Iterable[Frame],
    rate: Fraction,
    gop: int,
    crf: int,
    timing: Timing | None,
    sound: Sound | None,
) -> int:
    """Encode into memory, see :func:`write_video`."""
    with open_mp4(target) as container:
        # Otherwise x264 is not reproducible: its fastest code rounds differently depending on the
        # processor and even on the addresses of its buffers. The number of cores matters too.
        quality = {"crf": str(crf), "x264-params": "cpu-independent=1"}
        # Halves decoding time for a quarter more bytes: no deblocking, CABAC or B-frames.
        quick = {"tune": "fastdecode", "bf": "0"}
        stream = container.add_stream("libx264", rate=rate, options=quality | quick)
        codec = stream.codec_context
        codec.pix_fmt, codec.gop_size, codec.thread_count = "yuv420p", gop, 1
        codec.colorspace, codec.color_range = Colorspace.ITU709, ColorRange.MPEG
        codec.color_primaries, codec.color_trc = ColorPrimaries.BT709, ColorTrc.BT709
        if timing is not None:
            codec.time_base = TICK
        track = None if sound is None else container.add_stream("aac", SOUND_RATE, layout="stereo")
        reformatter = VideoReformatter()
        shape, count = None, 0
        for image in frames:
            if shape is None:
                shape = image.shape
                _check_even(shape)
                codec.height, codec.width = shape[:2]
                if sound is not None and track is not None:
                    _mux_sound(container, track, sound)
            if image.shape != shape:
                raise UserError(f"cannot write a video: frames of {shape} and of {image.shape}")
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")
            planes = reformatter.reformat(
                frame,
                format="yuv420p",
                dst_colorspace=Colorspace.ITU709,
                dst_color_range=ColorRange.MPEG,
                threads=1,  # By default, each frame would start threads of its own.
            )
            if timing is not None:
                planes.time_base, planes.pts = TICK, _ticks(timing, count)
            _mux_timed(container, stream.encode(planes), timing)
            count += 1
        if shape is None:
            raise UserError("cannot write a video: there are no frames")
        _mux_timed(container, stream.encode(), timing)
    return count


def _mux_timed(container: OutputContainer, packets: list[Any], timing: Timing | None) -> None:
    """Mux packets; the encoder assumes that the last frame lasts as long as the average one."""
    for packet in packets:
        if timing is not None and packet.pts == _ticks(timing, len(timing.starts) - 1):
            packet.duration = _ticks(timing, len(timing.starts)) - packet.pts
        container.mux(packet)


def _ticks(timing: Timing, frame: int) -> int:
    """Return when a frame starts, or, past the last frame, when that ends."""
    seconds = timing.starts[frame] if frame < len(timing.starts) else timing.end
    return round(seconds / TICK)


def _mux_sound(container: OutputContainer, track: AudioStream, sound: Sound) -> None:
    """Encode a sound for the duration of the pictures; the muxer interleaves it."""
    waiting, written = np.zeros((2, 0), np.float32), 0
    for piece in chain(sound_in_step(sound), [None]):
        if piece is not None:
            waiting = np.concatenate([waiting, piece], axis=1)
        while waiting.shape[1] >= (1 if piece is None else AAC_SAMPLES):
            now, waiting = waiting[:, :AAC_SAMPLES], waiting[:, AAC_SAMPLES:]
            frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(now), "fltp", "stereo")
            frame.sample_rate, frame.time_base = SOUND_RATE, Fraction(1, SOUND_RATE)
            frame.pts, written = written, written + now.shape[1]
            container.mux(track.encode(frame))
    container.mux(track.encode())


def _check_even(shape: tuple[int, ...]) -> None:
    if shape[0] % 2 or shape[1] % 2:
        raise UserError(f"cannot write a video of {shape[1]}x{shape[0]}: H.264 requires even sides")
