"""Frames a second of animation, beside the reference's way of one frame at a time; in Markdown.

    python benchmarks/animate.py

Published sizes, random weights: they change no time. Network alone: no decoding, no encoding.
Seconds are CPU seconds of one process on a CPU, and time by the clock on a GPU.
"""

import time
from collections.abc import Callable
from copy import deepcopy

import torch
import typer
from reference_way import reference_layers
from torch import Tensor

from prioritycut_ray.config import ModelConfig
from prioritycut_ray.inference import animate, default_device, to_tensor
from prioritycut_ray.precision import autocast
from prioritycut_ray.state import build_animator
from prioritycut_ray.visualize import to_uint8

DEVICE = default_device()


def main(size: int = 256, frames: int = 16, turns: int = 2, threads: int = 1) -> None:
    """Animate the same frames in every way, in turns."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    animator = build_animator(ModelConfig()).to(DEVICE).eval()
    planes = deepcopy(animator).to(memory_format=torch.contiguous_format)
    source = torch.rand(1, 3, size, size, device=DEVICE)
    driving = torch.randint(0, 256, (frames, size, size, 3), dtype=torch.uint8).numpy()

    @torch.inference_mode()
    def one_by_one() -> Tensor:
        predictions = []
        with reference_layers():
            keypoints = planes.detector(source)
            for frame in driving:
                moved = planes.detector(to_tensor(frame[None], DEVICE))
                animation = planes.animate(source, keypoints, moved)
                predictions.append(to_uint8(animation.prediction))
        return torch.cat(predictions)

    def batched() -> Tensor:
        parts = animate(animator, source, iter(driving), relative=False, adapt_scale=False)
        return torch.cat([to_uint8(part.animation.prediction) for part in parts])

    def batched_bfloat16() -> Tensor:
        with autocast("bfloat16", DEVICE):
            return batched()

    calls: dict[str, Callable[[], Tensor]] = {
        "one by one, float32 (reference's way)": one_by_one,
        "in batches of 16, float32": batched,
        "in batches of 16, bfloat16": batched_bfloat16,
    }
    results, seconds = {}, dict.fromkeys(calls, float("inf"))
    for turn in range(turns + 1):
        for name, call in calls.items():
            before = _now()
            results[name] = call()
            if turn > 0:  # The first turn warms up.
                seconds[name] = min(seconds[name], _now() - before)
    baseline = next(iter(calls))
    print(f"Best of {turns}, {frames} frames of {size}x{size}, {DEVICE.type}, random weights.\n")
    print("| way | frames/s | speed-up | difference (mean, most; of 255) |\n|---|---|---|---|")
    for name in calls:
        difference = (results[name].int() - results[baseline].int()).abs()
        print(
            f"| {name} | {frames / seconds[name]:.2f} | {seconds[baseline] / seconds[name]:.2f} "
            f"| {difference.float().mean():.3f}, {difference.max()} |"
        )


def _now() -> float:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


if __name__ == "__main__":
    typer.run(main)
