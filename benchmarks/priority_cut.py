"""What PriorityCut costs, and what it hits; beside CutMix, in Markdown.

    python benchmarks/priority_cut.py cost              # time of mask + mix within a training step
    python benchmarks/priority_cut.py hits runs/NAME    # against the true occlusions of puppets

The perceptual network of ``cost`` has random weights: they change no time.
"""

import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import typer
from torch import Tensor

from prioritycut_ray import priority_cut
from prioritycut_ray.checkpoint import find_checkpoint, load_animator
from prioritycut_ray.config import Config, PriorityCutConfig, parse_config
from prioritycut_ray.data.puppets import disoccluded, foreground, render_clip
from prioritycut_ray.models.animator import FramePair
from prioritycut_ray.models.dense_motion import DenseMotion
from prioritycut_ray.state import new_state
from prioritycut_ray.steps import (
    build_perceptual,
    discriminator_step,
    draw_mask,
    draw_randomness,
    generator_step,
    micro_batches,
)
from prioritycut_ray.worker import Worker

CPU = torch.device("cpu")
FIRST_SEED = 1000  # The quickstart trains on seeds far below.
CLIP_FRAMES = 32
TOP_K = (5, 10, 20, 40)
MIXING = {
    "no mixing": None,
    "CutMix": {"mask": "cutmix", "mix_prob": 1},
    "PriorityCut": {"mask": "priority", "mix_prob": 1},
}

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.callback(invoke_without_command=True)
def main(context: typer.Context) -> None:
    """What PriorityCut costs, and what it hits; beside CutMix."""
    if context.invoked_subcommand is None:
        cost()


@app.command()
def cost(steps: int = 3, batch: int = 1) -> None:
    """Time mask + mix against a whole training step at 256x256, published sizes, on the CPU."""
    configs = {name: _cost_config(mixing, batch) for name, mixing in MIXING.items()}
    mixes = {name: _mask_and_mix(config) for name, config in configs.items()}
    trains = {name: _training_step(config) for name, config in configs.items()}
    step_times = _interleaved(trains, steps)
    mix_times = _interleaved(mixes, 50)
    threads = torch.get_num_threads()
    print(f"Median of {steps} steps, batch {batch}, 256x256, CPU, {threads} thread(s).\n")
    print("| | whole step (s) | of which mask + mix (ms) | share (%) |")
    print("|---|---|---|---|")
    for name in MIXING:
        step, mix = (statistics.median(times[name]) for times in (step_times, mix_times))
        print(f"| {name} | {step:.2f} | {1000 * mix:.2f} | {100 * mix / step:.3f} |")


def _cost_config(mixing: dict[str, object] | None, batch: int) -> Config:
    tree = {
        "priority_cut": mixing,
        "loss": {"perceptual": {"weights": "random"}},
        "train": {"batch_size": batch},
    }
    return parse_config(tree, "cost")


def _mask_and_mix(config: Config) -> Callable[[], None]:
    """What a mixing step does beside the networks: a 64x64 mask to 256x256, and one mix."""
    mixing, size, batch = config.priority_cut, config.data.size, config.train.batch_size
    side = int(size * config.model.dense_motion.scale_factor)
    logits = torch.randn(batch, config.model.num_keypoints + 1, side, side)
    motion = DenseMotion(torch.zeros(batch, side, side, 2), logits.softmax(1), logits[:, :1])
    real, fake = torch.rand(2, batch, 3, size, size)
    uniform = torch.rand(batch, 5)

    def call() -> None:
        if mixing is not None:
            priority_cut.mix(real, fake, draw_mask(motion, uniform, mixing, size))

    return call


def _training_step(config: Config) -> Callable[[], None]:
    """One whole training step, generator and discriminator, on random frames."""
    worker = Worker(0, 1, CPU)
    state, perceptual = new_state(config, CPU), build_perceptual(config)
    pair = FramePair(*torch.rand(2, config.train.batch_size, 3, config.data.size, config.data.size))
    parts = micro_batches(pair, draw_randomness(config, 0, worker), 1)

    def call() -> None:
        animations, _ = generator_step(state, state.animator, perceptual, parts, config)
        discriminator_step(state, state.discriminator, parts, animations, config)

    return call


def _interleaved(calls: dict[str, Callable[[], None]], repeats: int) -> dict[str, list[float]]:
    """Seconds of each call; in turns, so that other work on the machine slows all alike."""
    seconds = defaultdict(list)
    for turn in range(repeats + 1):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            if turn > 0:  # The first turn warms up.
                seconds[name].append(time.perf_counter() - start)
    return seconds


class Truth(NamedTuple):
    """A pair of puppet frames; which pixels of the driving one show what the source hides."""

    pair: FramePair
    lost: Tensor  # bool [1, 1, H, W]: foreground of the driving frame, hidden in the source.


@app.command()
def hits(run: Path, pairs: int = 200, seed: int = 0) -> None:
    """How many cut pixels of a trained run show a surface that the source frame hides."""
    directory = find_checkpoint(run)
    animator, config = load_animator(directory, CPU)
    mixing = config.priority_cut or PriorityCutConfig()
    random = torch.Generator().manual_seed(seed)
    cut_share, hit_share = (defaultdict(float) for _ in range(2))
    lost_share = 0.0
    for truth in _puppet_pairs(pairs, config.data.size, seed):
        with torch.inference_mode():
            animation, _ = animator(truth.pair)
        masks = _masks(animation.motion, mixing, config.data.size, random)
        lost_share += truth.lost.double().mean().item() / pairs
        for name, mask in masks.items():
            cut = mask == 0
            cut_share[name] += cut.double().mean().item() / pairs
            hit_share[name] += (cut & truth.lost).double().mean().item() / pairs
    precision = {name: hit_share[name] / area if area else 0 for name, area in cut_share.items()}
    _print_hits(directory, pairs, lost_share, cut_share, precision)


def _puppet_pairs(count: int, size: int, seed: int) -> Iterator[Truth]:
    """Two random frames each of puppets that no training has seen."""
    rng = np.random.default_rng(seed)
    for puppet in range(FIRST_SEED, FIRST_SEED + count):
        clip = render_clip(puppet, size=size, frames=CLIP_FRAMES)
        source, driving = (int(frame) for frame in rng.choice(CLIP_FRAMES, 2, replace=False))
        frames = torch.from_numpy(clip.frames[[source, driving]]).permute(0, 3, 1, 2) / 255
        lost = disoccluded(clip, source, driving) & foreground(clip, driving)
        yield Truth(FramePair(frames[:1], frames[1:]), torch.from_numpy(lost)[None, None])


def _masks(
    motion: DenseMotion, mixing: PriorityCutConfig, size: int, random: torch.Generator
) -> dict[str, Tensor]:
    """Masks of one pair by name; "random k" cuts the same area of the same foreground."""
    occlusion, background = motion.occlusion_map, motion.mask[:, :1]
    shuffled = torch.rand(occlusion.shape, generator=random)
    masks = {"CutMix": priority_cut.cutmix_mask(torch.rand(1, 4, generator=random), (size, size))}
    for k in TOP_K:
        for name, order in (("priority", occlusion), ("random", shuffled)):
            masks[f"{name} {k}"] = priority_cut.priority_mask(
                order,
                background,
                top_k=k,
                size=(size, size),
                background_threshold=mixing.background_threshold,
            )
    return masks


def _print_hits(
    directory: Path,
    pairs: int,
    lost_share: float,
    cut_share: dict[str, float],
    precision: dict[str, float],
) -> None:
    print(f"{directory}: {pairs} pairs of unseen puppets; {100 * lost_share:.1f} % of a frame is")
    print("foreground that the source hides. Of the cut pixels, how many (%) are such:\n")
    print(
        "| k (% of the foreground) | cut (% of the frame) | PriorityCut | random foreground ",
        end="",
    )
    print("| CutMix | ratio to random | ratio to CutMix |")
    print("|---|---|---|---|---|---|---|")
    for k in TOP_K:
        ours, random, box = (precision[name] for name in (f"priority {k}", f"random {k}", "CutMix"))
        figures = [100 * share for share in (cut_share[f"priority {k}"], ours, random, box)]
        ratios = [ours / base if base else float("nan") for base in (random, box)]
        cells = [f"{x:.1f}" for x in figures] + [f"{x:.2f}" for x in ratios]
        print(f"| {k} | {' | '.join(cells)} |")


if __name__ == "__main__":
    app()
