"""Our normalisation and sampling beside torch's: error and cost on a CPU, in Markdown.

    python benchmarks/layers.py                # layers and whole training steps, one thread
    python benchmarks/layers.py --threads 2

Errors are ‖found − exact‖ / ‖exact‖ against float64. Seconds are CPU seconds with one thread, and
clock seconds with more. The ways alternate, so other work on the machine hardly changes their
ratios. Memory is allocated as in a worker of `prioritycut train`. Networks have random weights.
"""

import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from functools import partial
from unittest.mock import patch

import torch
import torch.nn.functional as F
from command_line import run_command
from torch import Tensor, nn
from whole_step import Run, make_run

from prioritycut_ray.config import Config, load_config
from prioritycut_ray.launch.worker import KEEP_FREED_MEMORY
from prioritycut_ray.models import blocks
from prioritycut_ray.models.animator import Animator, FramePair
from prioritycut_ray.models.batch_norm import BatchNorm2d
from prioritycut_ray.models.first_order import dense_motion
from prioritycut_ray.models.instance_norm import InstanceNorm2d
from prioritycut_ray.models.sampling import DeterministicSample
from prioritycut_ray.networks import build_animator

FORMATS = {"float32": torch.float32, "bfloat16": torch.bfloat16}
NORMS = ((2, 64, 256, 256), (2, 128, 128, 128), (2, 256, 64, 64), (8, 64, 128, 128))
LAYERS: dict[str, dict[str, Callable[[int], nn.Module]]] = {
    "batch norm": {"torch": nn.BatchNorm2d, "ours": BatchNorm2d},
    "instance norm": {"torch": partial(nn.InstanceNorm2d, affine=True), "ours": InstanceNorm2d},
}
SAMPLES = {
    "features: 256 channels, 64²": ((2, 256, 64, 64), (2, 64, 64, 2)),
    "source by 11 motions, 64²": ((2, 3, 64, 64), (2, 11 * 64, 64, 2)),
}


def main(threads: int = 1, turns: int = 9, steps: int = 3, size: int = 128, batch: int = 2) -> None:
    """Measure single layers, animators in training mode, and whole training steps."""
    if any(os.environ.get(name) != value for name, value in KEEP_FREED_MEMORY.items()):
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | KEEP_FREED_MEMORY)
    torch.set_num_threads(threads)
    print(f"{threads} thread(s), best of {turns} turns (steps: {steps}).\n")
    _norms(threads, turns)
    _all_norms(threads, turns, size, batch)
    _animators()
    _samples(threads, turns)
    _steps(threads, steps, size, batch)


def _norms(threads: int, turns: int) -> None:
    titles = ("torch (ms)", "ours (ms)", "ours / torch", "torch: error", "ours: error")
    for kind, builders in LAYERS.items():
        _title(kind, "format", *titles)
        for shape in NORMS:
            for name, dtype in FORMATS.items():
                x, gradient = (_random(shape, dtype) for _ in range(2))
                layers = {way: build(shape[1]) for way, build in builders.items()}
                exact, _ = _pass(deepcopy(layers["torch"]).double(), x.double(), gradient.double())
                errors = [_error(_pass(layer, x, gradient)[0], exact) for layer in layers.values()]
                ways = {way: partial(_pass, layer, x, gradient) for way, layer in layers.items()}
                _row(_shape(shape), name, *_compared(ways, threads, turns), *map(_power, errors))


def _all_norms(threads: int, turns: int, size: int, batch: int) -> None:
    """All batch norms of one forward and backward pass of the animator, each in its own shape."""
    title = f"all batch norms of the step below, {size}², batch {batch}"
    _title(title, "torch (ms)", "ours (ms)", "ours / torch")
    shapes: list[torch.Size] = []
    animator = build_animator(_config("float32", size, batch).model).train()
    for layer in animator.modules():
        if isinstance(layer, BatchNorm2d):
            layer.register_forward_hook(lambda _, inputs, out: shapes.append(out.shape))
    frames = torch.rand(2, batch, 3, size, size)
    with torch.no_grad():
        animator(FramePair(*frames))
        animator.detect(frames[0])  # the transformed frame
    for name, dtype in FORMATS.items():
        total = {"torch": 0.0, "ours": 0.0}
        for shape in shapes:
            x, gradient = (_random(tuple(shape), dtype) for _ in range(2))
            layers = {"torch": nn.BatchNorm2d(shape[1]), "ours": BatchNorm2d(shape[1])}
            ways = {way: partial(_pass, layer, x, gradient) for way, layer in layers.items()}
            for way, seconds in _timed(ways, threads, turns).items():
                total[way] += seconds
        milliseconds = (f"{seconds * 1e3:.0f}" for seconds in total.values())
        _row(f"{len(shapes)}, {name}", *milliseconds, f"{total['ours'] / total['torch']:.2f}")


def _animators() -> None:
    _title("animator in training mode, float32", "batch", "torch: error", "ours: error")
    for size, batch in ((128, 2), (256, 2)):
        narrow = [f"data.size={size}", "model.detector.num_blocks=3"]
        config = load_config("quickstart", [*narrow, "model.dense_motion.num_blocks=3"])
        torch.manual_seed(0)
        animator, frames = build_animator(config.model), torch.rand(2, batch, 3, size, size)
        with _torch_norm():
            theirs = _prediction(animator, frames)
        ours = _prediction(animator, frames)
        with patch.object(Tensor, "float", Tensor.double):
            exact = _prediction(animator.double(), frames.double())
        _row(f"quickstart, {size}²", batch, *(_power(_error(way, exact)) for way in (theirs, ours)))


def _samples(threads: int, turns: int) -> None:
    _title("sampling", "torch (ms)", "deterministic (ms)", "deterministic / torch")
    for name, (of_image, of_grid) in SAMPLES.items():
        image = torch.rand(of_image).to(memory_format=torch.channels_last).requires_grad_()
        grid = (torch.rand(of_grid) * 2.2 - 1.1).requires_grad_()
        ways = {"torch": partial(_sample, F.grid_sample), "ours": partial(_sample, _deterministic)}
        calls = {way: partial(call, image, grid) for way, call in ways.items()}
        _row(name, *_compared(calls, threads, turns))


def _steps(threads: int, turns: int, size: int, batch: int) -> None:
    title = f"training step, {size}², batch {batch}, patch discriminator"
    _title(title, "torch (s)", "our batch norm / torch", "and deterministic sampling / torch")
    for precision in FORMATS:
        runs = {
            way: make_run("ours", _config(precision, size, batch))
            for way in ("torch", "norm", "both")
        }
        ways = {way: partial(_step, run, way) for way, run in runs.items()}
        seconds = _timed(ways, threads, turns)
        ratios = (f"{seconds[way] / seconds['torch']:.3f}" for way in ("norm", "both"))
        _row(precision, f"{seconds['torch']:.2f}", *ratios)


def _config(precision: str, size: int, batch: int) -> Config:
    words = [
        *(f"model.{name}.num_blocks=4" for name in ("detector", "dense_motion")),
        *(f"data.size={size}", "discriminator.kind=patch", "priority_cut=null"),
        *("loss.perceptual.weights=random", f"train.precision={precision}"),
        f"train.batch_size={batch}",
    ]
    return load_config("vox256", words)


def _step(run: Run, way: str) -> None:
    if way == "torch":
        with _torch_norm():
            run.step()
    elif way == "norm":
        run.step()
    else:
        with (
            patch.object(blocks, "grid_sample", _deterministic),
            patch.object(dense_motion, "grid_sample", _deterministic),
        ):
            run.step()


def _sample(sample: Callable[..., Tensor], image: Tensor, grid: Tensor) -> None:
    """Forward and backward."""
    sample(image, grid, align_corners=False).sum().backward()


def _deterministic(image: Tensor, grid: Tensor, *, align_corners: bool = False) -> Tensor:
    sampled: Tensor = DeterministicSample.apply(image, grid, "zeros")
    return sampled


@contextmanager
def _torch_norm() -> Iterator[None]:
    with patch.object(BatchNorm2d, "forward", nn.BatchNorm2d.forward):
        yield


def _pass(layer: nn.Module, x: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
    """Forward and backward."""
    x = x.detach().requires_grad_()
    out = layer(x)
    out.backward(gradient)
    assert x.grad is not None
    return out.detach(), x.grad


@torch.no_grad()
def _prediction(animator: Animator, frames: Tensor) -> Tensor:
    return deepcopy(animator).train()(FramePair(*frames))[0].prediction


def _random(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return (torch.randn(shape) + 0.5).to(dtype).to(memory_format=torch.channels_last)


def _error(found: Tensor, exact: Tensor) -> float:
    return float((found.double() - exact).norm() / exact.norm())


def _compared(
    ways: Mapping[str, Callable[[], object]], threads: int, turns: int
) -> tuple[str, str, str]:
    """Milliseconds of torch's and of our layer, and their ratio."""
    seconds = _timed(ways, threads, turns)
    theirs, ours = seconds["torch"], seconds["ours"]
    return f"{theirs * 1e3:.2f}", f"{ours * 1e3:.2f}", f"{ours / theirs:.2f}"


def _timed(ways: Mapping[str, Callable[[], object]], threads: int, turns: int) -> dict[str, float]:
    """Best seconds of each way, after a warm-up turn."""
    clock = time.process_time if threads == 1 else time.perf_counter
    times: dict[str, list[float]] = {way: [] for way in ways}
    for turn in range(turns + 1):
        for way, call in ways.items():
            before = clock()
            call()
            if turn > 0:
                times[way].append(clock() - before)
    return {way: min(values) for way, values in times.items()}


def _title(*cells: str) -> None:
    print(f"\n| {' | '.join(cells)} |\n{'|---' * len(cells)}|")


def _row(*cells: object) -> None:
    print(f"| {' | '.join(map(str, cells))} |", flush=True)


def _shape(shape: tuple[int, int, int, int]) -> str:
    return f"batch {shape[0]}, {shape[1]} channels, {shape[2]}²"


def _power(value: float) -> str:
    return f"{value:.1e}"


if __name__ == "__main__":
    run_command(main)
