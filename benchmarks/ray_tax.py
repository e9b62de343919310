"""The overhead of Ray Train: time to the first step, and time of a step; in Markdown.

    python benchmarks/ray_tax.py

Networks of `quickstart` on a few synthetic puppets, one worker with one thread: under Ray Train,
and at the same time the bare trainer in another process. Run one after the other, the variation of
a shared machine exceeds the overhead; side by side, both runs share it.
"""

import os

os.environ["OMP_NUM_THREADS"] = "1"  # Ray sets it for a worker with one CPU.

import multiprocessing
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from threading import Event
from typing import NamedTuple

import ray
import torch
from command_line import run_command

from prioritycut_ray.config import Config, load_config
from prioritycut_ray.data.index import read_index
from prioritycut_ray.data.puppets import render_clip
from prioritycut_ray.launch.driver import launch
from prioritycut_ray.launch.worker import KEEP_FREED_MEMORY
from prioritycut_ray.packing.pipeline import pack_videos
from prioritycut_ray.ray_cluster.session import start_ray
from prioritycut_ray.training.state import TrainState
from prioritycut_ray.training.trainer import train
from prioritycut_ray.training.worker import Worker, WorkerStatus
from prioritycut_ray.video.encoding import write_video

LOG_EVERY = 10
_NICENESS_OF_WORKERS = 15
"""Ray's value; with a lower one, the bare trainer would get more CPU time."""


class Window(NamedTuple):
    """Consecutive steps: when they ended (s since the epoch), and seconds per step."""

    end: float
    step: float


def main(steps: int = 400) -> None:
    """Train in both ways side by side, and list the time before the first step by part."""
    spawn = multiprocessing.get_context("spawn")
    with (
        tempfile.TemporaryDirectory() as folder,
        spawn.Manager() as manager,
        ProcessPoolExecutor(1, spawn) as pool,
    ):
        _pack(Path(folder))
        ray.shutdown()
        before = time.time()
        start_ray()
        ray_start = time.time() - before
        steps_began = manager.Event()
        beside = pool.submit(_bare, _config(folder, "bare", steps), steps_began)
        before = time.time()
        under_ray = _under_ray(_config(folder, "ray", steps), steps_began)
        worker_start = _first_step(under_ray) - before
        before, bare = beside.result()
        networks = _first_step(bare) - before
    _print_steps({"bare": bare, "Ray Train": under_ray})
    print("\n| from the command to the first step | s |\n|---|---|")
    parts = {
        "imports of the command": _import_seconds(),
        "starting Ray on this machine": ray_start,
        "networks, perceptual weights (also without Ray)": networks,
        "Ray Train: controller, worker, its imports": worker_start - networks,
    }
    for name, seconds in parts.items():
        print(f"| {name} | {seconds:.1f} |")
    print(f"| total | {sum(parts.values()):.1f} |")


def _config(folder: str, name: str, steps: int) -> Config:
    words = [f"storage={folder}/runs", f"data.url={folder}/data", f"name={name}"]
    words += [f"train.log_every={LOG_EVERY}", "train.workers=1"]
    words += [f"train.samples={8 * steps}", "train.image_every=100000"]
    return load_config("quickstart", [*words, "train.checkpoint_every=100000"])


def _first_step(windows: list[Window]) -> float:
    return windows[0].end - LOG_EVERY * windows[0].step


def _print_steps(ways: Mapping[str, list[Window]]) -> None:
    """Compare both over the time in which both trained; the first window of each is warm-up."""
    begin = max(windows[0].end for windows in ways.values())
    end = min(windows[-1].end for windows in ways.values())
    seconds = {
        way: [w.step for w in windows if w.end - LOG_EVERY * w.step >= begin and w.end <= end]
        for way, windows in ways.items()
    }
    print("Quickstart, one worker, one thread, side by side.\n")
    print(
        f"| | windows of {LOG_EVERY} steps | s/step ± standard error | overhead (%) |\n"
        "|---|---|---|---|"
    )
    for way, each in seconds.items():
        mean, error = statistics.fmean(each), statistics.stdev(each) / len(each) ** 0.5
        overhead = 100 * (mean / statistics.fmean(seconds["bare"]) - 1)
        print(f"| {way} | {len(each)} | {mean:.4f} ± {error:.4f} | {overhead:.1f} |")


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


def _bare(config: Config, begin: Event) -> tuple[float, list[Window]]:
    """Train in this process once the other has started; return its start time and windows."""
    begin.wait()
    os.nice(_NICENESS_OF_WORKERS)
    before, recorder = time.time(), _Recorder()

    def report(metrics: Mapping[str, float], _: TrainState | None) -> None:
        recorder(metrics)

    torch.set_num_threads(1)
    train(
        config,
        read_index(config.data.url),
        worker=Worker(0, 1, torch.device("cpu")),
        writer=None,
        checkpoint=None,
        report=report,
        status=WorkerStatus(),
    )
    return before, recorder.windows


def _under_ray(config: Config, began: Event) -> list[Window]:
    recorder = _Recorder()

    def report(metrics: Mapping[str, float]) -> None:
        recorder(metrics)
        began.set()

    try:
        launch(config, report, lambda warning: print(f"warning: {warning}"))
    finally:
        began.set()  # or the other would wait forever
    return recorder.windows


class _Recorder:
    """Records the reports of a training."""

    def __init__(self) -> None:
        self.windows: list[Window] = []

    def __call__(self, metrics: Mapping[str, float]) -> None:
        self.windows.append(Window(time.time(), 8 / metrics["speed/samples_per_second"]))


def _import_seconds() -> float:
    before = time.perf_counter()
    command = "import prioritycut_ray.cli, prioritycut_ray.launch.train"
    subprocess.run([sys.executable, "-c", command], check=True)
    return time.perf_counter() - before


if __name__ == "__main__":
    if not KEEP_FREED_MEMORY.items() <= os.environ.items():
        # So that both allocate in the same way; glibc reads these when a process starts.
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | KEEP_FREED_MEMORY)
    run_command(main)
