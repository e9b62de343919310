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

from prioritycut_ray import Animator
from prioritycut_ray.evaluation.puppets import Scene, scenes
from prioritycut_ray.inference.animate import animate, to_tensor
from prioritycut_ray.metrics.aggregate import (
    FrameScores,
    Tally,
    difference_over_clips,
    every_frame,
    mean_over_clips,
)
from prioritycut_ray.metrics.truth import warping_error

WINDOWS = (5, 9)
TASKS = ("absolute", "relative")
METRICS = ("flicker", "l1")


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
        animator = Animator.from_pretrained(model)
        size = animator.config.data.size
        tallies: dict[tuple[str, int, str], list[Tally]] = defaultdict(list)
        for number in range(identities):
            for task, scene in scenes(number, size, frames):
                if task not in TASKS:
                    continue
                true = to_tensor(scene.true, animator.device)
                tallies[task, -1, "flicker"].append(warping_error(true, scene.motion))
                for window in (0, *WINDOWS):
                    for metric, tally in _scores(animator, scene, window).items():
                        tallies[task, window, metric].append(tally)
        for task in TASKS:
            for window in WINDOWS:
                for metric in METRICS:
                    _print_row(model, task, window, metric, tallies)


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


def _print_row(
    model: str,
    task: str,
    window: int,
    metric: str,
    tallies: dict[tuple[str, int, str], list[Tally]],
) -> None:
    detected, smoothed = tallies[task, 0, metric], tallies[task, window, metric]
    true = tallies[task, -1, metric]
    names = [str(number) for number in range(len(detected))]
    columns = (true, detected, smoothed)
    means = [
        f"{mean_over_clips(metric, each, names).value:.5f}" if each else "" for each in columns
    ]
    change = difference_over_clips(metric, [*zip(smoothed, detected, strict=True)], names)
    print(
        f"| {model} | {task} | {metric} | {means[0]} | {means[1]} | {window} frames: {means[2]} "
        f"| {change.value:+.5f} [{change.low:+.5f}, {change.high:+.5f}] |",
        flush=True,
    )


if __name__ == "__main__":
    typer.run(main)
