"""What validation costs the training: beside it in a Ray task, and in its own process; in Markdown.

    python benchmarks/validation.py

Networks of `quickstart` on synthetic puppets, one thread. Both ways train the same steps in this
process, one after the other; only shares of their own step times are compared.
"""

import os

os.environ["OMP_NUM_THREADS"] = "1"

import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ray
import torch
from command_line import run_command

from prioritycut_ray.config import Config, load_config
from prioritycut_ray.data.index import read_index
from prioritycut_ray.data.puppets import render_clip
from prioritycut_ray.launch.validation import validator_of
from prioritycut_ray.packing.pipeline import pack_videos
from prioritycut_ray.ray_cluster.session import start_ray
from prioritycut_ray.runs.attempts import claim_run
from prioritycut_ray.runs.verdicts import read_verdicts
from prioritycut_ray.storage.folder import Folder
from prioritycut_ray.training.run import open_run, save_state
from prioritycut_ray.training.state import TrainState
from prioritycut_ray.training.trainer import train
from prioritycut_ray.training.validation import Validation
from prioritycut_ray.training.worker import Worker, WorkerStatus
from prioritycut_ray.video.encoding import write_video

CPU = torch.device("cpu")


class Clock:
    """Measures the seconds that the training thread spends in some functions."""

    def __init__(self) -> None:
        self.seconds: dict[str, list[float]] = {"validation": [], "checkpoint": []}

    def watched(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return the function with a measurement of every call."""

        def call(*arguments: Any, **options: Any) -> Any:
            before = time.perf_counter()
            try:
                return function(*arguments, **options)
            finally:
                self.seconds[name].append(time.perf_counter() - before)

        return call


def main(steps: int = 300, every: int = 50) -> None:
    """Train in both ways, and print the time that the training thread was held up."""
    start_ray()
    print(f"{steps} steps, validated every {every}\n")
    print("| validated | verdicts | s/step | held up by validation (% of time) | longest (s) |")
    print("|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        _pack(Path(folder))
        for way in ("in Ray tasks", "in its own process"):
            config = _config(folder, way.replace(" ", "-"), steps, every)
            clock, seconds = _train(config, CPU if way == "in Ray tasks" else None)
            held = clock.seconds["validation"]
            verdicts = len(read_verdicts(Folder(config.run)))
            print(
                f"| {way} | {verdicts} | {seconds / steps:.4f} | {100 * sum(held) / seconds:.2f} "
                f"| {max(held):.4f} |"
            )
        copies = clock.seconds["checkpoint"]
        print(f"\ncopying the state for a checkpoint: {statistics.median(copies):.4f} s (median)")
    ray.shutdown()


def _train(config: Config, device: torch.device | None) -> tuple[Clock, float]:
    """Train; returns what was measured, and the seconds without the wait at the end."""
    index, clock = read_index(config.data.url), Clock()
    claim = claim_run(Folder(config.run), "benchmark", first=True)
    begin, poll, finish = Validation.begin, Validation.poll, Validation.finish
    ended: list[float] = []

    def finished(self: Validation, state: TrainState) -> None:
        ended.append(time.perf_counter())
        Validation.poll = poll  # type: ignore[method-assign]
        finish(self, state)

    with tempfile.TemporaryDirectory() as scratch:
        opened = open_run(config, claim, Path(scratch))
        save = clock.watched("checkpoint", save_state)

        def report(metrics: Mapping[str, float], state: TrainState | None) -> None:
            if state is not None:
                save(opened.writer, state, metrics, config, index.fingerprint)

        try:
            Validation.begin = clock.watched("validation", begin)  # type: ignore[method-assign]
            Validation.poll = clock.watched("validation", poll)  # type: ignore[method-assign]
            Validation.finish = finished  # type: ignore[method-assign]
            before = time.perf_counter()
            with opened.writer:
                train(
                    config,
                    index,
                    worker=Worker(0, 1, CPU),
                    writer=opened.writer,
                    checkpoint=None,
                    report=report,
                    status=WorkerStatus(),
                    validator=validator_of(config, index, device),
                )
        finally:
            Validation.begin, Validation.poll, Validation.finish = begin, poll, finish  # type: ignore[method-assign]
    return clock, ended[0] - before


def _config(folder: str, name: str, steps: int, every: int) -> Config:
    words = [f"storage={folder}/runs", f"data.url={folder}/data", f"name={name}"]
    words += [f"train.samples={8 * steps}", f"train.validate_every={every}", "train.workers=1"]
    words += ["data.validation_split=test", "train.image_every=100000"]
    return load_config("quickstart", [*words, "train.checkpoint_every=100000"])


def _pack(folder: Path) -> None:
    (folder / "videos").mkdir()
    for seed in range(20):
        frames = render_clip(seed, size=64, frames=32).frames
        write_video(folder / "videos" / f"puppet_{seed}.mp4", frames, 16.0)
    pack_videos([str(folder / "videos")], str(folder / "data"), size=64)


if __name__ == "__main__":
    run_command(main)
