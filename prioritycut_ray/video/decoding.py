"""Decode any video or picture, by PyAV, as a viewer would show it.

PyAV handles every container, rotation and pixel shape, and reports damage. Frames are RGB
``uint8 [H, W, 3]`` in 0..255, upright, with square pixels.
"""

import io
import itertools
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import av
import numpy as np
from av.container import InputContainer
from av.sidedata.sidedata import Type as SideDataType
from av.stream import Disposition
from av.video import VideoStream
from av.video.codeccontext import VideoCodecContext
from av.video.reformatter import Colorspace, VideoReformatter
from numpy.typing import NDArray
from PIL import Image

from prioritycut_ray.errors import reason_of
from prioritycut_ray.video.images import (
    Picture,
    is_picture_file,
    on_black,
    picture_frames,
    read_picture_file,
    scaled,
)
from prioritycut_ray.video.source import (
    TOO_LARGE,
    Frame,
    Source,
    TimedFrame,
    VideoError,
    check_pixels,
    check_regular,
    name_of,
)

# Far beyond any screen: a broken aspect ratio must not ask for gigabytes per frame.
LARGEST_SIDE = 16384
# Formats whose index lists every frame after applying edit lists.
_INDEXED_FORMAT = "mov,mp4,m4a,3gp,3g2,mj2"
FALLBACK_FPS = 25.0
# Formats that contain frames themselves: a playlist disguised as a video must not fetch anything.
_FORMATS = (
    "mov,matroska,avi,mpeg,mpegts,mpegvideo,flv,asf,ogg,nut,mxf,ivf,"
    "h264,hevc,av1,obu,m4v,mjpeg,dv,rm,swf,wtv"
)
_OPEN_OPTIONS = {"protocol_whitelist": "file", "format_whitelist": _FORMATS}
# Streams that are not videos: cover art, chapter pictures, tiles.
_BESIDE = Disposition.attached_pic | Disposition.timed_thumbnails | Disposition.dependent
_UNSPECIFIED = 2
"""FFmpeg's value for a frame that does not name its colour space."""
_NO_VIDEO = "is not a video, or is cut off before its index (nothing could be read)"
# WebM does not declare its number of frames; its duration may exceed the last frame by this much.
_SLACK_SECONDS = 1.0


class VideoInfo(NamedTuple):
    """What a container says about its video stream, before decoding.

    Attributes:
        fps: average frames per second; 25 if the container does not say.
        variable_rate: whether the frames are unevenly spaced in time, so that ``fps`` is nominal.
        packets: number of frames in the file, including hidden ones, as far as it can be read.
    """

    fps: float
    variable_rate: bool
    packets: int


def frames_upright(source: Source, skip: int = 0) -> Iterator[Frame]:
    """Decode every frame of a video like :func:`frames_timed`, without times."""
    for frame in frames_timed(source, skip):
        yield frame.image


def frames_timed(source: Source, skip: int = 0) -> Iterator[TimedFrame]:
    """Decode every frame of a video, in presentation order, as a viewer would show it.

    The display matrix (rotation and mirroring) and the pixel aspect ratio are applied, edit lists
    are respected, and gray becomes three equal channels. More than 8 bits a channel are rounded
    to 8; HDR (PQ, HLG) keeps its code values and looks flat, because it is not tone-mapped.

    Args:
        source: a file path, or a seekable binary file.
        skip: number of frames at the beginning that are not yielded; they are not decoded either,
            as far as the key frames allow.

    Yields:
        RGB frames ``uint8 [H, W, 3]`` with their times.

    Raises:
        VideoError: the source cannot be opened, or it is damaged or cut off: then all frames
            before the damage have been yielded, and the message gives their number.
    """
    if is_picture_file(source):
        yield from itertools.islice(picture_frames(source), skip, None)
        return
    try:
        yield from _frames_from(source, skip, seek=skip > 0)
    except _KeyFrameMissed:
        yield from _frames_from(source, skip, seek=False)


def _frames_from(source: Source, skip: int, *, seek: bool) -> Iterator[TimedFrame]:
    """Decode the frames of a video from a number on, see :func:`frames_timed`.

    Raises:
        _KeyFrameMissed: the seek did not find its key frame; nothing has been yielded.
    """
    with open_video(source) as (container, stream):
        aspect = _pixel_aspect(source, stream)
        seconds = 0.0
        try:
            start = _seek_before(container, stream, skip) if seek else _Start(0, 0, None)
            packets, decoded = start.packets, start.number
            decoder = _decoder(stream)
            reformatter = VideoReformatter()
            for packet in container.demux(stream):
                packets += packet.size > 0
                seconds = max(seconds, _end(packet))
                if packet.is_corrupt:
                    raise VideoError(name_of(source), _damage(decoded, "a frame's data is cut off"))
                for frame in decoder.decode(packet):
                    if frame.is_corrupt:
                        raise VideoError(name_of(source), _damage(decoded, "a frame is damaged"))
                    if decoded == start.number and start.time is not None:
                        if frame.pts is not None and frame.pts < start.time:
                            continue  # A leading picture, which belongs to what was skipped.
                        if frame.pts != start.time:
                            raise _KeyFrameMissed
                    if decoded >= skip:
                        image = _displayed(frame, aspect, reformatter)
                        yield TimedFrame(image, frame.time, _duration(frame))
                    decoded += 1
        except _KeyFrameMissed:
            raise
        except VideoError as error:
            raise VideoError(name_of(source), error.reason) from None
        except Exception as error:  # Libraries raise anything for a strange frame.
            raise VideoError(name_of(source), _damage(decoded, reason_of(error))) from None
        if decoded == start.number and start.time is not None:
            raise _KeyFrameMissed
        declared = _declared_packets(container, stream)
        duration = _declared_seconds(container, stream)
    # Packets, not frames: an edit list hides frames, and a cut may make some undecodable.
    if packets < declared:
        reason = _damage(decoded, f"it ends after {packets} of {declared} frames")
        raise VideoError(name_of(source), reason)
    if seconds < duration - _SLACK_SECONDS:
        reason = _damage(decoded, f"it ends at {seconds:.1f} of {duration:.1f} s")
        raise VideoError(name_of(source), reason)
    if not decoded:
        raise VideoError(name_of(source), "has no frames")


class _KeyFrameMissed(Exception):
    """Raised if a seek did not find its key frame."""


class _Start(NamedTuple):
    """Where decoding begins: at a key frame, or at the beginning (no time).

    Attributes:
        number: of the key frame.
        packets: number of packets before it in the file.
        time: of the key frame, as the stream counts it.
    """

    number: int
    packets: int
    time: int | None


def _seek_before(container: InputContainer, stream: VideoStream, skip: int) -> _Start:
    """Seek to the last key frame that is not after a frame, if frames can be numbered by time."""
    packets: list[tuple[int | None, bool, bool]] = []
    with suppress(av.FFmpegError):  # Damage is reported when the frames are decoded.
        for packet in container.demux(stream):
            if packet.size:
                packets.append((packet.pts, packet.is_keyframe, packet.is_discard))
    times = sorted(time for time, _, _ in packets if time is not None)
    keys = [
        (time, place)
        for place, (time, is_key, _) in enumerate(packets)
        if is_key and time is not None
    ]
    # Hidden frames, and those that depend on frames before the first one, are not shown.
    is_numbered = (
        skip < len(times) == len(packets) == len({*times})
        and keys[:1] == [(times[0], 0)]
        and not any(is_hidden for _, _, is_hidden in packets)
    )
    time, place = max(key for key in keys if key[0] <= times[skip]) if is_numbered else (0, 0)
    if place == 0:
        container.seek(0)
        return _Start(0, 0, None)
    container.seek(time, stream=stream)
    return _Start(times.index(time), place, time)


def probe(source: Source) -> VideoInfo:
    """Read the frame rate of a video from its container, without decoding it.

    Args:
        source: a file path, or a seekable binary file.

    Raises:
        VideoError: the source cannot be opened.
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
    # Up to a factor of 1.5 may be rounding to a coarse time base.
    return len(steps) > 0 and bool(steps.max() > 1.5 * steps.min())


class _Open(NamedTuple):
    """A container and its video stream."""

    container: InputContainer
    stream: VideoStream


@contextmanager
def open_video(source: Source, container_format: str | None = None) -> Iterator[_Open]:
    """Open a container and choose its video stream.

    Args:
        source: a file path, or a seekable binary file.
        container_format: FFmpeg's name of the format; None detects it, which takes longer.

    Raises:
        VideoError: it cannot be opened, or has no video.
    """
    check_regular(source)
    # "file:" stops FFmpeg from interpreting a name as a protocol or a pattern.
    file: Any = f"file:{source}" if isinstance(source, str | Path) else source
    if not isinstance(source, str | Path):
        source.seek(0)
    try:
        container = av.open(file, format=container_format, options=_OPEN_OPTIONS)
    except (av.FFmpegError, OSError, ValueError) as error:
        raise VideoError(name_of(source), _why_not_opened(source, error)) from None
    with container:
        yield _Open(container, _video_stream(source, container))


def _video_stream(source: Source, container: InputContainer) -> VideoStream:
    """Choose the default video, or else the first, skipping cover art and tiles."""
    if not container.streams.video:
        raise VideoError(name_of(source), "has no video stream")
    known = [stream for stream in container.streams.video if stream.codec_context is not None]
    if not known:
        raise VideoError(name_of(source), "has no video stream of a known codec")
    videos = [stream for stream in known if not stream.disposition & _BESIDE]
    if not videos:
        raise VideoError(name_of(source), "has no video, only cover art")
    return next((one for one in videos if one.disposition & Disposition.default), videos[0])


def _why_not_opened(source: Source, error: Exception) -> str:
    is_path = isinstance(source, str | Path)
    # EINVAL is how FFmpeg refuses a format that is not on the list.
    no_video = isinstance(error, av.InvalidDataError | av.EOFError | av.ArgumentError)
    if is_path and not no_video:
        return reason_of(error)
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
    """Return the number of packets of the complete file; 0 if the container does not say."""
    if container.format.name == _INDEXED_FORMAT:
        return len(stream.index_entries)
    return stream.frames


def _declared_seconds(container: InputContainer, stream: VideoStream) -> float:
    """Return the duration of a Matroska or WebM video; 0 if unknown, or for another format."""
    if container.format.name != "matroska,webm":
        return 0.0
    tag = stream.metadata.get("DURATION", "")
    if clock := re.fullmatch(r"(\d+):(\d+):(\d+\.?\d*)", tag):
        return sum(
            float(part) * unit for part, unit in zip(clock.groups(), (3600, 60, 1), strict=True)
        )
    # The container's duration may be that of its sound.
    duration = container.duration if len(container.streams) == 1 else None
    return (duration or 0) / av.time_base


def _duration(frame: av.VideoFrame) -> float:
    if not frame.duration or frame.time_base is None:
        return 0.0
    return float(frame.duration * frame.time_base)


def _end(packet: Any) -> float:
    """Return the time at which a packet's frame ends, in seconds; 0 if it has no time."""
    if packet.pts is None or packet.time_base is None:
        return 0.0
    return float((packet.pts + (packet.duration or 0)) * packet.time_base)


def _displayed(frame: av.VideoFrame, aspect: Fraction, reformatter: VideoReformatter) -> Frame:
    """Convert a decoded frame to what a viewer would show: RGB ``uint8 [H, W, 3]``."""
    image = scaled(_rgb(frame, reformatter), round(frame.width * aspect), frame.height)
    matrix: Any = frame.side_data.get("DISPLAYMATRIX")
    return image if matrix is None else _turned(image, np.frombuffer(matrix, np.int32))


def _rgb(frame: av.VideoFrame, reformatter: VideoReformatter) -> Frame:
    has_alpha = frame.format.has_palette or any(c.is_alpha for c in frame.format.components)
    form = "rgba" if has_alpha else "rgb24"
    try:
        # In this thread: by default, each frame would start threads of its own.
        converted = reformatter.reformat(
            frame, format=form, src_colorspace=guessed_colours(frame), threads=1
        )
        image = converted.to_ndarray()
    except av.FFmpegError as error:
        reason = (
            f"has colours that cannot be converted (matrix {frame.colorspace}): {reason_of(error)}"
        )
        raise VideoError("video", reason) from None
    return np.array(on_black(Image.fromarray(image))) if has_alpha else np.asarray(image)


def guessed_colours(frame: av.VideoFrame) -> Colorspace | None:
    """Return the colour space that players assume for HD frames without one; None for others."""
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
    """Make PyAV accept frames with side data unknown to it, such as Exif.

    Otherwise it raises for any side data of such a frame, including the display matrix.
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
# Pictures
# ---------------------------------------------------------------------------------------------


def read_picture(path: str | Path, most_pixels: int = TOO_LARGE) -> Picture:
    """Read a picture: an image file, or the first frame of a video.

    The whole picture is read, never a tile, thumbnail or layer. Exif orientation and embedded
    colour profiles are applied, transparent parts become black, gray becomes three equal channels,
    and more than 8 bits a channel are scaled. More than 100 megapixels are reduced.

    Args:
        path: an image (png, jpg, heic, ...) or a video.
        most_pixels: a larger picture is refused.

    Raises:
        VideoError: it is neither, is damaged or too large, or its whole picture or its white level
            cannot be determined.
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
