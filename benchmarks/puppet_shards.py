"""Shards of synthetic puppets for training, written without Ray.

    python benchmarks/puppet_shards.py data/puppets  # 200 to train on, 20 to validate with

The same options write the same data set.
"""

import io
from pathlib import Path
from typing import Annotated

import typer
from command_line import run_command

from prioritycut_ray.data.index import has_index
from prioritycut_ray.data.puppets import render_clip
from prioritycut_ray.data.shard_writer import Member, ShardWriter
from prioritycut_ray.video.encoding import write_video


def pack_puppets(url: str, clips: int, frames: int, size: int, validation: int = 0) -> str:
    """Write a data set of synthetic puppets, encoded as by `prioritycut shard`; return its URL.

    Puppets 0 to ``clips`` - 1 are for training; the ``validation`` puppets after them are the split
    ``val``.
    """
    splits = ["train"] * clips + ["val"] * validation
    with ShardWriter(url, shard_bytes=2**21) as writer:
        for seed in range(len(splits)):
            encoded = io.BytesIO()
            write_video(encoded, render_clip(seed, size=size, frames=frames).frames, 25.0)
            key = f"puppet{seed}"
            writer.add(Member(key, encoded.getvalue(), frames, 25.0, size, size, key, key, False))
        writer.finish({f"puppet{seed}": split for seed, split in enumerate(splits)})
    return url


def packed_puppets(folder: Path, clips: int, frames: int, size: int, validation: int = 0) -> str:
    """Return the data set in a folder; it is written by :func:`pack_puppets` unless it is there."""
    if not folder.exists() or not has_index(path.name for path in folder.iterdir()):
        pack_puppets(str(folder), clips, frames, size, validation)
    return str(folder)


def main(
    url: Annotated[str, typer.Argument(help="Folder to write, a path or a URL.")],
    clips: Annotated[int, typer.Option(min=1, help="Puppets to train on.")] = 200,
    validation: Annotated[int, typer.Option(min=0, help="Puppets of the split `val`.")] = 20,
    frames: Annotated[int, typer.Option(min=2, help="Frames of each clip.")] = 32,
    size: Annotated[int, typer.Option(min=32, help="Side of the frames in pixels.")] = 64,
) -> None:
    """Render puppets and pack them."""
    print(pack_puppets(url, clips, frames, size, validation))


if __name__ == "__main__":
    run_command(main)
