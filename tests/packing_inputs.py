"""Small inputs of packing, and what is found in them."""

import io
import json
import os
import signal
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import numpy as np

from prioritycut_ray.packing.entries import Entry, opened
from prioritycut_ray.packing.inputs import find_videos

FACTS = json.dumps({"identity": "ann"}).encode()


def write_tar(path: Path, members: list[tuple[str, bytes]], **changes: Any) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            for key, value in changes.get(name, {}).items():
                setattr(info, key, value)
            tar.addfile(info, io.BytesIO(data))
    return path


def rejected(*inputs: str | Path) -> dict[str, str]:
    return {Path(i.file).name: i.reason for i in find_videos([str(i) for i in inputs]).rejected}


def read(entry: Entry) -> bytes:
    with opened(entry) as file:
        return file.read(entry.size)


def manifest(folder: Path, text: str) -> str:
    """Write a manifest beside four files."""
    for name in "abcd":
        (folder / f"{name}.mp4").touch()
    (folder / "m.csv").write_text(text, encoding="utf-8")
    return str(folder / "m.csv")


def touched(folder: Path, *names: str) -> list[str]:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    return [str(folder / name) for name in names]


def identities(*inputs: str) -> list[str]:
    return [entry.identity for entry in find_videos(inputs).entries]


def splits(*inputs: str) -> list[str]:
    return [entry.split for entry in find_videos(inputs).entries]


def film(seed: int, count: int = 6, height: int = 48, width: int = 80) -> list[np.ndarray]:
    """A square, coloured by the seed, that moves over a gray ramp."""
    frames = []
    for index in range(count):
        frame = np.repeat(np.linspace(30, 200, width, dtype=np.uint8)[None, :, None], 3, axis=2)
        frame = frame.repeat(height, axis=0)
        frame[10:30, 20 + 3 * index : 40 + 3 * index] = (20 * seed % 256, 200, 60)
        frames.append(frame)
    return frames


def moving_rectangle(
    count: int, seed: int = 0, height: int = 64, width: int = 64
) -> list[np.ndarray]:
    """A rectangle that moves over a plain background; both are coloured by the seed."""
    colour = np.random.default_rng(seed).integers(60, 255, 3)
    frames = []
    for index in range(count):
        frame = np.full((height, width, 3), colour // 2, np.uint8)
        frame[height // 4 : height // 2, 2 * index % (width // 2) :][:, : width // 4] = colour
        frames.append(frame)
    return frames


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def run_and_die(script: str) -> None:
    """Run a script that kills itself, on the Ray cluster of this process."""
    import ray

    environment = os.environ | {
        "RAY_ADDRESS": ray.get_runtime_context().gcs_address,
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    done = subprocess.run(
        [sys.executable, "-c", script],
        env=environment,
        timeout=200,
        start_new_session=True,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
