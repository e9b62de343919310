"""Who may write into a run's folder, and what is seen there; local and on S3."""

import json
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest

from prioritycut_ray.errors import Superseded, UserError
from prioritycut_ray.runs.attempts import claim_run
from prioritycut_ray.runs.checkpoints import clean, fetch, newest_intact, steps, write_checkpoint
from prioritycut_ray.storage.claims import Claim
from prioritycut_ray.storage.folder import Folder
from tests import saving
from tests.places import ROOT


@pytest.fixture(params=["local", "s3"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Where a run's folder will be."""
    if request.param == "local":
        return str(tmp_path / "runs" / "mine")
    bucket = request.getfixturevalue("bucket")
    return f"{bucket}/runs/mine"


def write(claim: Claim, step: int) -> None:
    write_checkpoint(claim, step, lambda directory: saving.fill(directory, claim.number))


def newest(url: str, scratch: Path) -> int:
    found = newest_intact(Folder(url), scratch)
    assert found is not None
    return found[0]


def test_a_checkpoint_is_seen_once_it_is_complete(url: str, tmp_path: Path) -> None:
    claim = claim_run(Folder(url), "a", first=True)
    assert newest_intact(Folder(url), tmp_path) is None

    def fill(directory: Path) -> None:
        saving.fill(directory, 1)
        assert steps(Folder(url)) == []

    write_checkpoint(claim, 7, fill)
    assert steps(Folder(url)) == [7]
    assert saving.authors(fetch(Folder(url), 7, tmp_path)) == {b"\0\0\0\1"}
    with pytest.raises(RuntimeError, match="in the middle"):
        write_checkpoint(claim, 8, lambda directory: _fail())
    assert steps(Folder(url)) == [7]


def _fail() -> None:
    raise RuntimeError("in the middle")


@pytest.mark.parametrize("damage", ["truncated", "altered", "missing", "manifest", "elsewhere"])
def test_damaged_checkpoints_are_skipped_and_named(
    url: str, damage: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = Folder(url)
    claim = claim_run(folder, "a", first=True)
    for step in (1, 2, 3):
        write(claim, step)
    file = "step_0000003/3.bin"
    if damage == "truncated":
        folder.write(file, folder.read(file)[:-1])
    elif damage == "altered":
        folder.write(file, folder.read(file)[:-1] + b"?")
    elif damage == "missing":
        folder.remove(file)
    elif damage == "manifest":
        manifest = folder.read("step_0000003/manifest.json")
        folder.write("step_0000003/manifest.json", manifest[: len(manifest) // 2])
    else:
        folder.write("step_0000003/manifest.json", json.dumps({"../1.bin": "0"}).encode())
    with caplog.at_level(logging.WARNING):
        assert newest(url, tmp_path) == 2
    assert "step_0000003" in caplog.text
    assert "trying the previous one" in caplog.text
    write(claim, 3)
    assert newest(url, tmp_path) == 3, "written again when the run gets there"


def test_a_run_does_not_start_over_if_all_checkpoints_are_damaged(url: str, tmp_path: Path) -> None:
    folder = Folder(url)
    write(claim_run(folder, "a", first=True), 1)
    folder.write("step_0000001/3.bin", b"?")
    with pytest.raises(UserError, match=r"none of the 1 checkpoints is usable.*3\.bin"):
        newest_intact(folder, tmp_path)


def test_the_last_of_many_simultaneous_claims_holds_the_run(url: str) -> None:
    def take(number: int) -> Claim:
        return claim_run(Folder(url), str(number), first=True)

    with ThreadPoolExecutor(8) as pool:
        claims = sorted(pool.map(take, range(8)), key=lambda claim: claim.number)
    assert [claim.number for claim in claims] == list(range(1, 9))
    claims[-1].check()
    for claim in claims[:-1]:
        with pytest.raises(Superseded, match=r"attempts/000008\.json: host .*, process \d"):
            claim.check()


def test_an_attempt_whose_claim_was_removed_writes_nothing(url: str) -> None:
    claim = claim_run(Folder(url), "old", first=True)
    claim.folder.remove("attempts")
    with pytest.raises(Superseded, match=r"attempts/000001\.json\) was removed"):
        write(claim, 1)
    assert claim_run(Folder(url), "new", first=True).number == 1


def test_the_file_of_an_attempt_is_read(url: str) -> None:
    folder = Folder(url)
    content = (
        b'{"number":3,"launch":"5d1f","host":"gpu-1","pid":7,"started":"2026-11-29T03:00:00+00:00"}'
    )
    folder.write("attempts/000003.json", content)
    with pytest.raises(Superseded, match="host gpu-1, process 7, since 2026-11-29T03:00:00"):
        claim_run(folder, "another", first=False)
    assert claim_run(folder, "5d1f", first=False).number == 4


def test_workers_of_an_older_command_do_not_take_over(url: str) -> None:
    folder = Folder(url)
    claim_run(folder, "old", first=True)
    workers = claim_run(folder, "old", first=False)
    claim_run(folder, "new", first=True)
    with pytest.raises(Superseded, match=r"attempts/000003\.json"):
        workers.check()
    with pytest.raises(Superseded, match=r"attempts/000003\.json"):
        claim_run(folder, "old", first=False)
    assert claim_run(folder, "new", first=False).number == 4


def test_what_an_older_attempt_is_writing_is_never_seen(url: str, tmp_path: Path) -> None:
    old = claim_run(Folder(url), "old", first=True)

    def overtaken(directory: Path) -> None:
        saving.fill(directory, old.number)
        new = claim_run(Folder(url), "new", first=True)
        clean(new)
        write(new, 5)

    with pytest.raises((Superseded, FileNotFoundError)):
        write_checkpoint(old, 5, overtaken)
    with pytest.raises(Superseded):
        write(old, 6)
    folder = Folder(url)
    assert steps(folder) == [5]
    assert saving.authors(fetch(folder, 5, tmp_path)) == {b"\0\0\0\2"}
    assert [name for name in folder.names() if name.startswith(".")] == []


@contextmanager
def saver(url: str) -> Iterator["subprocess.Popen[str]"]:
    """An attempt as a process of its own."""
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.saving", url],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stdout is not None
    assert process.stderr is not None
    with process.stdout, process.stderr:
        try:
            yield process
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            process.wait(60)


def await_step(process: "subprocess.Popen[str]") -> int:
    """Return the next step that a saver commits."""
    assert process.stdout is not None
    line = process.stdout.readline()
    assert line, process.stderr.read() if process.stderr else ""
    return int(line)


def test_the_older_of_two_processes_ends(url: str, tmp_path: Path) -> None:
    with saver(url) as old:
        await_step(old)
        with saver(url) as new:
            for _ in range(2):
                last = await_step(new)
            _, errors = old.communicate(timeout=120)
            assert errors.startswith("77 "), errors
            assert "superseded by a newer one (attempts/000002.json: " in errors
            last = await_step(new)
    assert newest(url, tmp_path) >= last
    folder = Folder(url)
    for step in steps(folder):
        assert len(saving.authors(fetch(folder, step, tmp_path))) == 1, (
            "one process wrote all of it"
        )


@pytest.mark.parametrize("stride", [pytest.param(1, marks=pytest.mark.slow), 5])
def test_killed_at_every_line_of_writing(stride: int, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.saving", str(tmp_path), str(stride)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=250,
        start_new_session=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[-1]) > 100


def test_killed_while_uploading(bucket: str, tmp_path: Path) -> None:
    url, last = f"{bucket}/mine", 0
    for kill in range(2):
        with saver(url) as process:
            for _ in range(kill + 1):
                last = await_step(process)
            os.killpg(process.pid, signal.SIGKILL)
        folder = Folder(url)
        assert newest(url, tmp_path) in (last, last + 1)
        for step in steps(folder):
            fetch(folder, step, tmp_path)  # raises if it is damaged
    clean(claim_run(folder, "next", first=True))
    seen = {name for name in folder.names() if name.startswith("step_")}
    assert seen == {f"step_{step:07d}" for step in steps(folder)}
