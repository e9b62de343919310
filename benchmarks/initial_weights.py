"""What `init=` saves at twice the frame size: 64 -> 128 beside training from scratch; in Markdown.

    python benchmarks/initial_weights.py --out initial_weights

For each seed, the networks of `quickstart` are trained at 64x64, then at 128x128 twice: from random
weights, and from those of the model at 64x64 with a quarter of the samples. Keypoints and motion
are computed at 32x32 throughout. Held-out puppets are scored while training; the L1 of both is
that of the averaged weights after the last step. Runs in ``--out`` are resumed.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

from pathlib import Path
from typing import Annotated, NamedTuple

import numpy as np
import typer
from command_line import run_command
from puppet_shards import packed_puppets

from prioritycut_ray import load_config, train
from prioritycut_ray.config import VAL_L1
from prioritycut_ray.runs.verdicts import read_verdicts
from prioritycut_ray.storage.folder import Folder

PUPPETS, HELD_OUT, FRAMES = 40, 8, 32
SHARE = 4
"""The model with initial weights gets one part in so many of the samples."""
AT_128 = [
    "data.size=128",
    "model.detector.scale_factor=0.25",
    "model.dense_motion.scale_factor=0.25",
]


class Scores(NamedTuple):
    """Mean L1 on held-out puppets by samples seen, and that of the copied source."""

    l1: dict[int, float]
    copied: float


def main(
    out: Annotated[Path, typer.Option(help="Folder of the data and the runs.")] = Path(
        "initial_weights"
    ),
    seeds: Annotated[int, typer.Option(min=1)] = 3,
    small: Annotated[int, typer.Option(help="Samples at 64x64.")] = 4000,
    large: Annotated[int, typer.Option(help="Samples at 128x128 from scratch.")] = 3200,
) -> None:
    """Train all runs, and print a row for each seed."""
    packed_puppets(out / "data", PUPPETS, FRAMES, 128, validation=HELD_OUT)
    quarter = large // SHARE
    print(f"L1 on {HELD_OUT} held-out puppets, {PUPPETS} for training; {small} samples at 64x64\n")
    print(
        f"| seed | copied source | from scratch, {large} samples at 128x128 "
        f"| init=, {quarter} samples | init= after {quarter // SHARE} | scratch − init= |"
    )
    print("|---|---|---|---|---|---|")
    gains = []
    for seed in range(seeds):
        _, model = trained(out, f"small{seed}", seed, small)
        scratch, _ = trained(out, f"scratch{seed}", seed, large, *AT_128)
        init, _ = trained(out, f"init{seed}", seed, quarter, f"init={model}", *AT_128)
        gains.append(scratch.l1[large] - init.l1[quarter])
        print(
            f"| {seed} | {init.copied:.4f} | {scratch.l1[large]:.4f} | {init.l1[quarter]:.4f} "
            f"| {init.l1[quarter // SHARE]:.4f} | {gains[-1]:+.4f} |",
            flush=True,
        )
    reached = sum(gain >= 0 for gain in gains)
    print(f"\nReached with a quarter of the samples: {reached} of {seeds} seeds.")
    print(f"Mean of the last column: {np.mean(gains):+.4f}")


def trained(out: Path, name: str, seed: int, samples: int, *words: str) -> tuple[Scores, str]:
    """Train a run, or resume it; return its scores and its folder."""
    config = load_config(
        "quickstart",
        [
            f"name={name}",
            f"storage={out / 'runs'}",
            f"data.url={out / 'data'}",
            f"train.seed={seed}",
            f"train.samples={samples}",
            "train.workers=0",
            f"train.validate_every={samples // SHARE // 8}",
            f"train.validate_clips={HELD_OUT}",
            "priority_cut.warmup_samples=0",
            *words,
        ],
    )
    folder = train(config)
    verdicts = read_verdicts(Folder(folder))
    l1 = {each.step * config.train.batch_size: each.scores[VAL_L1] for each in verdicts}
    return Scores(l1, verdicts[-1].scores["val/copy_source/l1"]), folder


if __name__ == "__main__":
    run_command(main)
