"""The cost of PriorityCut, and which pixels it cuts, beside CutMix; in Markdown.

    python benchmarks/priority_cut.py cost              # time of mask + mix within a training step
    python benchmarks/priority_cut.py hits runs/NAME    # against the true occlusions of puppets

The perceptual network of ``cost`` has random weights, which do not affect the time.
"""

import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import typer
from torch import Tensor
from torch.nn.functional import interpolate

from prioritycut_ray import priority_cut
from prioritycut_ray.config import Config, PriorityCutConfig, parse_config
from prioritycut_ray.data.puppets import foreground, render_clip, truth_between
from prioritycut_ray.models.animator import Animation, FramePair
from prioritycut_ray.models.keypoints import Keypoints
from prioritycut_ray.networks import build_perceptual
from prioritycut_ray.runs.locate import find_checkpoint
from prioritycut_ray.training.checkpoint import load_animator
from prioritycut_ray.training.state import new_state
from prioritycut_ray.training.steps import (
    draw_mask,
    draw_randomness,
    micro_batches,
    training_step,
)
from prioritycut_ray.training.worker import Worker

CPU = torch.device("cpu")
FIRST_SEED = 1000  # The quickstart trains on much lower seeds.
CLIP_FRAMES = 32
PAIRS_PER_CLIP = 4
TOP_K = (5, 10, 20, 40)
MIXING = {
    "no mixing": None,
    "CutMix": {"mask": "cutmix", "mix_prob": 1},
    "PriorityCut": {"mask": "priority", "mix_prob": 1},
}

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.callback(invoke_without_command=True)
def main(context: typer.Context) -> None:
    """Measure the cost of PriorityCut and which pixels it cuts, beside CutMix."""
    if context.invoked_subcommand is None:
        cost()


@app.command()
def cost(steps: int = 3, batch: int = 1) -> None:
    """Time mask + mix against a whole training step at 256x256, published sizes, on the CPU."""
    configs = {name: _cost_config(mixing, batch) for name, mixing in MIXING.items()}
    mixes = {name: _mask_and_mix(config) for name, config in configs.items()}
    trains = _training_steps(configs)
    step_times = _interleaved(trains, steps)
    mix_times = _interleaved(mixes, 50)
    threads = torch.get_num_threads()
    print(f"Median of {steps} steps, batch {batch}, 256x256, CPU, {threads} thread(s).\n")
    print("| | whole step (CPU s) | of which mask + mix (CPU ms) | share (%) |")
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
    """What a mixing step adds to the networks: a 64x64 mask resized to 256x256, and one mix."""
    mixing, size, batch = config.priority_cut, config.data.size, config.train.batch_size
    side = int(size * config.model.dense_motion.scale_factor)
    logits = torch.randn(batch, config.model.num_keypoints + 1, side, side)
    real, fake = torch.rand(2, batch, 3, size, size)
    keypoints = Keypoints(torch.zeros(batch, config.model.num_keypoints, 2))
    animation = Animation(fake, logits[:, :1], logits.softmax(1)[:, :1], keypoints, keypoints)
    uniform = torch.rand(batch, 5)

    def call() -> None:
        if mixing is not None:
            priority_cut.mix(real, fake, draw_mask(animation, uniform, mixing))

    return call


def _training_steps(configs: dict[str, Config]) -> dict[str, Callable[[], None]]:
    """Whole training steps of the same networks, generator and discriminator, for each config."""
    config = next(iter(configs.values()))
    state, perceptual = new_state(config, CPU), build_perceptual(config)
    pair = FramePair(*torch.rand(2, config.train.batch_size, 3, config.data.size, config.data.size))
    parts = micro_batches(pair, draw_randomness(config, 0, Worker(0, 1, CPU)), 1)

    def step(config: Config) -> None:
        training_step(state, state.animator, state.discriminator, perceptual, parts, config)

    return {name: partial(step, config) for name, config in configs.items()}


def _interleaved(calls: dict[str, Callable[[], None]], repeats: int) -> dict[str, list[float]]:
    """CPU seconds of each call; the calls alternate, so other work hardly changes their ratios."""
    seconds = defaultdict(list)
    for turn in range(repeats + 1):
        for name, call in calls.items():
            start = time.process_time()
            call()
            if turn > 0:  # The first turn warms up.
                seconds[name].append(time.process_time() - start)
    return seconds


class TruePair(NamedTuple):
    """A pair of puppet frames, and the ground truth of the driving frame: bool [1, 1, H, W]."""

    pair: FramePair
    foreground: Tensor
    disoccluded: Tensor  # Shows a surface that the source frame hides.


@app.command()
def hits(run: Path, clips: int = 50, seed: int = 0) -> None:
    """Measure how many cut pixels show a surface that the source frame hides, for a trained run."""
    directory = find_checkpoint(run)
    animator, config = load_animator(directory, CPU)
    mixing = config.priority_cut or PriorityCutConfig()
    random = torch.Generator().manual_seed(seed)
    seen = defaultdict(list)
    for truth in puppet_pairs(clips, config.data.size, seed):
        with torch.inference_mode():
            animation = animator(truth.pair).animation
        ours = _foreground(animation, mixing)
        targets = {
            "dis-occluded and foreground as the method defines it (M_bg below the threshold)": (
                truth.disoccluded & ours
            ),
            "dis-occluded and on the puppet": truth.disoccluded & truth.foreground,
            "dis-occluded, of any kind": truth.disoccluded,
        }
        for name, mask in _masks(animation, mixing, random).items():
            seen[name].append(mask == 0)
        for name, target in targets.items():
            seen[name].append(target)
    shown = {name: torch.cat(masks) for name, masks in seen.items()}
    print(f"{directory}: {clips * PAIRS_PER_CLIP} frame pairs of {clips} unseen puppets.")
    for name in targets:
        _print_hits(name, shown)


def puppet_pairs(clips: int, size: int, seed: int) -> Iterator[TruePair]:
    """Random frame pairs of puppets that are in no training set."""
    rng = np.random.default_rng(seed)
    for puppet in range(FIRST_SEED, FIRST_SEED + clips):
        clip = render_clip(puppet, size=size, frames=CLIP_FRAMES)
        for _ in range(PAIRS_PER_CLIP):
            source, driving = (int(frame) for frame in rng.choice(CLIP_FRAMES, 2, replace=False))
            frames = torch.from_numpy(clip.frames[[source, driving]]).permute(0, 3, 1, 2) / 255
            truth = truth_between(clip, source, driving)
            shown = (foreground(clip, driving), truth.disoccluded)
            masks = (torch.from_numpy(mask)[None, None] for mask in shown)
            yield TruePair(FramePair(frames[:1], frames[1:]), *masks)


def _foreground(animation: Animation, mixing: PriorityCutConfig) -> Tensor:
    """The foreground that the mask chooses from (method §4, step 1), at image size."""
    below = animation.background_mask < mixing.background_threshold
    size = animation.prediction.shape[2:]
    return interpolate(below.float(), size=size, mode="nearest").bool()


def _masks(
    animation: Animation, mixing: PriorityCutConfig, random: torch.Generator
) -> dict[str, Tensor]:
    """Masks of one pair by name; "random k" cuts the same area of the same foreground."""
    occlusion, background = animation.occlusion_map, animation.background_mask
    shuffled = torch.rand(occlusion.shape, generator=random)
    size = tuple(animation.prediction.shape[2:])
    masks = {"CutMix": priority_cut.cutmix_mask(torch.rand(1, 4, generator=random), size)}
    for k in TOP_K:
        for name, order in (("priority", occlusion), ("random", shuffled)):
            masks[f"{name} {k}"] = priority_cut.priority_mask(
                order,
                background,
                top_k=k,
                size=size,
                background_threshold=mixing.background_threshold,
            )
    return masks


def _print_hits(target: str, shown: dict[str, Tensor]) -> None:
    """Print the share of each mask's cut pixels that belong to the target."""

    def precision(name: str) -> float:
        return (shown[name] & shown[target]).sum().item() / max(shown[name].sum().item(), 1)

    print(f"\nShare of cut pixels (%) that are {target}", end=" ")
    print(f"({100 * shown[target].double().mean().item():.1f} % of all pixels are):\n")
    print(
        "| k (% of foreground) | cut (% of frame) | PriorityCut | random foreground | CutMix",
        end="",
    )
    print(" | ratio to random | ratio to CutMix |")
    print("|---" * 7 + "|")
    box = precision("CutMix")
    for k in TOP_K:
        ours, random = (precision(f"{name} {k}") for name in ("priority", "random"))
        cut = shown[f"priority {k}"].double().mean().item()
        ratios = [ours / base if base else float("nan") for base in (random, box)]
        cells = [f"{100 * x:.1f}" for x in (cut, ours, random, box)] + [f"{x:.2f}" for x in ratios]
        print(f"| {k} | {' | '.join(cells)} |")


if __name__ == "__main__":
    app()
