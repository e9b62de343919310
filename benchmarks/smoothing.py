"""What `animate --smooth` does to the true flicker and to the error, on puppets; in Markdown.

    python benchmarks/smoothing.py runs/a runs/b ...

Puppets are moved as other puppets move, as in `prioritycut benchmark puppets`, by keypoints as they
are detected and by smoothed ones. Flicker is measured along the true motion. Differences are
paired by puppet, with 95 % intervals over puppets.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

from collections import defaultdict
from typing import Annotated

import torch
import typer
from command_line import run_command

from prioritycut_ray import Animator
from prioritycut_ray.evaluation.puppets import TRUE_FRAMES, Scene, scenes
from prioritycut_ray.inference.animate import animate, to_tensor
from prioritycut_ray.metrics.aggregate import (
    FrameScores,
    Tally,
    difference_over_clips,
    every_frame,
    mean_over_clips,
)
from prioritycut_ray.metrics.truth import warping_error

DETECTED = "as detected"
WINDOWS = {DETECTED: 0, "5 frames": 5, "9 frames": 9}
TASKS = ("absolute", "relative")
METRICS = ("flicker", "l1")

Tallies = dict[tuple[str, str, str], list[Tally]]
"""One tally for each puppet, by task, way and metric; of the true frames, there is only flicker."""


def main(
    models: Annotated[list[str], typer.Argument(help="Trained models.")],
    identities: Annotated[int, typer.Option(min=2, help="Number of puppets.")] = 20,
    frames: Annotated[int, typer.Option(min=9, help="Number of frames of each clip.")] = 32,
) -> None:
    """Print a row for each model, task, window and metric."""
    print(f"{identities} puppets, {frames} frames each\n")
    print("| model | motion | metric | true frames | as detected | smoothed | change |")
    print("|---|---|---|---|---|---|---|")
    for model in models:
        tallies = measure(Animator.from_pretrained(model), identities, frames)
        for task in TASKS:
            for way in list(WINDOWS)[1:]:
                for metric in METRICS:
                    _print_row(model, task, way, metric, tallies)


def measure(animator: Animator, identities: int, frames: int) -> Tallies:
    """Move all puppets in all ways."""
    tallies: Tallies = defaultdict(list)
    for number in range(identities):
        for task, scene in scenes(number, animator.config.data.size, frames):
            if task not in TASKS:
                continue
            true = to_tensor(scene.true, animator.device)
            tallies[task, TRUE_FRAMES, "flicker"].append(warping_error(true, scene.motion))
            for way, window in WINDOWS.items():
                for metric, tally in _scores(animator, scene, window).items():
                    tallies[task, way, metric].append(tally)
    return tallies


def _scores(animator: Animator, scene: Scene, window: int) -> FrameScores:
    """Move the scene's source, and compare with the true frames."""
    source = to_tensor(scene.source[None], animator.device)
    moved = animate(
        animator.network,
        source,
        scene.driving,
        relative=scene.relative,
        adapt_scale=False,
        smooth=window,
    )
    predicted = torch.cat([rendered.animation.prediction for rendered in moved])
    error = (predicted - to_tensor(scene.true, animator.device)).abs().mean((1, 2, 3))
    return {"flicker": warping_error(predicted, scene.motion), "l1": every_frame(error)}


def _print_row(model: str, task: str, way: str, metric: str, tallies: Tallies) -> None:
    columns = [tallies[task, each, metric] for each in (TRUE_FRAMES, DETECTED, way)]
    _, detected, smoothed = columns
    names = [str(number) for number in range(len(detected))]
    means = [
        f"{mean_over_clips(metric, each, names).value:.5f}" if each else "" for each in columns
    ]
    change = difference_over_clips(metric, [*zip(smoothed, detected, strict=True)], names)
    print(
        f"| {model} | {task} | {metric} | {means[0]} | {means[1]} | {way}: {means[2]} "
        f"| {change.value:+.5f} [{change.low:+.5f}, {change.high:+.5f}] |",
        flush=True,
    )


if __name__ == "__main__":
    run_command(main)
