"""Jobs on a real Ray head that requires a token, submitted from outside as by a user's laptop."""

import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import TINY
from tests.hosts import environment, head, prioritycut

pytestmark = [pytest.mark.integration, pytest.mark.slow]

ENVIRON = environment()


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with head(2, ENVIRON) as url:
        yield url


@pytest.fixture
def here(tmp_path: Path) -> Path:
    """A working directory with a small configuration."""
    folder = tmp_path / "here"
    folder.mkdir()
    (folder / "mine.yaml").write_text(TINY.read_text())
    return folder


def submitted(
    here: Path, address: str, *words: str, **changes: str
) -> "subprocess.CompletedProcess[str]":
    command = ["submit", "mine.yaml", *words, "--address", address]
    return prioritycut(*command, cwd=here, environ={**ENVIRON, **changes})


def test_a_job_trains_and_the_same_submission_resumes(
    address: str, here: Path, shards: Path, tmp_path: Path
) -> None:
    places = [f"data.url={shards}", f"storage={tmp_path / 'runs'}", "name=remote"]
    first = submitted(here, address, *places, "train.samples=16")
    assert first.returncode == 0, first.stdout + first.stderr
    assert "1 file," in first.stdout
    assert "SUCCEEDED, exit code 0" in first.stdout
    second = submitted(here, address, *places, "train.samples=32")
    assert second.returncode == 0, second.stdout + second.stderr
    steps = sorted(path.name for path in (tmp_path / "runs" / "remote").glob("step_*"))
    assert steps[-1] == "step_0000008"
    listed = prioritycut("jobs", "status", "--address", address, cwd=here, environ=ENVIRON)
    assert listed.stdout.count("SUCCEEDED") >= 2


def test_the_drivers_exit_code_and_reason_are_reported(
    address: str, here: Path, tmp_path: Path
) -> None:
    result = submitted(here, address, f"data.url={tmp_path}/none", f"storage={tmp_path}")
    assert result.returncode == 1
    assert "FAILED, exit code 1" in result.stdout
    assert "prioritycut shard" in result.stdout, "the driver's message"
    assert "Traceback" not in result.stderr


def test_a_detached_job_is_followed_stopped_and_resumable(
    address: str, here: Path, shards: Path, tmp_path: Path
) -> None:
    runs = tmp_path / "runs"
    words = [f"data.url={shards}", f"storage={runs}", "name=long", "train.samples=400000"]
    started = submitted(here, address, *words, "--detach")
    assert started.returncode == 0, started.stdout + started.stderr
    [job] = [line.split()[-1] for line in started.stdout.splitlines() if line.startswith("Job:")]
    twice = submitted(here, address, *words, "--detach")
    assert twice.returncode == 1
    assert f"is being trained by job {job}" in twice.stderr
    deadline = time.monotonic() + 180
    while not list(runs.glob("long/step_*")):
        assert time.monotonic() < deadline, "no checkpoint"
        time.sleep(1)
    stop = prioritycut("jobs", "stop", job, "--address", address, cwd=here, environ=ENVIRON)
    assert stop.returncode == 0, stop.stderr
    logs = prioritycut("jobs", "logs", job, "--address", address, cwd=here, environ=ENVIRON)
    assert "training" in logs.stdout
    followed = prioritycut(
        "jobs", "logs", job, "--follow", "--address", address, cwd=here, environ=ENVIRON
    )
    assert followed.returncode != 0, "a stopped job has not finished"
    assert "STOPPED" in followed.stdout


@pytest.mark.parametrize("token", ["", "f" * 32])
def test_without_the_clusters_token_the_fix_is_reported(
    address: str, here: Path, tmp_path: Path, token: str
) -> None:
    changes = {"RAY_AUTH_TOKEN": token} if token else {"RAY_AUTH_MODE": "disabled"}
    result = submitted(here, address, "data.url=/d", "storage=/s", **changes)
    assert result.returncode == 1
    assert "RAY_AUTH_TOKEN" in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1, result.stderr


def test_a_job_that_does_not_exist_is_named(address: str, here: Path) -> None:
    for verb in ("logs", "stop", "status"):
        result = prioritycut(
            "jobs", verb, "no-job", "--address", address, cwd=here, environ=ENVIRON
        )
        assert result.returncode == 1
        assert "no-job: the cluster has no such job" in result.stderr
