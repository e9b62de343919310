"""Small video files, made as needed."""

import io
from fractions import Fraction

import av
import numpy as np

from prioritycut_ray.video.encoding import write_video


def moving_square(count: int, height: int = 64, width: int = 64) -> list[np.ndarray]:
    """A bright square that moves 3 pixels per frame over a smooth ramp: all frames differ."""
    ramp = np.linspace(20, 120, width, dtype=np.uint8)
    frames = []
    for index in range(count):
        frame = np.broadcast_to(ramp[None, :, None], (height, width, 3)).copy()
        left = 3 * index % (width - 12)
        frame[8:20, left : left + 12] = (230, 60, 4 * index % 256)
        frames.append(frame)
    return frames


def encoded(frames: list[np.ndarray], fps: float = 25.0, **options: int) -> bytes:
    target = io.BytesIO()
    write_video(target, frames, fps, **options)
    return target.getvalue()


def muxed(
    container: str,
    codec: str,
    frames: list[np.ndarray],
    *,
    first: int = 0,
    sar: int = 1,
    **options: str,
) -> bytes:
    """Encode files that write_video does not write."""
    target = io.BytesIO()
    with av.open(target, "w", format=container, options=options) as file:
        stream = file.add_stream(codec, rate=25)
        stream.height, stream.width = frames[0].shape[:2]
        stream.codec_context.gop_size = 12
        stream.codec_context.sample_aspect_ratio = Fraction(sar)
        for number, image in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            frame.pts, frame.time_base = first + number, Fraction(1, 25)
            file.mux(stream.encode(frame))
        file.mux(stream.encode())
    return target.getvalue()


def alike(one: np.ndarray, other: np.ndarray) -> bool:
    return bool(np.abs(one.astype(int) - other.astype(int)).mean() < 4)
