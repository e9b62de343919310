"""Random access to the frames of packed clips: decord, PyAV or torchcodec behind one function.

Packed clips are small, upright and square, with a short GOP. :func:`read_frames` finds single
frames exactly. At the size of the clip, all libraries give bit-identical frames; at other sizes,
decord and PyAV do.
"""

import io
import itertools
import re
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
from importlib.metadata import version
from types import ModuleType
from typing import Any, NamedTuple

import av
import av.filter
import numpy as np
from av.container import InputContainer
from av.video import VideoStream
from av.video.reformatter import VideoReformatter

from prioritycut_ray.config import DEFAULT_DECODER
from prioritycut_ray.errors import UserError, reason_of
from prioritycut_ray.video.decoding import open_video
from prioritycut_ray.video.encoding import write_video
from prioritycut_ray.video.source import Frame, VideoError

SIZE_STEP = 32
_DAMAGED = "cannot be decoded: the data is damaged"


def read_frames(
    data: bytes, indices: Sequence[int], size: int, decoder: str = DEFAULT_DECODER
) -> Frame:
    """Decode chosen frames of a packed clip, exactly.

    Args:
        data: the whole mp4.
        indices: frame numbers from 0, in any order, possibly repeated.
        size: side of the frames in pixels, a multiple of 32; a clip of another size is resized.
        decoder: one of :data:`DECODERS`.

    Returns:
        RGB frames ``uint8 [N, size, size, 3]``.

    Raises:
        VideoError: the clip cannot be decoded, or a frame does not exist.
        UserError: the size is not a multiple of 32.
    """
    check_size(size)
    return DECODERS[decoder](data, indices, size)


def check_size(size: int) -> None:
    """Check that clips can be decoded at a frame size.

    decord 0.6 fails at some small sizes (16, 24, 48, 72, ...), but never at a multiple of 32.

    Raises:
        UserError: the size is not a multiple of 32.
    """
    if size < SIZE_STEP or size % SIZE_STEP:
        raise UserError(f"a frame size of {size} cannot be used: choose a multiple of {SIZE_STEP}")


def check_decoder(decoder: str) -> None:
    """Check that this machine can load a decoder.

    Args:
        decoder: one of :data:`DECODERS`.

    Raises:
        UserError: names the reason and the way out.
    """
    if decoder == "decord":
        _load_decord()
    elif decoder == "torchcodec":
        _load_torchcodec()


def decoder_version() -> str:
    """Return the name and version of the default decoder."""
    packages = {"decord": "decord", "pyav": "av"}
    return f"{DEFAULT_DECODER} {version(packages[DEFAULT_DECODER])}"


def read_all(data: bytes, size: int, decoder: str = DEFAULT_DECODER) -> Frame:
    """Decode all frames of a packed clip.

    Args:
        data: the whole mp4.
        size: side of the frames in pixels, a multiple of 32; a clip of another size is resized.
        decoder: one of :data:`DECODERS`.

    Returns:
        RGB frames ``uint8 [T, size, size, 3]``.

    Raises:
        VideoError: the clip cannot be decoded.
        UserError: the size is not a multiple of 32.
    """
    check_size(size)
    return DECODERS[decoder](data, None, size)


# ---------------------------------------------------------------------------------------------
# decord
# ---------------------------------------------------------------------------------------------


def _by_decord(data: bytes, indices: Sequence[int] | None, size: int) -> Frame:
    """Decode chosen frames, or all: ``uint8 [N, size, size, 3]``."""
    decord = _load_decord()
    _check_mp4(data)
    try:
        # A new reader each time: a shared one aborts, and one inherited over a fork hangs.
        reader = decord.VideoReader(io.BytesIO(data), decord.cpu(0), size, size, num_threads=1)
        chosen = _existing(indices, len(reader))
        frames: Frame = reader.get_batch(chosen).asnumpy()
    except (RuntimeError, decord.DECORDError):
        # Its own message may quote the bytes of the file.
        raise VideoError("clip", _DAMAGED) from None
    return frames


@cache
def _load_decord() -> ModuleType:
    """Import decord.

    Raises:
        UserError: it cannot be imported; it has no build for ARM.
    """
    try:
        import decord
    except (ImportError, OSError, RuntimeError) as error:
        raise UserError(
            f"data.decoder=decord: decord cannot be imported here ({error}); set "
            "data.decoder=pyav, which gives the same frames"
        ) from None
    return decord  # type: ignore[no-any-return]


# ---------------------------------------------------------------------------------------------
# PyAV
# ---------------------------------------------------------------------------------------------


class _Order(NamedTuple):
    """The frames of a clip in presentation order.

    Attributes:
        times: of all frames, ascending, as the stream counts them.
        keys: times of the key frames, ascending.
        is_assumed: the times are those of decoding, which must turn out to be those of showing.
    """

    times: list[int]
    keys: list[int]
    is_assumed: bool


class _Reordered(Exception):
    """Raised if frames are not shown in the order in which they are decoded."""


def _by_pyav(data: bytes, indices: Sequence[int] | None, size: int) -> Frame:
    """Decode chosen frames, or all: ``uint8 [N, size, size, 3]``."""
    _check_mp4(data)
    try:
        with open_video(io.BytesIO(data), "mp4") as (container, stream):
            stream.codec_context.thread_count = 1  # Loader workers are the parallelism.
            try:
                return _chosen(container, stream, _order_in_index(stream), indices, size)
            except _Reordered:
                order = _order_of_packets(container, stream)
                return _chosen(container, stream, order, indices, size)
    except (av.FFmpegError, OSError, KeyError, IndexError, ValueError):
        raise VideoError("clip", _DAMAGED) from None


def _order_in_index(stream: VideoStream) -> _Order:
    """Take the order from the index, which takes no reading: it has times of decoding only.

    Raises:
        _Reordered: that is known to be another order, or the index is not complete.
    """
    entries = stream.index_entries
    if stream.codec_context.has_b_frames or len(entries) != stream.frames:
        raise _Reordered
    times = [entry.timestamp for entry in entries]
    keys = [entry.timestamp for entry in entries if entry.is_keyframe]
    return _Order(times, keys, is_assumed=True)


def _order_of_packets(container: InputContainer, stream: VideoStream) -> _Order:
    """Read all packets."""
    container.seek(0)
    packets = [
        (packet.pts, packet.is_keyframe)
        for packet in container.demux(stream)
        if packet.pts is not None
    ]
    times = sorted(time for time, _ in packets)
    return _Order(times, sorted(time for time, is_key in packets if is_key), is_assumed=False)


def _chosen(
    container: InputContainer,
    stream: VideoStream,
    order: _Order,
    indices: Sequence[int] | None,
    size: int,
) -> Frame:
    wanted = [order.times[index] for index in _existing(indices, len(order.times))]
    to_rgb = _converter(stream, size)
    images: dict[int, Frame] = {}
    # One pass from a key frame serves all frames that depend on it.
    for _, group in itertools.groupby(sorted(set(wanted)), partial(bisect_right, order.keys)):
        for frame in _frames_at(container, stream, [*group], order.is_assumed):
            images[frame.pts] = to_rgb(frame)
    return np.stack([images[time] for time in wanted])


def _frames_at(
    container: InputContainer, stream: VideoStream, times: Sequence[int], is_assumed: bool
) -> Iterator[Any]:
    """Decode frames between two key frames, given their times in ascending order.

    Raises:
        _Reordered: the order was assumed, and a frame on the way is shown later than it is decoded.
            If none is, then no frame before these is shown after them, and none behind them before.
    """
    container.seek(times[0], stream=stream)
    missing = len(times)
    for packet in container.demux(stream):
        if is_assumed and packet.pts != packet.dts:
            raise _Reordered
        for frame in packet.decode():
            if packet.is_corrupt or frame.is_corrupt:
                raise VideoError("clip", _DAMAGED)
            if frame.pts in times:
                missing -= 1
                yield frame
        if not missing:
            return


def _converter(stream: VideoStream, size: int) -> Callable[[av.VideoFrame], Frame]:
    """Return the conversion of frames to RGB of a size, ``uint8 [size, size, 3]``."""
    convert: Callable[[av.VideoFrame], av.VideoFrame]
    if (stream.width, stream.height) == (size, size):
        # One for all frames, and in this thread: by default each frame would start threads.
        convert = partial(VideoReformatter().reformat, format="rgb24", threads=1)
    else:
        convert = _resizer(stream, size)
    return lambda frame: np.asarray(convert(frame).to_ndarray(), np.uint8)


def _resizer(stream: VideoStream, size: int) -> Callable[[av.VideoFrame], av.VideoFrame]:
    """Scale exactly as decord does: by FFmpeg's filter, in one step with the conversion to RGB."""
    graph = av.filter.Graph()
    graph.threads = 1
    steps = [
        graph.add_buffer(template=stream),
        graph.add("scale", f"{size}:{size}:flags=bilinear"),
        graph.add("format", "rgb24"),
        graph.add("buffersink"),
    ]
    graph.link_nodes(*steps).configure()

    def resized(frame: av.VideoFrame) -> av.VideoFrame:
        graph.vpush(frame)
        return graph.vpull()

    return resized


# ---------------------------------------------------------------------------------------------
# torchcodec
# ---------------------------------------------------------------------------------------------


def _by_torchcodec(data: bytes, indices: Sequence[int] | None, size: int) -> Frame:
    """Decode chosen frames, or all: ``uint8 [N, size, size, 3]``."""
    torchcodec = _load_torchcodec()
    _check_mp4(data)
    open_with = partial(torchcodec.decoders.VideoDecoder, data, dimension_order="NHWC")
    try:
        video = open_with()
        facts = video.metadata
        # The header of a fragmented clip declares fewer frames, or none.
        if len(video) < (facts.num_frames_from_header or 0):
            raise VideoError("clip", _DAMAGED)  # It is cut off.
        chosen = [*_existing(indices, len(video))]
        if (facts.width, facts.height) != (size, size):
            video = open_with(transforms=[torchcodec.transforms.Resize((size, size))])
        frames: Frame = video.get_frames_at(chosen).data.numpy()
    except (RuntimeError, ValueError, IndexError):
        raise VideoError("clip", _DAMAGED) from None
    return frames


@cache
def _load_torchcodec() -> ModuleType:
    """Import torchcodec, and let it load FFmpeg's libraries.

    Raises:
        UserError: one of them is missing, or they do not fit together.
    """
    try:
        import torchcodec

        # It loads FFmpeg when it first needs it, and only then are all its parts known to be there.
        clip = io.BytesIO()
        write_video(clip, np.zeros((1, SIZE_STEP, SIZE_STEP, 3), np.uint8), 25.0)
        torchcodec.decoders.VideoDecoder(clip.getvalue())[0]
    except (ImportError, OSError, RuntimeError) as error:
        raise UserError(f"data.decoder=torchcodec: {_why_not_loaded(error)}") from None
    return torchcodec  # type: ignore[no-any-return]


def _why_not_loaded(error: Exception) -> str:
    """Say why torchcodec does not work, and what to do."""
    if isinstance(error, ModuleNotFoundError):
        return (
            "torchcodec is not installed here; pip install 'prioritycut_ray[torchcodec]', or set "
            "data.decoder=pyav"
        )
    # Its message has a traceback for each version of FFmpeg that it has tried.
    tried = re.findall(r"^OSError: (?!Could not load)(.+)$", str(error), re.MULTILINE)
    if tried and all(reason.startswith("libav") for reason in tried):
        return (
            "torchcodec finds no FFmpeg here; install FFmpeg with its shared libraries "
            "(apt-get install ffmpeg), or set data.decoder=pyav, which has its own"
        )
    reasons = [reason for reason in tried if not reason.startswith("libav")]
    return (
        f"torchcodec cannot be used here ({(reasons or [reason_of(error)])[0]}); install versions "
        "of torch, torchcodec and FFmpeg that fit together, or set data.decoder=pyav"
    )


# ---------------------------------------------------------------------------------------------
# All of them
# ---------------------------------------------------------------------------------------------


def _check_mp4(data: bytes) -> None:
    # decord would print the whole file if it cannot open it.
    if data[4:8] != b"ftyp":
        raise VideoError("clip", "cannot be decoded: it is not an mp4")


def _existing(indices: Sequence[int] | None, frames: int) -> Sequence[int]:
    if indices is None:
        return range(frames)
    if wrong := [index for index in indices if not 0 <= index < frames]:
        raise VideoError("clip", f"has {frames} frames, but not number {wrong[0]}")
    return indices


DECODERS: dict[str, Callable[[bytes, Sequence[int] | None, int], Frame]] = {
    "decord": _by_decord,
    "pyav": _by_pyav,
    "torchcodec": _by_torchcodec,
}
"""Readers of packed clips: ``(data, indices or None for all, size)`` to frames."""
