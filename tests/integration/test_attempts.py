"""Attempts of one run as processes of their own, each with its own Ray: killed, and overlapping."""

import os
import re
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

import fsspec
import pytest
import torch
from safetensors.torch import load_file

from prioritycut_ray.run_storage import RunStorage
from tests.conftest import TINY
from tests.hosts import BIN, ROOT, environment

pytestmark = [pytest.mark.integration, pytest.mark.slow, pytest.mark.timeout(900)]
PATIENCE_S = 240.0


@contextmanager
def training(
    shards: Path, storage: str, output: Path, *words: str, **environ: str
) -> Iterator["subprocess.Popen[bytes]"]:
    """`prioritycut train` in a session of its own."""
    command = [str(BIN / "prioritycut"), "train", str(TINY), f"data.url={shards}"]
    with output.open("wb") as file:
        process = subprocess.Popen(
            [*command, f"storage={storage}", *words],
            cwd=ROOT,
            env=environment(**environ),
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        yield process
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait(60)


def await_step(
    step: int, run: str, process: "subprocess.Popen[bytes]", output: Path, *, begun: bool = False
) -> None:
    """Wait until a checkpoint of this step or a later one is there, or has been begun."""
    pattern = re.compile(r"\.?step_(\d+).*" if begun else r"step_(\d+)")
    deadline = time.monotonic() + PATIENCE_S
    while True:
        matches = filter(None, map(pattern.fullmatch, RunStorage(run).names()))
        if any(int(match[1]) >= step for match in matches):
            return
        assert process.poll() is None, output.read_text()
        assert time.monotonic() < deadline, output.read_text()
        time.sleep(0.01)


def final_weights(run: str, folder: Path) -> Mapping[str, torch.Tensor]:
    found = RunStorage(run).newest_good(folder)
    assert found is not None
    step, directory = found
    assert step == 8
    names = ("animator", "animator_ema", "discriminator")
    return {
        f"{name}.{key}": tensor
        for name in names
        for key, tensor in load_file(directory / f"{name}.safetensors").items()
    }


@pytest.mark.parametrize("place", ["local", "s3"])
def test_killed_while_saving_and_started_again(
    place: str, shards: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    storage, environ = str(tmp_path / "runs"), dict[str, str]()
    if place == "s3":
        storage = f"{request.getfixturevalue('bucket')}/runs"
        environ = request.getfixturevalue("object_store")
    run, output = f"{storage}/tiny", tmp_path / "output.txt"
    with training(shards, storage, output, **environ) as process:
        await_step(4, run, process, output, begun=True)
        os.killpg(process.pid, signal.SIGKILL)
    with training(shards, storage, output, **environ) as process:
        assert process.wait(PATIENCE_S) == 0, output.read_text()
    with training(shards, str(tmp_path / "quiet"), output) as process:
        assert process.wait(PATIENCE_S) == 0, output.read_text()
    expected = final_weights(str(tmp_path / "quiet" / "tiny"), tmp_path)
    for name, tensor in final_weights(run, tmp_path / "scratch").items():
        assert torch.equal(tensor, expected[name]), name
    assert [name for name in RunStorage(run).names() if name.startswith(".step")] == []


def test_of_two_drivers_the_older_one_ends(shards: Path, tmp_path: Path) -> None:
    storage, words = str(tmp_path / "runs"), ("train.samples=40000", "train.checkpoint_every=1")
    older, newer = tmp_path / "older.txt", tmp_path / "newer.txt"
    with training(shards, storage, older, *words) as first:
        await_step(2, f"{storage}/tiny", first, older)
        with training(shards, storage, newer, *words) as second:
            assert first.wait(PATIENCE_S) == 77, older.read_text()
            last = older.read_text().splitlines()[-1]
            assert "superseded" in last
            assert "superseded by attempt 3 (host " in last
            await_step(
                RunStorage(f"{storage}/tiny").steps()[-1] + 2, f"{storage}/tiny", second, newer
            )
            second.terminate()
            assert second.wait(PATIENCE_S) == 75, newer.read_text()
    assert fsspec.filesystem("file").ls(f"{storage}/tiny/attempts")[-1].endswith("000004.json")
