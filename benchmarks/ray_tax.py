"""What Ray Train costs: time to the first step, and time of a step; in Markdown.

    python benchmarks/ray_tax.py

The quickstart's networks on a few synthetic puppets, one worker with one thread, in turns: under
Ray Train, and the bare trainer in a process of its own.
"""

import os

os.environ["OMP_NUM_THREADS"] = "1"  # As Ray sets it for a worker with one CPU.

import multiprocessing
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple

import ray
import torch
import typer

from prioritycut_ray.config import Config, load_config
from prioritycut_ray.data.packing import pack_videos
from prioritycut_ray.data.puppets import render_clip
from prioritycut_ray.data.shards import read_index
from prioritycut_ray.data.video import write_video
from prioritycut_ray.launch import KEEP_FREED_MEMORY, launch
from prioritycut_ray.ray_session import start_ray
from prioritycut_ray.state import TrainState
from prioritycut_ray.trainer import train
from prioritycut_ray.worker import Pulse, Worker

LOG_EVERY = 10


class Times(NamedTuple):
    """Seconds of one training."""

    until_first_step: float
    step: float


def main(steps: int = 100, turns: int = 4) -> None:
    """Train both ways in turns, and list what comes before the first step."""
    with tempfile.TemporaryDirectory() as folder:
        _pack(Path(folder))
        ray.shutdown()
        times: dict[str, list[Times]] = {"bare": [], "Ray Train": []}
        starts = []
        for turn in range(turns):
            words = [f"storage={folder}/runs", f"data.url={folder}/data", f"name=turn{turn}"]
            words += [f"train.log_every={LOG_EVERY}", "train.workers=1"]
            words += [f"train.samples={8 * steps}", "train.image_every=100000"]
            words += ["train.checkpoint_every=100000"]
            config = load_config("quickstart", words)
            # Spawned afresh, as a worker is: what this process holds would slow it.
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
                times["bare"].append(pool.submit(_bare, config).result())
            before = time.perf_counter()
            start_ray()
            starts.append(time.perf_counter() - before)
            times["Ray Train"].append(_under_ray(config))
            ray.shutdown()
    first = {way: min(t.until_first_step for t in runs) for way, runs in times.items()}
    print(f"{turns} turns of {steps} steps each, quickstart, one worker, one thread.\n")
    _print_steps({way: [t.step for t in runs] for way, runs in times.items()})
    print("\n| from the command to the first step | s |\n|---|---|")
    parts = {
        "imports of the command": _import_seconds(),
        "starting Ray on this machine": min(starts),
        "networks, perceptual weights (also without Ray)": first["bare"],
        "Ray Train: controller, worker, its imports": first["Ray Train"] - first["bare"],
    }
    for name, seconds in parts.items():
        print(f"| {name} | {seconds:.1f} |")
    print(f"| together | {sum(parts.values()):.1f} |")


def _print_steps(seconds: Mapping[str, list[float]]) -> None:
    turns = range(1, len(seconds["bare"]) + 1)
    print("| s/step in turn | " + " | ".join(map(str, turns)) + " | best | tax of the best (%) |")
    print("|---" * (len(turns) + 3) + "|")
    for way, each in seconds.items():
        tax = 100 * (min(each) / min(seconds["bare"]) - 1)
        cells = [f"{second:.3f}" for second in [*each, min(each)]]
        print(f"| {way} | {' | '.join(cells)} | {tax:.1f} |")


def _pack(folder: Path) -> None:
    (folder / "videos").mkdir()
    for seed in range(6):
        write_video(
            folder / "videos" / f"puppet_{seed}.mp4",
            render_clip(seed, size=64, frames=16).frames,
            16,
        )
    start_ray()
    pack_videos([str(folder / "videos")], str(folder / "data"), size=64)


def _bare(config: Config) -> Times:
    torch.set_num_threads(1)
    recorder = _Recorder()

    def report(metrics: Mapping[str, float], _: TrainState | None) -> None:
        recorder(metrics)

    train(
        config,
        read_index(config.data.url),
        worker=Worker(0, 1, torch.device("cpu")),
        writer=None,
        checkpoint=None,
        report=report,
        pulse=Pulse(),
    )
    return recorder.times()


def _under_ray(config: Config) -> Times:
    recorder = _Recorder()
    launch(config, recorder, lambda warning: print(f"warning: {warning}"))
    return recorder.times()


class _Recorder:
    """Receives the reports of a training."""

    def __init__(self) -> None:
        self._start = time.perf_counter()
        self._arrivals: list[float] = []
        self._seconds: list[float] = []

    def __call__(self, metrics: Mapping[str, float]) -> None:
        self._arrivals.append(time.perf_counter() - self._start)
        self._seconds.append(8 / metrics["speed/samples_per_second"])

    def times(self) -> Times:
        """The first report covers the warm-up and is left out of the median."""
        begun = self._arrivals[0] - LOG_EVERY * self._seconds[0]
        return Times(begun, statistics.median(self._seconds[1:]))


def _import_seconds() -> float:
    before = time.perf_counter()
    command = "import prioritycut_ray.cli, prioritycut_ray.commands.train"
    subprocess.run([sys.executable, "-c", command], check=True)
    return time.perf_counter() - before


if __name__ == "__main__":
    if not KEEP_FREED_MEMORY.items() <= os.environ.items():
        # So that both ways allocate alike; glibc reads it when a process starts.
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | KEEP_FREED_MEMORY)
    typer.run(main)
