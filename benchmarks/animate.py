"""Animation in frames per second, beside the reference's frame-by-frame way; in Markdown.

    python benchmarks/animate.py            # the network alone
    python benchmarks/animate.py command    # with decoding and encoding, overlapped and sequential

Published sizes; random weights, which do not affect the time. The network alone is timed in CPU
seconds of one process on a CPU and by the clock on a GPU; the command is timed by the clock.
"""

import time
from collections.abc import Callable
from copy import deepcopy
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest.mock import patch

import torch
import typer
from reference_way import reference_layers
from torch import Tensor

from prioritycut_ray.config import FirstOrderConfig, load_config
from prioritycut_ray.data.puppets import render_clip
from prioritycut_ray.inference import scene as scene_module
from prioritycut_ray.inference.animate import animate, default_device, to_tensor
from prioritycut_ray.inference.footage import survey
from prioritycut_ray.inference.output import write_animation
from prioritycut_ray.inference.pretrained import Animator
from prioritycut_ray.inference.scene import Motion, set_scene
from prioritycut_ray.models.animator import EncodedSource
from prioritycut_ray.networks import build_animator
from prioritycut_ray.precision import Precision
from prioritycut_ray.prefetch import prefetch
from prioritycut_ray.video.encoding import write_video
from prioritycut_ray.visualize import to_uint8

DEVICE = default_device()

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.callback(invoke_without_command=True)
def main(context: typer.Context) -> None:
    """Measure animation in frames per second."""
    if context.invoked_subcommand is None:
        network()


@app.command()
def network(size: int = 256, frames: int = 16, turns: int = 2, threads: int = 1) -> None:
    """Animate the same frames in each way; the ways alternate."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    animator = build_animator(FirstOrderConfig()).to(DEVICE).eval()
    contiguous = deepcopy(animator).to(memory_format=torch.contiguous_format)
    source = torch.rand(1, 3, size, size, device=DEVICE)
    driving = torch.randint(0, 256, (frames, size, size, 3), dtype=torch.uint8).numpy()

    @torch.inference_mode()
    def one_by_one() -> Tensor:
        predictions = []
        with reference_layers():
            keypoints = contiguous.detector(source)
            for frame in driving:
                moved = contiguous.detector(to_tensor(frame[None], DEVICE))
                encoded = EncodedSource(source, keypoints, (contiguous.generator.encode(source),))
                animation = contiguous.render(encoded, moved)
                predictions.append(to_uint8(animation.prediction))
        return torch.cat(predictions)

    def batched(precision: Precision) -> Tensor:
        parts = animate(
            animator,
            source,
            iter(driving),
            relative=False,
            adapt_scale=False,
            precision=precision,
        )
        return torch.cat([to_uint8(part.animation.prediction) for part in parts])

    calls: dict[str, Callable[[], Tensor]] = {
        "one by one, float32 (reference's way)": one_by_one,
        "in batches of 16, float32": partial(batched, "float32"),
        "in batches of 16, bfloat16": partial(batched, "bfloat16"),
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
    print("| way | frames/s | speed-up | difference (mean, maximum; of 255) |\n|---|---|---|---|")
    for name in calls:
        difference = (results[name].int() - results[baseline].int()).abs()
        print(
            f"| {name} | {frames / seconds[name]:.2f} | {seconds[baseline] / seconds[name]:.2f} "
            f"| {difference.float().mean():.3f}, {difference.max()} |"
        )


@app.command()
def command(
    config: str = "vox256", side: int = 720, frames: int = 48, turns: int = 2, threads: int = 1
) -> None:
    """Decode, animate and encode a synthetic video, sequentially and overlapped."""
    torch.set_num_threads(threads)
    options = load_config(config, [])
    animator = Animator(build_animator(options.model), options, DEVICE)
    ways = {"sequential": lambda items, count=1: items, "overlapped": prefetch}
    seconds = dict.fromkeys(ways, float("inf"))
    with TemporaryDirectory() as name:
        folder = Path(name)
        video = folder / "driving.mp4"
        write_video(video, render_clip(0, size=side, frames=frames).frames, 25.0)
        footage = survey(video)
        scene = set_scene(video, video, ("auto", "auto"), animator.size, footage)
        for _ in range(turns):
            for way, overlap in ways.items():
                before = time.perf_counter()
                with patch.object(scene_module, "prefetch", overlap):
                    rendered = scene_module.render_scene(animator, scene, Motion())
                    panels = scene_module.panel_frames(rendered, panel=True)
                    write_animation(folder / "out.mp4", panels, footage.timing, footage.fps, None)
                seconds[way] = min(seconds[way], time.perf_counter() - before)
    print(
        f"Best of {turns}, {config}, random weights, {frames} frames of a synthetic {side}x{side} "
        f"video to a panel of three, {DEVICE.type}, {threads} thread(s), by the clock.\n"
    )
    print("| way | frames/s | speed-up |\n|---|---|---|")
    baseline = seconds["sequential"]
    for way, taken in seconds.items():
        print(f"| {way} | {frames / taken:.2f} | {baseline / taken:.2f} |")


def _now() -> float:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


if __name__ == "__main__":
    app()
