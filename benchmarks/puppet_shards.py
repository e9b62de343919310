"""Shards of synthetic puppets for the other benchmarks, written without Ray."""

import io

from prioritycut_ray.data.puppets import render_clip
from prioritycut_ray.data.shard_writer import Member, ShardWriter
from prioritycut_ray.video.encoding import write_video


def pack_puppets(url: str, clips: int, frames: int, size: int) -> str:
    """Write a data set of synthetic puppets, encoded as by `prioritycut shard`; return its URL."""
    with ShardWriter(url, shard_bytes=2**21) as writer:
        for seed in range(clips):
            encoded = io.BytesIO()
            write_video(encoded, render_clip(seed, size=size, frames=frames).frames, 25.0)
            key = f"puppet{seed}"
            writer.add(Member(key, encoded.getvalue(), frames, 25.0, size, size, key, key, False))
        writer.finish({f"puppet{seed}": "train" for seed in range(clips)})
    return url
