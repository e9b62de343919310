"""Attempts of one run, each with its own Ray: killed while saving, and overlapping."""

import os
import re
import signal
import time
from pathlib import Path

import pytest

from prioritycut_ray.runs.checkpoints import steps
from prioritycut_ray.storage.folder import Folder
from tests.conftest import TINY
from tests.runs import ENVIRON, PATIENCE_S, WORDS, Training, assert_same_weights

pytestmark = [pytest.mark.integration, pytest.mark.slow, pytest.mark.timeout(900)]


def await_step(step: int, run: str, training: Training, *, started: bool = False) -> None:
    """Wait until a checkpoint of this step or a later one exists, or is being written."""
    pattern = re.compile(r"\.?step_(\d+).*" if started else r"step_(\d+)")
    deadline = time.monotonic() + PATIENCE_S
    while True:
        matches = filter(None, map(pattern.fullmatch, Folder(run).names()))
        if any(int(match[1]) >= step for match in matches):
            return
        assert training.process.poll() is None, training.output()
        assert time.monotonic() < deadline, training.output()
        time.sleep(0.01)


@pytest.mark.parametrize("place", ["local", "s3"])
def test_killed_while_saving_and_started_again(
    place: str, shards: Path, undisturbed: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    storage, environ = str(tmp_path / "runs"), dict[str, str]()
    if place == "s3":
        storage = f"{request.getfixturevalue('bucket')}/runs"
        environ = request.getfixturevalue("server").variables
    run, words = f"{storage}/tiny", [str(TINY), f"data.url={shards}", f"storage={storage}", *WORDS]
    with Training(tmp_path / "killed", words, ENVIRON | environ) as training:
        await_step(10, run, training, started=True)
        os.killpg(training.process.pid, signal.SIGKILL)
        assert training.end() == -signal.SIGKILL
    with Training(tmp_path / "again", words, ENVIRON | environ) as training:
        assert training.end() == 0, training.output()
    assert_same_weights(undisturbed, run)
    assert [name for name in Folder(run).names() if name.startswith(".step")] == []


def test_of_two_drivers_the_older_one_ends(shards: Path, tmp_path: Path) -> None:
    run = str(tmp_path / "runs" / "tiny")
    words = [str(TINY), f"data.url={shards}", f"storage={tmp_path / 'runs'}", *WORDS]
    words += ["train.samples=40000", "train.checkpoint_every=1"]
    with Training(tmp_path / "older", words, ENVIRON) as older:
        await_step(2, run, older)
        with Training(tmp_path / "newer", words, ENVIRON) as newer:
            assert older.end() == 77, older.output()
            assert (
                "superseded by a newer one (attempts/000003.json: host "
                in older.output().splitlines()[-1]
            )
            await_step(steps(Folder(run))[-1] + 2, run, newer)
            newer.process.terminate()
            assert newer.end() == 75, newer.output()
    assert Folder(run).names("attempts")[-1] == "000004.json"
