"""Small synthetic data sets, written without Ray."""

import io
from pathlib import Path

import numpy as np

from prioritycut_ray.data.shards import Clip, Member, ShardWriter
from prioritycut_ray.video.encoding import write_video

CLIPS, SIZE = 7, 32


def clip_frames(number: int) -> list[np.ndarray]:
    """Frames that tell their clip by the red level and their own number by the blue one."""
    frame = np.zeros((SIZE, SIZE, 3), np.uint8)
    frame[..., 0] = 30 + 15 * number
    return [frame + np.uint8([0, 0, 25 * index]) for index in range(4 + number % 3)]


def clip_member(number: int) -> Member:
    """``clip<number>``, of those frames, almost without loss."""
    encoded = io.BytesIO()
    frames = clip_frames(number)
    write_video(encoded, frames, 25.0, crf=1)
    return Member(
        key=f"clip{number}",
        data=encoded.getvalue(),
        frames=len(frames),
        fps=25.0,
        width=SIZE,
        height=SIZE,
        identity=f"clip{number}",
        original="",
        variable_rate=False,
    )


def write_members(url: str, members: list[Member], shard_bytes: int = 20_000) -> str:
    """Pack members as training clips; returns the folder."""
    with ShardWriter(url, shard_bytes) as writer:
        for one in members:
            writer.add(one)
        writer.finish({one.key: "train" for one in members})
    return url


def write_set(
    url: str, clips: int = CLIPS, shard_bytes: int = 20_000, reverse: bool = False
) -> str:
    order = list(range(clips))[:: -1 if reverse else 1]
    return write_members(url, [clip_member(number) for number in order], shard_bytes)


def damage(url: str, clip: Clip) -> None:
    """Turn one byte in the middle of a clip."""
    path = Path(url, clip.shard)
    data = bytearray(path.read_bytes())
    data[clip.offset + clip.size // 2] ^= 255
    path.write_bytes(data)
