"""Random access to the frames of packed clips: decord or PyAV behind one function.

Packed clips are small, upright and square, with a short GOP. :func:`read_frames` finds single
frames exactly; both libraries give bit-identical frames.
"""

import importlib.util
import io
import itertools
from bisect import bisect_right
from collections.abc import Callable, Sequence
from functools import partial
from importlib.metadata import version

import av
import av.filter
import numpy as np
from av.container import InputContainer
from av.video import VideoStream

from prioritycut_ray.errors import UserError
from prioritycut_ray.video.decoding import open_video
from prioritycut_ray.video.source import Frame, VideoError

SIZE_STEP = 32
# decord has no build for ARM, where everything else works.
DEFAULT_DECODER = "decord" if importlib.util.find_spec("decord") else "pyav"


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
        UserError: decord cannot be imported; it has no build for ARM.
    """
    if decoder != "decord":
        return
    try:
        import decord  # noqa: F401
    except (ImportError, OSError, RuntimeError) as error:
        raise UserError(
            f"data.decoder=decord: decord cannot be imported here ({error}); set "
            "data.decoder=pyav, which gives the same frames"
        ) from None


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


def _by_decord(data: bytes, indices: Sequence[int] | None, size: int) -> Frame:
    """Decode chosen frames, or all: ``uint8 [N, size, size, 3]``."""
    import decord

    _check_mp4(data)
    try:
        # A new reader each time: a shared one aborts, and one inherited over a fork hangs.
        reader = decord.VideoReader(io.BytesIO(data), decord.cpu(0), size, size, num_threads=1)
        chosen = _existing(indices, len(reader))
        frames: Frame = reader.get_batch(chosen).asnumpy()
    except (RuntimeError, decord.DECORDError):
        # Its own message may quote the bytes of the file.
        raise VideoError("clip", "cannot be decoded: the data is damaged") from None
    return frames


def _by_pyav(data: bytes, indices: Sequence[int] | None, size: int) -> Frame:
    """Decode chosen frames, or all: ``uint8 [N, size, size, 3]``."""
    _check_mp4(data)
    images: dict[int, Frame] = {}
    try:
        with open_video(io.BytesIO(data)) as (container, stream):
            stream.codec_context.thread_count = 1  # Loader workers are the parallelism.
            packets = [
                (packet.pts, packet.is_keyframe)
                for packet in container.demux(stream)
                if packet.pts is not None
            ]
            times = sorted(time for time, _ in packets)
            keys = sorted(time for time, is_key in packets if is_key)
            wanted = [times[index] for index in _existing(indices, len(times))]
            # One pass from a key frame serves all frames that depend on it.
            for _, group in itertools.groupby(sorted(set(wanted)), partial(bisect_right, keys)):
                images |= _images_of(container, stream, list(group), size)
            return np.stack([images[time] for time in wanted])
    except (av.FFmpegError, OSError, KeyError, IndexError):
        raise VideoError("clip", "cannot be decoded: the data is damaged") from None


def _images_of(
    container: InputContainer, stream: VideoStream, times: Sequence[int], size: int
) -> dict[int, Frame]:
    """Decode frames between two key frames, given their times in ascending order."""
    container.seek(times[0], stream=stream)
    images: dict[int, Frame] = {}
    resized = None if (stream.width, stream.height) == (size, size) else _resizer(stream, size)
    for frame in container.decode(stream):
        if frame.is_corrupt:
            raise VideoError("clip", "cannot be decoded: the data is damaged")
        if frame.pts is not None and frame.pts in times:
            shown = frame if resized is None else resized(frame)
            images[frame.pts] = np.asarray(shown.to_ndarray(format="rgb24"), np.uint8)
        if len(images) == len(times):
            break
    return images


def _resizer(stream: VideoStream, size: int) -> Callable[[av.VideoFrame], av.VideoFrame]:
    """Scale exactly as decord does: by FFmpeg's filter, in one step with the conversion to RGB."""
    graph = av.filter.Graph()
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
}
"""Readers of packed clips: ``(data, indices or None for all, size)`` to frames."""
