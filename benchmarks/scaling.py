"""Two processes against one, and a model of many GPUs; in Markdown.

    python benchmarks/scaling.py
    python benchmarks/scaling.py --gpu-seconds 0.4    # a measured step of one GPU (step.py)

One thread per process. "Apart" is two processes that train at the same time and never communicate:
its loss is due to the shared machine, and its speed is the ceiling for "together".
"""

import json
import os
import statistics
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing
from command_line import run_command

from prioritycut_ray.config import Config, load_config
from prioritycut_ray.models.animator import FramePair
from prioritycut_ray.networks import build_perceptual
from prioritycut_ray.training.state import TrainState, new_state
from prioritycut_ray.training.steps import draw_randomness, micro_batches, training_step
from prioritycut_ray.training.trainer import distribute
from prioritycut_ray.training.worker import Worker

CPU = torch.device("cpu")
WAYS = {"alone": 1, "apart": 2, "together": 2}
NETWORKS = {
    "NVLink in the node, 400 Gb/s per GPU between nodes": (300e9, 50e9),
    "NVLink in the node, 100 Gb/s per node between nodes": (300e9, 12.5e9 / 8),
}
"""Bytes per second of one GPU, within its node of eight and beyond. Assumed, not measured."""
LATENCY = 20e-6
"""Seconds of one hop of a ring. Assumed, not measured."""
BUCKET = 25 * 2**20
"""Bytes that DistributedDataParallel reduces at once."""


def main(
    configuration: str = "quickstart",
    batch: int = 4,
    steps: int = 12,
    turns: int = 2,
    gpu_seconds: float = 0.5,
) -> None:
    """Time one and two processes; then model 8 to 512 GPUs with the published sizes."""
    config = load_config(configuration, [f"train.batch_size={2 * batch}", "train.workers=2"])
    medians: dict[str, list[list[float]]] = {way: [] for way in WAYS}
    for _ in range(turns):
        for way in WAYS:
            medians[way].append(_measure(way, config, batch, steps))
    wall = {way: min(times[0] for times in medians[way]) for way in WAYS}
    busy = {way: min(times[1] for times in medians[way]) for way in WAYS}
    print(
        f"{configuration}, batch {batch} per process, one thread each; best of {turns} medians.\n"
    )
    print("| | s/step (clock) | s/step (CPU, one process) | efficiency |\n|---|---|---|---|")
    for way in WAYS:
        efficiency = wall["alone"] / wall[way]
        print(f"| {way} | {wall[way]:.3f} | {busy[way]:.3f} | {efficiency:.2f} |")
    print(f"\nShare of the ceiling (apart): {wall['apart'] / wall['together']:.2f}.")
    _print_bytes(configuration, config)
    published = load_config("vox256")
    _print_bytes("vox256", published)
    _print_model(_reduced_bytes(new_state(published, CPU)), gpu_seconds)


def _measure(way: str, config: Config, batch: int, steps: int) -> list[float]:
    """Median clock seconds and CPU seconds of a step."""
    os.environ["OMP_NUM_THREADS"] = "1"
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    with tempfile.TemporaryDirectory() as folder:
        arguments = (store.port, way, config, batch, steps, folder)
        torch.multiprocessing.spawn(_work, arguments, nprocs=WAYS[way])
        times = [json.loads(path.read_text()) for path in Path(folder).iterdir()]
    return [statistics.fmean(column) for column in zip(*times, strict=True)]


def _work(
    rank: int, port: int, way: str, config: Config, batch: int, steps: int, folder: str
) -> None:
    """One process; it always joins the process group, and all-reduces gradients only "together"."""
    torch.set_num_threads(1)
    store = dist.TCPStore("127.0.0.1", port, is_master=False)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=WAYS[way])
    together = way == "together"
    worker = Worker(rank, 2, CPU) if together else Worker(0, 2, CPU)
    state, perceptual = new_state(config, CPU), build_perceptual(config)
    animator, discriminator = distribute(state, worker if together else Worker(0, 1, CPU))
    size = config.data.size
    pair = FramePair(*torch.rand(2, batch, 3, size, size))
    times = []
    for step in range(steps + 2):
        dist.barrier()
        clock, busy = time.perf_counter(), time.process_time()
        parts = micro_batches(pair, draw_randomness(config, step, worker), 1)
        training_step(state, animator, discriminator, perceptual, parts, config)
        times.append((time.perf_counter() - clock, time.process_time() - busy))
    medians = [statistics.median(column) for column in zip(*times[2:], strict=True)]
    Path(folder, str(rank)).write_text(json.dumps(medians))
    dist.destroy_process_group()


def _reduced_bytes(state: TrainState) -> dict[str, int]:
    """Bytes of gradients that a step all-reduces, and of spectral norms that it broadcasts.

    Batch statistics are left out: 32 bytes per channel, forward and backward together.
    """
    networks = (state.animator, state.discriminator)
    return {
        "gradients": sum(p.nbytes for network in networks for p in network.parameters()),
        "buffers": sum(buffer.nbytes for buffer in state.discriminator.buffers()),
    }


def _print_bytes(name: str, config: Config) -> None:
    sizes = _reduced_bytes(new_state(config, CPU))
    parts = ", ".join(f"{part} {size / 1e6:.1f} MB" for part, size in sizes.items())
    print(f"Communicated per step, {name}: {parts}.")


def _print_model(sizes: dict[str, int], compute: float) -> None:
    """Step time on 8 to 512 GPUs, with a ring hidden behind two thirds of the computation."""
    size = sizes["gradients"]
    print(f"\nModel of vox256 with {compute:g} s of computation per step on one GPU (an assumption")
    print("unless measured), float32 gradients, ring all-reduce behind the backward pass:\n")
    print("| GPUs | " + " | ".join(f"{name}: s/step, efficiency" for name in NETWORKS) + " |")
    print("|---" * (1 + len(NETWORKS)) + "|")
    for gpus in (8, 16, 32, 64, 128, 256, 512):
        cells = []
        for inside, between in NETWORKS.values():
            bandwidth = inside if gpus <= 8 else min(inside, between)
            hops, buckets = 2 * (gpus - 1), -(-size // BUCKET)
            reduce = hops / gpus * size / bandwidth + hops * LATENCY * buckets
            # The last bucket has no computation left to hide behind.
            last = reduce / buckets
            step = compute + max(last, reduce - compute * 2 / 3)
            cells.append(f"{step:.3f}, {compute / step:.2f}")
        print(f"| {gpus} | {' | '.join(cells)} |")


if __name__ == "__main__":
    run_command(main)
