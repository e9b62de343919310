"""Small synthetic data sets, written without Ray."""

import hashlib
import io
import json
from pathlib import Path

import numpy as np
import pyarrow as pa

from prioritycut_ray.data.index import SCHEMA, ClipIndex, read_index
from prioritycut_ray.data.shard_writer import Member, ShardWriter
from prioritycut_ray.data.shards import Clip
from prioritycut_ray.video.encoding import write_video

CLIPS, SIZE = 7, 32
NO_CLIPS = ClipIndex(pa.RecordBatch.from_pylist([], SCHEMA), "")
"""For training without data."""


def clip_frames(number: int) -> list[np.ndarray]:
    """Frames whose red level encodes the clip, and whose blue level the frame."""
    frame = np.zeros((SIZE, SIZE, 3), np.uint8)
    frame[..., 0] = 30 + 15 * number
    return [frame + np.uint8([0, 0, 25 * index]) for index in range(4 + number % 3)]


def clip_member(number: int) -> Member:
    """``clip<number>``, of these frames, almost lossless."""
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


def write_members(
    url: str, members: list[Member], shard_bytes: int = 20_000, split: str = "train"
) -> str:
    """Pack members as clips of a split; return the folder."""
    with ShardWriter(url, shard_bytes) as writer:
        for one in members:
            writer.add(one)
        writer.finish({one.key: split for one in members})
    return url


def write_set(
    url: str, clips: int = CLIPS, shard_bytes: int = 20_000, reverse: bool = False
) -> str:
    order = list(range(clips))[:: -1 if reverse else 1]
    return write_members(url, [clip_member(number) for number in order], shard_bytes)


def damage(url: str, clip: Clip) -> None:
    """Invert one byte in the middle of a clip."""
    path = Path(url, clip.shard)
    data = bytearray(path.read_bytes())
    data[clip.offset + clip.size // 2] ^= 255
    path.write_bytes(data)


def random_member(number: int, size: int = 3000) -> Member:
    """``clip<number>``, of random bytes that no decoder reads."""
    return Member(
        key=f"clip{number}",
        data=np.random.default_rng(number).bytes(size),
        frames=10 + number,
        fps=25.0,
        width=64,
        height=64,
        identity=f"person {number}",
        original=f"clip{number}.MOV",
        variable_rate=False,
    )


def write_random(url: str, numbers: list[int], shard_bytes: int = 10_000) -> ClipIndex:
    """Pack random members; clip 0 is for tests."""
    with ShardWriter(url, shard_bytes) as writer:
        for number in numbers:
            writer.add(random_member(number))
        return writer.finish({f"clip{n}": "test" if n == 0 else "train" for n in numbers})


def as_packed(index: ClipIndex) -> list[Clip]:
    """List the clips in the order of the shards."""
    return sorted(index.clips, key=lambda clip: (clip.shard, clip.offset))


def make_old(folder: str) -> ClipIndex:
    """Replace the index of a data set by the ``index.json`` of version 0.1."""
    index = read_index(folder)
    rows = [{k: v for k, v in c._asdict().items() if k != "extra"} for c in as_packed(index)]
    facts = sorted((r["key"], r["sha256"], r["frames"], r["identity"], r["split"]) for r in rows)
    fingerprint = hashlib.sha256(json.dumps(facts).encode()).hexdigest()
    Path(folder, "index.json").write_text(
        json.dumps({"format": 1, "fingerprint": fingerprint, "clips": rows})
    )
    Path(folder, "index.arrow").unlink()
    return index


def files_below(path: Path) -> list[str]:
    """List everything below a folder, relative to it."""
    return sorted(str(p.relative_to(path)) for p in path.rglob("*"))
