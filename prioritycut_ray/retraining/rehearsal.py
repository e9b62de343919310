"""A rehearsal of production: the candidate is exported and animates a clip in a fresh process.

The fresh process is this module as a script: it loads the export, animates, and writes the frames
with its time and memory.
"""

import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from prioritycut_ray.errors import UserError, last_line
from prioritycut_ray.inference.pretrained import Animator
from prioritycut_ray.retraining.gate import GateCheck
from prioritycut_ray.retraining.settings import Gate

LONGEST_CLIP = 16
"""Frames that are animated."""
_TURNS = 5
"""The fastest counts."""
_TIMEOUT_S = 900.0

Frames = NDArray[np.uint8]


class Performance(NamedTuple):
    """What a fresh process did with an exported model.

    Attributes:
        frames: the animated clip, `[T, S, S, 3]`.
        seconds: for each frame: of the processor, or of the clock on a GPU.
        mebibytes: highest memory of the process, or of the GPU.
    """

    frames: Frames
    seconds: float
    mebibytes: float


def rehearse(candidate: str, current: str, clip: Frames, gate: Gate) -> list[GateCheck]:
    """Check that the candidate runs where it will be used, with the frames that it was judged by.

    Args:
        candidate: path or URL of the candidate's checkpoint.
        current: path or URL of the current model's.
        clip: square frames `[T, S, S, 3]` of any size; the first is the source.
        gate: the limits of time and memory.
    """
    frames = clip[:LONGEST_CLIP]
    try:
        expected = np.stack([*Animator.from_pretrained(candidate).animate(frames[0], frames)])
        new = perform(candidate, frames)
    except (UserError, OSError, RuntimeError) as error:
        text = f"the exported candidate does not run in a fresh process: {error}"
        return [GateCheck(passed=False, text=text)]
    checks = [_same_frames(new.frames, expected)]
    try:
        old = perform(current, frames)
    except (UserError, OSError, RuntimeError) as error:
        text = f"time and memory are not compared: the current model does not run: {error}"
        return [*checks, GateCheck(passed=True, text=text)]
    return [
        *checks,
        _within("time", new.seconds * 1e3, old.seconds * 1e3, "ms a frame", gate.time_factor),
        _within("memory", new.mebibytes, old.mebibytes, "MiB", gate.memory_factor),
    ]


def perform(checkpoint: str, frames: Frames) -> Performance:
    """Export a checkpoint, and animate with it in a fresh process.

    Raises:
        UserError: the checkpoint is damaged, or the process fails.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        Animator.from_pretrained(checkpoint, device="cpu").save_pretrained(folder)
        np.save(folder / "clip.npy", frames)
        command = [sys.executable, "-m", __name__, name]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            raise UserError(f"it did not end within {_TIMEOUT_S:g} s") from None
        if done.returncode:
            reason = last_line(done.stderr) or "no message"
            raise UserError(f"it ended with exit code {done.returncode}: {reason}")
        with np.load(folder / "performance.npz") as stored:
            return Performance(
                stored["frames"], float(stored["seconds"]), float(stored["mebibytes"])
            )


def _same_frames(frames: Frames, expected: Frames) -> GateCheck:
    if frames.shape != expected.shape:
        return GateCheck(
            passed=False,
            text=f"the exported candidate gives frames {frames.shape}, not {expected.shape}",
        )
    largest = int(np.abs(frames.astype(int) - expected.astype(int)).max())
    return GateCheck(
        passed=largest <= 1,
        text=f"the exported candidate's frames in a fresh process differ by at most {largest}/255 "
        "from the checkpoint's (limit 1/255)",
    )


def _within(what: str, new: float, old: float, unit: str, factor: float) -> GateCheck:
    return GateCheck(
        passed=new <= factor * old,
        text=f"{what} to animate is {new:.3g} {unit}, {new / old:.2f} times the current model's "
        f"(limit {factor:g})",
    )


def main(name: str) -> None:
    """Animate in this process, and write what :class:`Performance` has."""
    folder = Path(name)
    frames = np.load(folder / "clip.npy", allow_pickle=False)
    animator = Animator.from_pretrained(folder)
    gpu = animator.device.type == "cuda"
    clock = time.perf_counter if gpu else time.process_time
    seconds = []
    for _ in range(_TURNS):
        begin = clock()
        animated = np.stack([*animator.animate(frames[0], frames)])
        seconds.append((clock() - begin) / len(frames))
    if gpu:
        mebibytes = torch.cuda.max_memory_allocated() / 2**20
    else:
        units = 1 if sys.platform == "darwin" else 1024
        mebibytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * units / 2**20
    np.savez(folder / "performance.npz", frames=animated, seconds=min(seconds), mebibytes=mebibytes)


if __name__ == "__main__":
    main(sys.argv[1])
