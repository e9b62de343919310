"""The stages of gpu.py: each answers one question about a GPU and prints its answer.

Weights are random and frames are noise or synthetic puppets; neither affects the time. In the
rehearsal (`Setup.dry`) everything is small and runs on the CPU; the figures then mean nothing.
"""

import gc
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from device_rates import (
    DEVICE,
    FORMATS,
    ON_GPU,
    conv_rates,
    gemm_rate,
    now,
    rate,
    transfer_rates,
)
from puppet_shards import pack_puppets
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.profiler import ProfilerActivity
from torch.utils.flop_counter import FlopCounterMode
from whole_step import REFERENCE, Run, make_run

from prioritycut_ray.config import Config, load_config
from prioritycut_ray.data.index import read_index
from prioritycut_ray.data.stream import FramePairs, batches
from prioritycut_ray.training.checkpoint import load_checkpoint, save_checkpoint
from prioritycut_ray.training.worker import DETERMINISTIC_CUBLAS, Worker

ROOT = Path(__file__).parents[1]


class Setup(NamedTuple):
    """The arguments of a stage.

    Attributes:
        out: folder for files other than the text.
        data: folder of 256x256 shards; if empty, stages that need one pack puppets.
        dry: rehearse on a CPU, with the networks of `quickstart`.
        config: the configuration whose networks are measured.
    """

    out: Path
    data: str
    dry: bool
    config: str = "vox256"


class Stage(NamedTuple):
    """A stage and its time limit in seconds."""

    run: Callable[[Setup], None]
    seconds: float


class Timing(NamedTuple):
    """Measurements of several consecutive steps.

    Attributes:
        seconds: of a step.
        host: seconds until the host has issued a step; if that takes as long as the step itself,
            the GPU waits for the host.
        first: seconds of the first step, with cuDNN's search or compilation.
        memory: peak bytes of a later step.
        loss: of the first step, the sum of all terms.
    """

    seconds: float
    host: float
    first: float
    memory: int
    loss: float


# ---------------------------------------------------------------------------------------------
# What the device can do
# ---------------------------------------------------------------------------------------------


def ceilings(setup: Setup) -> None:
    """The speed of large operations on the device: the ceiling for all later figures."""
    for name, dtype, products in FORMATS:
        side = 256 if setup.dry else 8192
        print(f"GEMM {side}, {name}: {gemm_rate(side, dtype, products) / 1e12:.1f} TFLOP/s")
    batch = 1 if setup.dry else 32
    shapes = ((64, 64),) if setup.dry else ((64, 256), (128, 128), (256, 64), (512, 32))
    for channels, side in shapes:
        for dtype in (torch.bfloat16, torch.float32):
            forward, backward = conv_rates(batch, channels, side, dtype)
            name = "TF32" if dtype is torch.float32 else "bfloat16"
            print(
                f"3x3 convolution, {channels} channels of {side}x{side}, batch {batch}, {name}: "
                f"forward {forward / 1e12:.1f}, backward {backward / 1e12:.1f} TFLOP/s"
            )
    size = 1 << (22 if setup.dry else 31)
    source = torch.empty(size, dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    print(f"copy on the device: {rate(lambda: target.copy_(source), 2 * size) / 1e12:.2f} TB/s")
    for name, speed in transfer_rates(1 << (20 if setup.dry else 28)).items():
        print(f"copy from {name} memory of the host: {speed / 1e9:.1f} GB/s")


def tests(setup: Setup) -> None:
    """The tests that need a GPU; in the rehearsal, those that can run on a CPU."""
    # Without the project's settings: a bare machine's libraries have other warnings.
    options = ["-q", "-p", "no:cacheprovider", "-c", os.devnull, f"--rootdir={ROOT}"]
    environ = os.environ | ({"PRIORITYCUT_REHEARSE_GPU_TESTS": "1"} if setup.dry else {})
    command = [sys.executable, "-m", "pytest", str(ROOT / "tests/gpu"), *options]
    sys.exit(subprocess.run(command, cwd=ROOT, env=environ, check=False).returncode)


# ---------------------------------------------------------------------------------------------
# Training steps
# ---------------------------------------------------------------------------------------------


def steps(setup: Setup) -> None:
    """Whole training steps with either discriminator at three batch sizes, beside the reference."""
    side = 256 if setup.dry else 8192
    ceiling = {name: gemm_rate(side, dtype, products) for name, dtype, products in FORMATS}
    print(
        "| discriminator | batch | way | s/step | speed-up | host s/step | pairs/s | TFLOP/s "
        "| of GEMM (%) | peak GB | first step (s) | first loss |\n" + "|---" * 12 + "|"
    )
    for batch in (2,) if setup.dry else (16, 8, 32):
        for kind in ("unet", "patch"):
            baseline = None
            for way in (REFERENCE, "float32", "bfloat16"):
                row = f"| {kind} | {batch} | {way} |"
                try:
                    flops, timing = measure_way(setup, kind, batch, way)
                except torch.OutOfMemoryError:
                    print(f"{row} out of memory |" + " |" * 8)
                    continue
                baseline = baseline or timing.seconds
                speed = flops / timing.seconds
                of_gemm = 100 * speed / ceiling["bfloat16" if way == "bfloat16" else "TF32"]
                print(
                    f"{row} {timing.seconds:.4f} | {baseline / timing.seconds:.2f} "
                    f"| {timing.host:.4f} | {batch / timing.seconds:.1f} | {speed / 1e12:.1f} "
                    f"| {of_gemm:.0f} | {timing.memory / 1e9:.1f} | {timing.first:.1f} "
                    f"| {timing.loss:.3f} |"
                )


def measure_way(setup: Setup, kind: str, batch: int, way: str) -> tuple[int, Timing]:
    """FLOPs of a step and its timing, with nothing else in the device's memory."""
    gc.collect()
    if ON_GPU:
        torch.cuda.empty_cache()
    run = make_run(way, config_of(setup, kind, batch, precision_of(way)))
    timing = time_steps(setup, run)
    with FlopCounterMode(display=False) as counter:
        run.step()
    return counter.get_total_flops(), timing


def precision_of(way: str) -> str:
    """The precision of a way."""
    return "bfloat16" if way == "bfloat16" else "float32"


def config_of(
    setup: Setup, kind: str = "unet", batch: int = 16, precision: str = "bfloat16", *words: str
) -> Config:
    """The published sizes, mixing in every step; in the rehearsal, those of `quickstart`."""
    mixing = ["priority_cut.mix_prob=1", "priority_cut.warmup_samples=0"]
    return load_config(
        "quickstart" if setup.dry else setup.config,
        [
            f"train.batch_size={batch}",
            f"train.precision={precision}",
            "loss.perceptual.weights=random",
            f"discriminator.kind={kind}",
            *(["priority_cut=null"] if kind == "patch" else mixing),
            *words,
        ],
    )


def time_steps(setup: Setup, run: Run, count: int = 10) -> Timing:
    """Run a first step, some warm-up steps, and the timed steps."""
    count = 1 if setup.dry else count
    before = now()
    losses = run.step()
    first = now() - before
    for _ in range(count // 3):
        run.step()
    now()
    if ON_GPU:
        torch.cuda.reset_peak_memory_stats()
    before = now()
    began = time.perf_counter()
    for _ in range(count):
        run.step()
    issued = time.perf_counter() - began
    seconds = now() - before
    return Timing(
        seconds / count,
        issued / count,
        first,
        torch.cuda.max_memory_allocated() if ON_GPU else 0,
        sum(float(loss) for name, loss in losses.items() if not name.endswith("total")),
    )


def profile(setup: Setup) -> None:
    """How much of a step the GPU is busy, and with which kernels."""
    run = make_run("bfloat16", config_of(setup, batch=2 if setup.dry else 16))
    taken = 1 if setup.dry else 4
    for _ in range(taken):
        run.step()
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if ON_GPU else [])]
    now()
    before = time.perf_counter()
    with torch.profiler.profile(activities=activities) as recorded:
        for _ in range(taken):
            run.step()
        now()
    clock = time.perf_counter() - before
    kernels = [event for event in recorded.events() if event.device_type.name == "CUDA"]
    busy = covered((event.time_range.start, event.time_range.end) for event in kernels) / 1e6
    print(
        f"{len(kernels) / taken:.0f} kernels and copies per step; the GPU is busy for "
        f"{busy / taken:.4f} of {clock / taken:.4f} s, {100 * busy / clock:.0f} % (while profiled)"
    )
    averages = recorded.key_averages()
    shown = [row for row in averages if row.device_type.name == ("CUDA" if ON_GPU else "CPU")]
    for row in sorted(shown, key=_own_time, reverse=True)[:25]:
        print(f"{_own_time(row) / 1e3 / taken:9.3f} ms {row.count / taken:7.1f} x {row.key[:100]}")
    if ON_GPU:
        recorded.export_chrome_trace(str(setup.out / "trace.json.gz"))


def _own_time(row: Any) -> float:
    """Microseconds of an entry in the profiler's table, without its callees."""
    return float(row.self_device_time_total if ON_GPU else row.self_cpu_time_total)


def covered(intervals: Iterable[tuple[float, float]]) -> float:
    """Total length of the union of intervals: overlapping kernels count once."""
    total, end = 0.0, float("-inf")
    for start, stop in sorted(intervals):
        total += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return total


def determinism(setup: Setup) -> None:
    """Ten steps from one seed, twice, and once with a resume: which tensors differ?"""
    os.environ |= DETERMINISTIC_CUBLAS
    count = 2 if setup.dry else 10
    seconds = []
    for way, value in (("default", "false"), ("train.deterministic", "true")):
        words = [f"train.deterministic={value}"]
        config = config_of(setup, "unet", 2 if setup.dry else 8, "bfloat16", *words)
        once, _ = train_for(config, count)
        again, taken = train_for(config, count)
        resumed, _ = train_for(config, count, resumed_at=count // 2)
        print(f"{way}, twice: {differences(once, again)}")
        print(f"{way}, resumed: {differences(once, resumed)}")
        seconds.append(taken / (count - 1))
    plain, deterministic = seconds
    print(
        f"s/step at batch {config.train.batch_size}: {plain:.4f} by default, "
        f"{deterministic:.4f} with train.deterministic ({deterministic / plain:.2f} times)"
    )


def train_for(
    config: Config, count: int, resumed_at: int | None = None
) -> tuple[dict[str, Tensor], float]:
    """All weights and buffers after some steps, and the seconds of the steps after the first."""
    run = make_run("ours", config)
    run.step()
    before = now()
    for done in range(1, count):
        if done == resumed_at:
            with tempfile.TemporaryDirectory() as folder:
                save_checkpoint(run.state, config, Path(folder, "step"))
                run = make_run("ours", config)
                load_checkpoint(run.state, Path(folder, "step"))
        run.step()
    seconds = now() - before
    networks = {"animator": run.state.animator, "discriminator": run.state.discriminator}
    return {
        f"{name}.{key}": value.detach().clone()
        for name, network in networks.items()
        for key, value in network.state_dict().items()
    }, seconds


def differences(first: dict[str, Tensor], second: dict[str, Tensor]) -> str:
    """A sentence on which tensors are not equal bit by bit."""
    different = [name for name in first if not torch.equal(first[name], second[name])]
    if not different:
        return f"all {len(first)} tensors are equal bit by bit"
    most = max(float((first[name] - second[name]).abs().max()) for name in different)
    shown = ", ".join(different[:6])
    return f"{len(different)} of {len(first)} tensors differ, by at most {most:.2g}: {shown}"


# ---------------------------------------------------------------------------------------------
# Several ranks
# ---------------------------------------------------------------------------------------------


def ranks(setup: Setup) -> None:
    """Two ranks with half a batch each against one with the whole; the cost of DDP and NCCL.

    The two ranks share the GPU, which NCCL refuses, so they communicate over gloo.
    """
    config = config_of(setup, "unet", 4, "float32")
    losses = make_run("ours", config).step()
    print("one rank:  ", ", ".join(f"{k} {float(v):.5f}" for k, v in losses.items()))
    with tempfile.TemporaryDirectory() as folder:
        arguments = (config, f"file://{folder}/store")
        torch.multiprocessing.spawn(_one_of_two, arguments, nprocs=2)
        backend = "nccl" if ON_GPU else "gloo"
        dist.init_process_group(backend, init_method=f"file://{folder}/alone", rank=0, world_size=1)
        run = make_run("bfloat16", config_of(setup, batch=2 if setup.dry else 16))
        bare = time_steps(setup, run)
        wrapped = run._replace(
            animator=DistributedDataParallel(run.state.animator),
            discriminator=DistributedDataParallel(run.state.discriminator),
        )
        ddp = time_steps(setup, wrapped)
        dist.destroy_process_group()
    print(
        f"one rank, s/step: {bare.seconds:.4f} bare, {ddp.seconds:.4f} under DDP over {backend} "
        f"({ddp.seconds / bare.seconds:.2f} times)"
    )


def _one_of_two(rank: int, config: Config, store: str) -> None:
    """One rank; rank 0 prints the losses and whether both ranks have equal weights."""
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
    run = make_run("ours", config, Worker(rank, 2, DEVICE))
    losses = run.step()
    values = torch.stack(list(losses.values())).detach().float().cpu()
    dist.all_reduce(values)
    weights = torch.cat([p.detach().flatten().cpu() for p in run.state.animator.parameters()])
    both = [torch.empty_like(weights) for _ in range(2)]
    dist.all_gather(both, weights)
    if rank == 0:
        means = zip(losses, (values / 2).tolist(), strict=True)
        print("two ranks: ", ", ".join(f"{name} {value:.5f}" for name, value in means))
        print(f"weights of both ranks are equal bit by bit: {torch.equal(*both)}", flush=True)
    dist.destroy_process_group()


# ---------------------------------------------------------------------------------------------
# The command line, with real shards
# ---------------------------------------------------------------------------------------------


def train(setup: Setup) -> None:
    """`prioritycut train` on shards under Ray: stopped by SIGTERM, then resumed to the end."""
    with shards(setup) as data, tempfile.TemporaryDirectory() as runs:
        batch, total = (2, 24) if setup.dry else (32, 320)
        words = [
            "quickstart" if setup.dry else setup.config,
            *("name=real", f"storage={runs}", f"data.url={data}", "data.decoder=decord"),
            *("loss.perceptual.weights=random", "priority_cut.warmup_samples=0"),
            *("train.workers=1", f"train.use_gpu={'no' if setup.dry else 'yes'}"),
            *(f"train.batch_size={batch}", f"train.samples={batch * total}"),
            *(f"train.log_every={total // 12}", "train.image_every=100000"),
            f"train.checkpoint_every={total // 2}",
            f"data.loader_workers={0 if setup.dry else min(8, os.cpu_count() or 1)}",
        ]
        code = "from prioritycut_ray.cli import main; main()"
        command = [sys.executable, "-c", code, "train", *words]
        metrics = Path(runs, "real", "metrics")
        began = time.monotonic()
        training = subprocess.Popen(command, cwd=ROOT)
        while training.poll() is None and len(scalars(metrics)) < 4:
            time.sleep(0.5)
        print(f"\nfourth report after {time.monotonic() - began:.0f} s; SIGTERM")
        training.send_signal(signal.SIGTERM)
        stopped = training.wait()
        before = len(scalars(metrics))
        resumed = subprocess.run(command, cwd=ROOT, check=False).returncode
        rows = scalars(metrics)
        print(
            f"\nstopped with exit code {stopped} (expected 75), resumed with {resumed} (expected 0)"
        )
        print(f"reports before and after: {before}, {len(rows) - before}")
        for row in rows:
            print(
                f"step {row['step']:.0f}: {row['speed/samples_per_second']:.1f} pairs/s, waiting "
                f"for data {100 * row['speed/share_waiting_for_data']:.1f} %, generator "
                f"{row['generator/total']:.3f}, discriminator {row['discriminator/total']:.3f}"
            )
        steady = rows[2:before] + rows[before + 2 :]
        if steady:
            speed = statistics.median(row["speed/samples_per_second"] for row in steady)
            print(f"median: {speed:.1f} pairs/s, {batch / speed:.4f} s/step")
    sys.exit(0 if (stopped, resumed) == (75, 0) else 1)


def scalars(folder: Path) -> list[dict[str, float]]:
    """The scalars that a run has logged so far, in order."""
    return [
        json.loads(line)
        for path in sorted(folder.glob("*.jsonl"))
        for line in path.read_text().splitlines(keepends=True)
        if line.endswith("\n")
    ]


@contextmanager
def shards(setup: Setup) -> Iterator[str]:
    """The given folder of shards, or a new one of synthetic puppets."""
    if setup.data:
        yield str(Path(setup.data).resolve())
        return
    with tempfile.TemporaryDirectory() as folder:
        clips, frames, size = (6, 8, 64) if setup.dry else (8, 32, 256)
        yield pack_puppets(f"{folder}/data", clips, frames, size)


def loader(setup: Setup) -> None:
    """Pairs per second that are decoded, and that reach the device."""
    batch, size = (2, 64) if setup.dry else (32, 256)
    with shards(setup) as data:
        pairs = FramePairs(
            data, read_index(data), "train", size=size, seed=0, num_repeats=1000, decoder="decord"
        )
        for workers in (0, 1) if setup.dry else (0, 2, 4, 8, 12):
            speed = batch * loader_rate(pairs, batch, workers, 2 if setup.dry else 8)
            print(f"data.loader_workers={workers}: {speed:.0f} pairs/s")
    for name, speed in transfer_rates(batch * 3 * size**2).items():
        print(f"from {name} memory to the device: {speed / (2 * 3 * size**2):.0f} pairs/s")


def loader_rate(pairs: FramePairs, batch: int, workers: int, count: int) -> float:
    """Batches per second, not counting those that the loader workers had prefetched."""
    waste, count = 3 * workers + 1, max(count, 3 * workers)
    stream = batches(
        pairs,
        start=0,
        stop=batch * (waste + count),
        global_batch=batch,
        rank=0,
        world_size=1,
        loader_workers=workers,
        pin_for=DEVICE if ON_GPU else None,
    )
    for _ in range(waste):
        next(stream)
    before = time.perf_counter()
    for _ in range(count):
        next(stream)
    return count / (time.perf_counter() - before)


def animate(setup: Setup) -> None:
    """Animation in frames per second, beside the reference's way."""
    words = ["--size", "128", "--frames", "4", "--turns", "1"] if setup.dry else ["--frames", "256"]
    command = [sys.executable, str(ROOT / "benchmarks/animate.py"), "network", *words]
    sys.exit(subprocess.run(command, check=False).returncode)


def compiled(setup: Setup) -> None:
    """The speed-up of train.compile, and the time of its first step."""
    batch, backend = (2, "eager") if setup.dry else (16, "inductor")
    for way, word in (("eager", "no"), ("compiled", "yes")):
        config = config_of(setup, "unet", batch, "bfloat16", f"train.compile={word}")
        timing = time_steps(setup, make_run(way, config, backend=backend))
        print(
            f"{way}: {timing.seconds:.4f} s/step, host {timing.host:.4f}, "
            f"{timing.memory / 1e9:.1f} GB, first step {timing.first:.0f} s, "
            f"first loss {timing.loss:.3f}"
        )


STAGES: dict[str, Stage] = {
    "ceilings": Stage(ceilings, 40),
    "tests": Stage(tests, 120),
    "steps": Stage(steps, 170),
    "profile": Stage(profile, 45),
    "determinism": Stage(determinism, 60),
    "train": Stage(train, 150),
    "ranks": Stage(ranks, 60),
    "loader": Stage(loader, 45),
    "animate": Stage(animate, 40),
    "compile": Stage(compiled, 150),
}
"""The most valuable first."""
