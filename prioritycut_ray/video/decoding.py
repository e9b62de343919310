"""Frames in and out of files: the only module that knows a video library.

Two jobs. PyAV reads what people bring (:func:`frames_upright`): it meets every container, rotation
and pixel shape, and says so when a file is damaged. decord, or PyAV where there is no decord, reads
what this project wrote itself (:func:`read_frames`): small upright clips with a short GOP, of which
it finds single frames exactly.

Frames are RGB ``uint8 [H, W, 3]`` in 0..255, upright, with square pixels.
"""

import importlib.util
import io
import itertools
import os
import re
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from fractions import Fraction
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import av
import av.filter
import numpy as np
from av.container import InputContainer
from av.sidedata.sidedata import Type as SideDataType
from av.stream import Disposition
from av.video import VideoStream
from av.video.codeccontext import VideoCodecContext
from av.video.reformatter import Colorspace
from numpy.typing import NDArray
from PIL import Image

from prioritycut_ray.errors import UserError
from prioritycut_ray.video.images import (
    Picture,
    TimedFrame,
    is_picture_file,
    on_black,
    picture_frames,
    read_picture_file,
    scaled,
)
from prioritycut_ray.video.source import (
    SIZE_STEP,
    TOO_LARGE,
    Frame,
    Source,
    VideoError,
    check_pixels,
    check_regular,
    name_of,
    said,
)

# Far beyond any screen: a broken aspect ratio must not ask for gigabytes a frame.
LARGEST_SIDE = 16384
# Formats whose index lists every frame, edit lists applied.
INDEXED_FORMAT = "mov,mp4,m4a,3gp,3g2,mj2"
FALLBACK_FPS = 25.0
# decord has no build for ARM, where all else works.
DEFAULT_DECODER = "decord" if importlib.util.find_spec("decord") else "pyav"
# Files that hold frames themselves: a playlist dressed up as a video must open and fetch nothing.
_FORMATS = (
    "mov,matroska,avi,mpeg,mpegts,mpegvideo,flv,asf,ogg,nut,mxf,ivf,"
    "h264,hevc,av1,obu,m4v,mjpeg,dv,rm,swf,wtv"
)
_OPEN_OPTIONS = {"protocol_whitelist": "file", "format_whitelist": _FORMATS}
# Streams that are not videos of their own: cover art, chapter pictures, tiles.
_BESIDE = Disposition.attached_pic | Disposition.timed_thumbnails | Disposition.dependent
_UNSPECIFIED = 2
"""FFmpeg's value for a frame that does not name its colour space."""
_NO_VIDEO = "is no video, or is cut off before its index (nothing could be read)"
# WebM declares no number of frames; its duration is trusted this far, as the last may be long.
SLACK_SECONDS = 1.0


class VideoInfo(NamedTuple):
    """What a container says about its video stream, before decoding.

    Attributes:
        fps: average frames per second; 25 if the container names none.
        variable_rate: whether the frames are unevenly spaced in time, so that ``fps`` is nominal.
        packets: number of frames in the file, hidden ones too, as far as it can be read.
    """

    fps: float
    variable_rate: bool
    packets: int


def frames_upright(source: Source) -> Iterator[Frame]:
    """Decode every frame of a video, as :func:`frames_timed` does, without its time."""
    for frame in frames_timed(source):
        yield frame.image


def frames_timed(source: Source) -> Iterator[TimedFrame]:
    """Decode every frame of a video, in presentation order, as a viewer would show it.

    The display matrix (rotation and mirroring) and the pixel aspect ratio are applied, edit lists
    are respected, and gray becomes three equal channels. More than 8 bits a channel are rounded
    to 8; HDR (PQ, HLG) keeps its code values, so it looks flat, for no tone mapping is done.

    Args:
        source: a file path, or a seekable binary file.

    Yields:
        RGB frames ``uint8 [H, W, 3]`` with their times.

    Raises:
        VideoError: if the source cannot be opened, or if it is damaged or cut off: then all
            frames before the damage have been yielded, and the message counts them.
    """
    if is_picture_file(source):
        yield from picture_frames(source)
        return
    with open_video(source) as (container, stream):
        aspect = _pixel_aspect(source, stream)
        packets, decoded, seconds = 0, 0, 0.0
        try:
            decoder = _decoder(stream)
            for packet in container.demux(stream):
                packets += packet.size > 0
                seconds = max(seconds, _end(packet))
                if packet.is_corrupt:
                    raise VideoError(name_of(source), _damage(decoded, "a frame's data is cut off"))
                for frame in decoder.decode(packet):
                    if frame.is_corrupt:
                        raise VideoError(name_of(source), _damage(decoded, "a frame is damaged"))
                    yield TimedFrame(_displayed(frame, aspect), frame.time, _duration(frame))
                    decoded += 1
        except VideoError as error:
            raise VideoError(name_of(source), error.reason) from None
        except Exception as error:  # Libraries raise anything for a strange frame.
            raise VideoError(name_of(source), _damage(decoded, said(error))) from None
        declared = _declared_packets(container, stream)
        duration = _declared_seconds(container, stream)
    # Packets, not frames: an edit list hides frames, and a cut may leave some undecodable.
    if packets < declared:
        reason = _damage(decoded, f"it ends after {packets} of {declared} frames")
        raise VideoError(name_of(source), reason)
    if seconds < duration - SLACK_SECONDS:
        reason = _damage(decoded, f"it ends at {seconds:.1f} of {duration:.1f} s")
        raise VideoError(name_of(source), reason)
    if not decoded:
        raise VideoError(name_of(source), "has no frames")


def probe(source: Source) -> VideoInfo:
    """Read the frame rate of a video from its container, without decoding it.

    Args:
        source: a file path, or a seekable binary file.

    Returns:
        The average rate, whether frames come at uneven times, and how many there are.

    Raises:
        VideoError: if the source cannot be opened.
    """
    if is_picture_file(source):
        frames = [(frame.start or 0.0, frame.duration) for frame in picture_frames(source)]
        starts = [start for start, _ in frames]
        seconds = sum(frames[-1])
        fps = len(frames) / seconds if seconds else FALLBACK_FPS
        return VideoInfo(fps, _is_uneven(starts), len(frames))
    with open_video(source) as (container, stream):
        fps = float(stream.average_rate or stream.guessed_rate or FALLBACK_FPS)
        times: list[int] = []
        packets = 0
        try:
            for packet in container.demux(stream):
                packets += packet.size > 0
                if packet.pts is not None:
                    times.append(packet.pts)
        except Exception:  # Damage is reported when the frames are decoded.
            return VideoInfo(fps, variable_rate=False, packets=packets)
    return VideoInfo(fps, _is_uneven(times), packets)


def _is_uneven(times: Sequence[float]) -> bool:
    steps = np.diff(np.sort(times))
    # Within a factor of 1.5: rounding to a coarse time base is no variable rate.
    return len(steps) > 0 and bool(steps.max() > 1.5 * steps.min())


def read_frames(
    data: bytes, indices: Sequence[int], size: int, decoder: str = DEFAULT_DECODER
) -> Frame:
    """Decode chosen frames of a clip that this project wrote, exactly.

    Args:
        data: the whole video file.
        indices: frame numbers from 0, in any order, with repeats if you like.
        size: side of the frames in pixels, a multiple of 32; a clip of another size is resized.
        decoder: one of :data:`DECODERS`.

    Returns:
        RGB frames ``uint8 [N, size, size, 3]``.

    Raises:
        VideoError: if the clip cannot be decoded or has no such frame.
        UserError: if the size is no multiple of 32.
    """
    check_size(size)
    return DECODERS[decoder](data, indices, size)


def check_size(size: int) -> None:
    """Refuse a frame size that clips cannot be decoded at.

    decord 0.6 fails at some small sizes (16, 24, 48, 72, ...), but at no multiple of 32.

    Raises:
        UserError: if the size is no multiple of 32.
    """
    if size < SIZE_STEP or size % SIZE_STEP:
        raise UserError(f"a frame size of {size} cannot be used: choose a multiple of {SIZE_STEP}")


def check_decoder(decoder: str) -> None:
    """Refuse a decoder that this machine cannot load.

    Args:
        decoder: one of :data:`DECODERS`.

    Raises:
        UserError: if decord, which has no build for ARM, cannot be imported.
    """
    if decoder != "decord":
        return
    try:
        import decord  # noqa: F401
    except (ImportError, OSError, RuntimeError) as error:
        raise UserError(
            f"data.decoder=decord: decord cannot be imported here ({error}); set "
            "data.decoder=pyav, which reads the same frames"
        ) from None


def decoder_version() -> str:
    """Name the decoder that is used unless another is asked for, and its version."""
    packages = {"decord": "decord", "pyav": "av"}
    return f"{DEFAULT_DECODER} {version(packages[DEFAULT_DECODER])}"


def read_all(data: bytes, size: int, decoder: str = DEFAULT_DECODER) -> Frame:
    """Decode a whole clip that this project wrote.

    Args:
        data: the whole video file.
        size: side of the frames in pixels, a multiple of 32; a clip of another size is resized.
        decoder: one of :data:`DECODERS`.

    Returns:
        RGB frames ``uint8 [T, size, size, 3]``.

    Raises:
        VideoError: if the clip cannot be decoded.
        UserError: if the size is no multiple of 32.
    """
    check_size(size)
    return DECODERS[decoder](data, None, size)


# ---------------------------------------------------------------------------------------------
# PyAV
# ---------------------------------------------------------------------------------------------


class _Open(NamedTuple):
    """A container, and the stream of it that is the video."""

    container: InputContainer
    stream: VideoStream


@contextmanager
def open_video(source: Source) -> Iterator[_Open]:
    """Open a container that has a video stream."""
    check_regular(source)
    # "file:" keeps FFmpeg from reading a protocol or a pattern out of a name.
    file: Any = f"file:{source}" if isinstance(source, str | Path) else source
    if not isinstance(source, str | Path):
        source.seek(0)
    try:
        container = av.open(file, options=_OPEN_OPTIONS)
    except (av.FFmpegError, OSError, ValueError) as error:
        raise VideoError(name_of(source), _why_not_opened(source, error)) from None
    with container:
        yield _Open(container, _video_stream(source, container))


def _video_stream(source: Source, container: InputContainer) -> VideoStream:
    """Choose the default video, or the first, past cover art and tiles."""
    if not container.streams.video:
        raise VideoError(name_of(source), "has no video stream")
    known = [stream for stream in container.streams.video if stream.codec_context is not None]
    if not known:
        raise VideoError(name_of(source), "has no video stream of a codec that can be told")
    videos = [stream for stream in known if not stream.disposition & _BESIDE]
    if not videos:
        raise VideoError(name_of(source), "has no video, only cover art")
    return next((one for one in videos if one.disposition & Disposition.default), videos[0])


def _why_not_opened(source: Source, error: Exception) -> str:
    is_path = isinstance(source, str | Path)
    # EINVAL is how FFmpeg refuses a format that is not on the list.
    no_video = isinstance(error, av.InvalidDataError | av.EOFError | av.ArgumentError)
    if is_path and not no_video:
        return said(error)
    if _size(source) == 0:
        return "is empty (0 bytes)"
    return _NO_VIDEO


def _size(source: Source) -> int:
    if isinstance(source, str | Path):
        return os.path.getsize(source)
    return source.seek(0, io.SEEK_END)


def _damage(decoded: int, why: str) -> str:
    return f"is damaged or cut off: {why}; {decoded} frames could be decoded"


def _pixel_aspect(source: Source, stream: VideoStream) -> Fraction:
    aspect = Fraction(stream.sample_aspect_ratio or 1)
    if not 1 <= round(stream.width * aspect) <= LARGEST_SIDE:
        raise VideoError(name_of(source), f"has an impossible pixel aspect ratio of {aspect}")
    return aspect


def _declared_packets(container: InputContainer, stream: VideoStream) -> int:
    """Count the packets that a whole file would have; 0 if its container does not say."""
    if container.format.name == INDEXED_FORMAT:
        return len(stream.index_entries)
    return stream.frames


def _declared_seconds(container: InputContainer, stream: VideoStream) -> float:
    """Read how long a Matroska or WebM video lasts; 0 if it does not say, or another format."""
    if container.format.name != "matroska,webm":
        return 0.0
    tag = stream.metadata.get("DURATION", "")
    if clock := re.fullmatch(r"(\d+):(\d+):(\d+\.?\d*)", tag):
        return sum(
            float(part) * unit for part, unit in zip(clock.groups(), (3600, 60, 1), strict=True)
        )
    # That of the whole container may be its sound's.
    duration = container.duration if len(container.streams) == 1 else None
    return (duration or 0) / av.time_base


def _duration(frame: av.VideoFrame) -> float:
    if not frame.duration or frame.time_base is None:
        return 0.0
    return float(frame.duration * frame.time_base)


def _end(packet: Any) -> float:
    """Tell when a packet's frame ends, in seconds; 0 if it has no time."""
    if packet.pts is None or packet.time_base is None:
        return 0.0
    return float((packet.pts + (packet.duration or 0)) * packet.time_base)


def _displayed(frame: av.VideoFrame, aspect: Fraction) -> Frame:
    """Convert a decoded frame to what a viewer would show: RGB ``uint8 [H, W, 3]``."""
    image = scaled(_rgb(frame), round(frame.width * aspect), frame.height)
    matrix: Any = frame.side_data.get("DISPLAYMATRIX")
    return image if matrix is None else _turned(image, np.frombuffer(matrix, np.int32))


def _rgb(frame: av.VideoFrame) -> Frame:
    has_alpha = frame.format.has_palette or any(c.is_alpha for c in frame.format.components)
    form = "rgba" if has_alpha else "rgb24"
    try:
        image = frame.reformat(format=form, src_colorspace=guessed_colours(frame)).to_ndarray()
    except av.FFmpegError as error:
        reason = f"has colours that cannot be converted (matrix {frame.colorspace}): {said(error)}"
        raise VideoError("video", reason) from None
    return np.array(on_black(Image.fromarray(image))) if has_alpha else np.asarray(image)


def guessed_colours(frame: av.VideoFrame) -> Colorspace | None:
    """The colour space that players assume for HD frames without one; None for all others."""
    if frame.format.is_rgb or frame.colorspace != _UNSPECIFIED:
        return None
    return Colorspace.ITU709 if frame.width >= 1280 or frame.height > 576 else None


def _decoder(stream: VideoStream) -> VideoCodecContext:
    """Choose the decoder of a stream: FFmpeg's own for VP8 and VP9 ignore transparency."""
    own = stream.codec_context
    tags = {name.lower(): value for name, value in stream.metadata.items()}
    if tags.get("alpha_mode") != "1" or own.name not in ("vp8", "vp9"):
        return own
    name = {"vp8": "libvpx", "vp9": "libvpx-vp9"}[own.name]
    decoder: Any = av.CodecContext.create(name, "r")
    decoder.extradata = own.extradata
    return decoder  # type: ignore[no-any-return]


def _accept_all_side_data() -> None:
    """Let PyAV read frames with side data that it does not know, such as Exif.

    Otherwise it raises for all side data of such a frame, including the display matrix.
    """

    def unnamed(cls: Any, value: int) -> Any:
        member = object.__new__(cls)
        member._name_, member._value_ = f"UNNAMED_{value}", value
        return member

    SideDataType._missing_ = classmethod(unnamed)  # type: ignore[assignment]


_accept_all_side_data()


def _turned(image: Frame, matrix: NDArray[np.int32]) -> Frame:
    """Apply a display matrix, to the nearest quarter turn and mirroring."""
    # A stored pixel (p, q) is shown at x = a p + c q, y = b p + d q.
    a, b, _, c, d = matrix[:5].tolist()
    if abs(a) + abs(d) < abs(b) + abs(c):
        image, a, d = image.swapaxes(0, 1), c, b
    return np.ascontiguousarray(image[:: -1 if d < 0 else 1, :: -1 if a < 0 else 1])


# ---------------------------------------------------------------------------------------------
# Frames of our own clips: any of two libraries
# ---------------------------------------------------------------------------------------------


def _by_decord(data: bytes, indices: Sequence[int] | None, size: int) -> Frame:
    """Decode chosen frames, or all: ``uint8 [N, size, size, 3]``."""
    import decord

    _check_mp4(data)
    try:
        # Opened anew each time: a shared reader aborts, and one inherited over a fork hangs.
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
            # One way from a key frame serves all that depend on it.
            for _, group in itertools.groupby(sorted(set(wanted)), partial(bisect_right, keys)):
                images |= _images_of(container, stream, list(group), size)
            return np.stack([images[time] for time in wanted])
    except (av.FFmpegError, OSError, KeyError, IndexError):
        raise VideoError("clip", "cannot be decoded: the data is damaged") from None


DECODERS: dict[str, Callable[[bytes, Sequence[int] | None, int], Frame]] = {
    "decord": _by_decord,
    "pyav": _by_pyav,
}
"""What reads frames of our own clips: ``(data, indices or None for all, size)`` to frames."""


def _images_of(
    container: InputContainer, stream: VideoStream, times: Sequence[int], size: int
) -> dict[int, Frame]:
    """Decode frames between two key frames, given their times in order."""
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
    """Scale as decord does, to the bit: by FFmpeg's filter, in one step with the change to RGB."""
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
    # decord would print what it cannot open: the whole file.
    if data[4:8] != b"ftyp":
        raise VideoError("clip", "cannot be decoded: it is no mp4")


def _existing(indices: Sequence[int] | None, frames: int) -> Sequence[int]:
    if indices is None:
        return range(frames)
    if wrong := [index for index in indices if not 0 <= index < frames]:
        raise VideoError("clip", f"has {frames} frames, none numbered {wrong[0]}")
    return indices


def read_picture(path: str | Path, most_pixels: int = TOO_LARGE) -> Picture:
    """Read a picture: an image file, or the first frame of a video.

    The whole picture is read, never a tile, thumbnail or layer of it. Exif orientation and embedded
    colour profiles are applied, transparent parts become black, gray becomes three equal channels,
    and more than 8 bits a channel are scaled. More than 100 megapixels are reduced.

    Args:
        path: an image (png, jpg, heic, ...) or a video.
        most_pixels: a larger picture is refused.

    Raises:
        VideoError: if it is neither, is damaged or too large, or its whole picture or its white
            level cannot be determined.
    """
    picture = read_picture_file(path, most_pixels)
    if picture is None:
        try:
            frame = next(frames_upright(path))
        except VideoError as error:
            hint = "; if it is a picture, save it as PNG or JPEG" * (error.reason == _NO_VIDEO)
            raise VideoError(str(path), f"{error.reason}{hint}") from None
        picture = Picture(frame, frame.shape[1], frame.shape[0])
        check_pixels(path, picture.width, picture.height, most_pixels)
    return picture


def read_image(path: str | Path) -> Frame:
    """Read a picture as :func:`read_picture` does: RGB ``uint8 [H, W, 3]``."""
    return read_picture(path).image
