"""The cost of a training step by size, batch, precision and compilation; in Markdown.

    python benchmarks/step.py                        # 128x128 and 256x256, batch 2
    python benchmarks/step.py step --kind patch      # the discriminator of First Order Motion
    python benchmarks/step.py step --family thin_plate --kind none   # as the reference trains it
    python benchmarks/step.py noise                  # losses over 200 steps, float32 and bfloat16

All ways do the same work on the same frames and alternate, so other work on the machine hardly
changes their ratios. On a CPU, seconds are CPU seconds of one process, with clock seconds beside
them; on a GPU they are clock seconds. The baseline "reference's way" is described in
reference_way.py. It allocates with glibc's defaults; our ways allocate as in a worker of
`prioritycut train` (launch.worker.KEEP_FREED_MEMORY). The perceptual network is VGG-19 with random
weights, which do not affect the time.
"""

import ctypes
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Annotated, NamedTuple

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
import typer
from device_rates import DEVICE, conv_rates, gemm_rate, now
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from whole_step import REFERENCE, Run, make_run

from prioritycut_ray.config import Config, load_config, parse_config
from prioritycut_ray.models.animator import FramePair
from prioritycut_ray.networks import build_perceptual
from prioritycut_ray.training.state import new_state
from prioritycut_ray.training.steps import draw_randomness, micro_batches, training_step
from prioritycut_ray.training.worker import Worker

WAYS = (REFERENCE, "float32", "bfloat16")
PHASES = (
    "data",
    "animator forward",
    "VGG forward",
    "generator backward",
    "PriorityCut",
    "discriminator forward",
    "discriminator backward",
    "optimiser",
    "rest",
)
ENDED = {
    "generator step": "data",
    "discriminator step": "generator backward",
    "update": "discriminator backward",
}
"""The phase that ends when a phase of training_step begins."""

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4
"""Parameters of glibc's mallopt, from malloc.h."""

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


class Point(NamedTuple):
    """What is measured in several ways.

    Attributes:
        size: side of the frames.
        batch: number of frame pairs.
        family: of the animator.
        kind: of the discriminator.
    """

    size: int
    batch: int
    family: str
    kind: str


class Cost(NamedTuple):
    """The cost of one way at one point."""

    point: Point
    way: str
    seconds: float
    clock: float
    flops: int
    memory: int
    phases: dict[str, float]
    loss: float


@app.callback(invoke_without_command=True)
def main(context: typer.Context) -> None:
    """Measure the cost of a training step."""
    if context.invoked_subcommand is None:
        step()


@app.command()
def step(
    sizes: str = "128,256",
    batches: str = "2",
    ways: str = ",".join(WAYS),
    family: Annotated[str, typer.Option(help="first_order or thin_plate.")] = "first_order",
    kind: Annotated[str, typer.Option(help="Discriminator: unet, patch or none.")] = "unet",
    turns: int = 2,
    threads: int = 1,
    compiled: Annotated[bool, typer.Option(help="Also measure train.compile.")] = False,
    brief: Annotated[bool, typer.Option(help="No phases, FLOPs and memory.")] = False,
    picture: Path = Path("step.png"),
) -> None:
    """Time whole training steps; print a table and plot the phases of each way."""
    torch.set_num_threads(threads)
    names = [*ways.split(","), *(["bfloat16 compiled"] if compiled else [])]
    ceilings = {name: _ceilings(name) for name in names}
    costs: list[Cost] = []
    for size in map(int, sizes.split(",")):
        for batch in map(int, batches.split(",")):
            costs += _costs(names, Point(size, batch, family, kind), turns, brief=brief)
    _print_table(costs, ceilings, threads, turns)
    if not brief:
        _draw(costs, picture)
        print(f"\nTime by phase: {picture}")


@app.command()
def noise(steps: int = 200, seed: int = 0) -> None:
    """Print the mean losses of the last quarter of a training by precision, and of another seed."""
    torch.set_num_threads(1)
    rows = {
        "float32": _train("float32", steps, seed),
        "bfloat16": _train("bfloat16", steps, seed),
        "float32, another seed": _train("float32", steps, seed + 1),
    }
    names = list(rows["float32"])
    print(f"{steps} steps of the networks of `quickstart` on random smooth frames, batch 8.\n")
    print(f"| | {' | '.join(names)} |\n|---{'|---' * len(names)}|")
    for way, means in rows.items():
        print(f"| {way} | {' | '.join(f'{means[name]:.3f}' for name in names)} |")


@app.command(hidden=True)
def memory(way: str, size: int, batch: int, family: str, kind: str) -> None:
    """Print the peak memory of one way; runs in its own process."""
    torch.set_num_threads(1)
    run = _run(way, Point(size, batch, family, kind))
    run.step()
    if DEVICE.type == "cuda":
        torch.cuda.reset_peak_memory_stats()  # Discard that of cuDNN's search in the first step.
        run.step()
        print(torch.cuda.max_memory_allocated())
        return
    # Not getrusage: its figure starts with that of the parent process.
    status = Path("/proc/self/status").read_text()
    print(int(status.split("VmHWM:")[1].split()[0]) * 1024)


def _config(way: str, point: Point) -> Config:
    size = point.size
    hourglass = {"num_blocks": min(5, size.bit_length() - 4)}
    first_order = {"detector": hourglass, "dense_motion": hourglass}
    thin_plate = {"family": "thin_plate", "dense_motion": hourglass}
    clipped = {"weight_decay": 1e-4, "max_grad_norm": 10, "grad_norm": "maximum"}
    tree = {
        "data": {"size": size},
        "model": thin_plate if point.family == "thin_plate" else first_order,
        "discriminator": {"kind": point.kind},
        "priority_cut": {"mix_prob": 1} if point.kind == "unet" else None,
        "loss": {"perceptual": {"weights": "random", "scales": _scales(size)}},
        "optim": clipped if point.family == "thin_plate" else {},
        "train": {
            "batch_size": point.batch,
            "precision": "bfloat16" if way.startswith("bfloat16") else "float32",
            "compile": way.endswith("compiled"),
        },
    }
    return parse_config(tree, "step")


def _scales(size: int) -> list[float]:
    return [scale for scale in (1.0, 0.5, 0.25, 0.125) if size * scale >= 16]


def _run(way: str, point: Point) -> Run:
    """Networks and frames of one way."""
    return make_run(way, _config(way, point))


def _costs(names: list[str], point: Point, turns: int, *, brief: bool) -> list[Cost]:
    """Time all ways at one point; they alternate, after one warm-up step each."""
    runs = {name: _run(name, point) for name in names}
    first = {name: run.step() for name, run in runs.items()}
    seconds, clock = defaultdict(list), defaultdict(list)
    for _ in range(turns):
        for name, run in runs.items():
            with _allocating_as(name):
                run.step()  # Touches the memory and the caches that it needs.
                before = now(), time.perf_counter()
                run.step()
                after = now(), time.perf_counter()
            seconds[name].append(after[0] - before[0])
            clock[name].append(after[1] - before[1])
    costs = []
    for name, run in runs.items():
        only_timed = brief or name.endswith("compiled")
        with _allocating_as(name):
            phases = {} if name == REFERENCE or only_timed else _phases(run)
        total = sum(float(v) for key, v in first[name].items() if not key.endswith("total"))
        flops = 0 if only_timed else _flops(run)
        median = statistics.median(seconds[name])
        by_clock = statistics.median(clock[name])
        peak = 0 if only_timed else _peak_memory(name, point)
        costs.append(Cost(point, name, median, by_clock, flops, peak, phases, total))
    return costs


@contextmanager
def _allocating_as(way: str) -> Iterator[None]:
    """Allocate with glibc's defaults (reference) or as our workers do, within this context."""
    libc = ctypes.CDLL(None)
    if way != REFERENCE and hasattr(libc, "gnu_get_libc_version"):
        libc.mallopt(_M_MMAP_MAX, 0)
        libc.mallopt(_M_TRIM_THRESHOLD, -1)
    try:
        yield
    finally:
        if hasattr(libc, "gnu_get_libc_version"):
            # The values that the defaults reach once the first large tensors are freed.
            libc.mallopt(_M_MMAP_MAX, 65536)
            libc.mallopt(_M_TRIM_THRESHOLD, 64 << 20)
            libc.malloc_trim(0)


def _flops(run: Run) -> int:
    with FlopCounterMode(display=False) as counter:
        run.step()
    return counter.get_total_flops()


def _peak_memory(way: str, point: Point) -> int:
    """Peak bytes of a step, measured in its own process."""
    command = [sys.executable, __file__, "memory", way, *map(str, point)]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return int(output)


def _ceilings(way: str) -> tuple[float, float]:
    """FLOP/s of a large matrix product and a 3x3 convolution (forward) in the format of a way."""
    dtype = torch.bfloat16 if way.startswith("bfloat16") else torch.float32
    # float32 convolutions use TF32 where the hardware has it.
    return gemm_rate(2048, dtype, "tf32"), conv_rates(2, 256, 64, dtype)[0]


def _phases(run: Run) -> dict[str, float]:
    """Seconds of a step by phase: each phase gets the time since the previous mark."""
    marks = [("start", now())]
    hooks = []

    def mark(phase: str) -> None:
        marks.append((phase, now()))

    def marking(phase: str) -> Callable[..., None]:
        return lambda *_: mark(phase)

    def before_discriminator(module: nn.Module, *_: object) -> None:
        # In eval mode, in the generator step: the real frame's features. Otherwise: mask and mix.
        mark("PriorityCut" if module.training else "discriminator forward")

    def watch(module: nn.Module, phase: str, before: Callable[..., None]) -> None:
        hooks.append(module.register_forward_pre_hook(before))
        hooks.append(module.register_forward_hook(marking(phase)))

    watch(run.state.animator, "animator forward", marking("rest"))
    watch(run.perceptual, "VGG forward", marking("rest"))
    ended = ENDED
    if run.state.discriminator is None:
        ended = ENDED | {"update": "generator backward"}
    else:
        watch(run.state.discriminator, "discriminator forward", before_discriminator)
    run.step(on_phase=lambda phase: mark(ended[phase]))
    mark("optimiser")
    for hook in hooks:
        hook.remove()
    phases: dict[str, float] = defaultdict(float)
    for (_, before), (phase, after) in pairwise(marks):
        phases[phase] += after - before
    return phases


def _print_table(
    costs: list[Cost],
    ceilings: dict[str, tuple[float, float]],
    threads: int,
    turns: int,
) -> None:
    device = torch.cuda.get_device_name() if DEVICE.type == "cuda" else f"CPU, {threads} thread(s)"
    networks = f"{costs[0].point.family}, discriminator: {costs[0].point.kind}"
    print(f"Median of {turns} steps, ways alternating, {networks}, {device}.\n")
    titles = [
        *("size", "batch", "way", "s/step", "by the clock", "speed-up", "by the clock", "pairs/s"),
        *("TFLOP/step", "GFLOP/s", "of GEMM (%)", "of 3x3 conv (%)", "peak memory (GB)"),
        "first loss",
    ]
    print(f"| {' | '.join(titles)} |\n{'|---' * len(titles)}|")
    base: dict[Point, Cost] = {}
    for cost in costs:
        baseline = base.setdefault(cost.point, cost)
        speed = cost.flops / cost.seconds
        shares = [100 * speed / ceiling for ceiling in ceilings[cost.way]]
        counted = [
            f"{cost.flops / 1e12:.2f}",
            f"{speed / 1e9:.0f}",
            *(f"{share:.0f}" for share in shares),
            f"{cost.memory / 1e9:.1f}",
        ]
        cells = [
            f"{cost.seconds:.2f}",
            f"{cost.clock:.2f}",
            f"{baseline.seconds / cost.seconds:.2f}",
            f"{baseline.clock / cost.clock:.2f}",
            f"{cost.point.batch / cost.clock:.2f}",
            # Not for compiled networks: torch's counter cannot see inside them.
            *(counted if cost.flops else ["–"] * len(counted)),
            f"{cost.loss:.3f}",
        ]
        print(f"| {cost.point.size} | {cost.point.batch} | {cost.way} | {' | '.join(cells)} |")
    print("\nCeilings (GFLOP/s; GEMM, 3x3 convolution):", end=" ")
    print("; ".join(f"{way} {a / 1e9:.0f}, {b / 1e9:.0f}" for way, (a, b) in ceilings.items()))
    for cost in costs:
        if cost.phases:
            total = sum(cost.phases.values())
            parts = ", ".join(
                f"{name} {100 * cost.phases[name] / total:.1f}"
                for name in PHASES
                if name in cost.phases
            )
            print(f"\n{cost.point.size} x {cost.point.batch} {cost.way}, % of a step: {parts}")


def _draw(costs: list[Cost], picture: Path) -> None:
    """Plot a stacked bar for each way with known phases, and a plain one for the others."""
    figure, axes = plt.subplots(figsize=(9, 1.5 + 0.5 * len(costs)), layout="constrained")
    labels = [f"{cost.point.size} x {cost.point.batch}, {cost.way}" for cost in costs]
    left = [0.0] * len(costs)
    colours = plt.get_cmap("tab10").colors
    for phase, colour in zip((*PHASES, "whole step"), (*colours[:9], "lightgray"), strict=True):
        whole = phase == "whole step"
        widths = [
            (cost.seconds if whole and not cost.phases else cost.phases.get(phase, 0.0))
            for cost in costs
        ]
        axes.barh(labels, widths, left=left, label=phase, color=colour)
        left = [a + b for a, b in zip(left, widths, strict=True)]
    axes.invert_yaxis()
    axes.set_xlabel("seconds per step (CPU: of one process)")
    axes.legend(fontsize="small", ncols=2)
    figure.savefig(picture, dpi=120)


def _train(precision: str, steps: int, seed: int) -> dict[str, float]:
    """Mean losses over the last quarter of the steps, each on new random smooth frames."""
    words = [f"train.precision={precision}", f"train.seed={seed}", "priority_cut.warmup_samples=0"]
    config = load_config("quickstart", words)
    state, perceptual = new_state(config, DEVICE), build_perceptual(config, DEVICE)
    state.animator.train()
    state.discriminator.train()
    sums: dict[str, float] = defaultdict(float)
    counts: dict[str, int] = defaultdict(int)
    for index in range(steps):
        generator = torch.Generator().manual_seed(index)
        coarse = torch.rand(8, 3, 8, 8, generator=generator)
        moved = coarse.roll((index % 3 - 1, index % 2), dims=(2, 3))
        source, driving = (
            F.interpolate(x, size=config.data.size, mode="bicubic").clamp(0, 1).to(DEVICE)
            for x in (coarse, moved)
        )
        randomness = draw_randomness(config, index, Worker(0, 1, DEVICE))
        parts = micro_batches(FramePair(source, driving), randomness, 1)
        networks = state.animator, state.discriminator
        losses = training_step(state, *networks, perceptual, parts, config).losses
        if index >= 3 * steps // 4:
            for name, value in losses.items():
                sums[name] += value.item()
                counts[name] += 1
    return {name: sums[name] / counts[name] for name in sums if name.startswith("generator")}


if __name__ == "__main__":
    app()
