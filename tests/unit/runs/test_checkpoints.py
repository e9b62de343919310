"""Who may write into a run's folder, what is seen there, and what is kept; local and on S3."""

import json
import logging
import math
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prioritycut_ray.errors import Superseded, UserError
from prioritycut_ray.runs.attempts import Lease, claim
from prioritycut_ray.runs.checkpoints import clean, fetch, newest_good, steps, write_checkpoint
from prioritycut_ray.runs.retention import Retention, expendable
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


def write(lease: Lease, step: int) -> None:
    write_checkpoint(lease, step, lambda directory: saving.fill(directory, lease.attempt.number))


def newest(url: str, scratch: Path) -> int:
    found = newest_good(Folder(url), scratch)
    assert found is not None
    return found[0]


def test_a_checkpoint_is_seen_when_it_is_whole(url: str, tmp_path: Path) -> None:
    lease = claim(Folder(url), "a", first=True)
    assert newest_good(Folder(url), tmp_path) is None

    def fill(directory: Path) -> None:
        saving.fill(directory, 1)
        assert steps(Folder(url)) == []

    write_checkpoint(lease, 7, fill)
    assert steps(Folder(url)) == [7]
    assert saving.authors(fetch(Folder(url), 7, tmp_path)) == {b"\0\0\0\1"}
    with pytest.raises(RuntimeError, match="in the middle"):
        write_checkpoint(lease, 8, lambda directory: _fail())
    assert steps(Folder(url)) == [7]


def _fail() -> None:
    raise RuntimeError("in the middle")


@pytest.mark.parametrize("damage", ["truncated", "altered", "missing", "manifest", "elsewhere"])
def test_damage_is_passed_over_and_told(
    url: str, damage: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    storage = Folder(url)
    lease = claim(storage, "a", first=True)
    for step in (1, 2, 3):
        write(lease, step)
    file = "step_0000003/3.bin"
    if damage == "truncated":
        storage.write(file, storage.read(file)[:-1])
    elif damage == "altered":
        storage.write(file, storage.read(file)[:-1] + b"?")
    elif damage == "missing":
        storage.remove(file)
    elif damage == "manifest":
        manifest = storage.read("step_0000003/manifest.json")
        storage.write("step_0000003/manifest.json", manifest[: len(manifest) // 2])
    else:
        storage.write("step_0000003/manifest.json", json.dumps({"../1.bin": "0"}).encode())
    with caplog.at_level(logging.WARNING):
        assert newest(url, tmp_path) == 2
    assert "step_0000003" in caplog.text
    assert "trying the one before it" in caplog.text
    write(lease, 3)
    assert newest(url, tmp_path) == 3, "written anew when the run comes there again"


def test_if_all_are_damaged_the_run_is_not_begun_afresh(url: str, tmp_path: Path) -> None:
    storage = Folder(url)
    write(claim(storage, "a", first=True), 1)
    storage.write("step_0000001/3.bin", b"?")
    with pytest.raises(UserError, match=r"no usable checkpoint among the 1.*3\.bin"):
        newest_good(storage, tmp_path)


# ---------------------------------------------------------------------------------------------
# Attempts
# ---------------------------------------------------------------------------------------------


def test_of_all_who_take_a_run_over_at_once_the_last_holds_it(url: str) -> None:
    def take(number: int) -> Lease:
        return claim(Folder(url), str(number), first=True)

    with ThreadPoolExecutor(8) as pool:
        leases = sorted(pool.map(take, range(8)), key=lambda lease: lease.attempt.number)
    assert [lease.attempt.number for lease in leases] == list(range(1, 9))
    leases[-1].check()
    for lease in leases[:-1]:
        with pytest.raises(Superseded, match=r"superseded by attempt \d.*process"):
            lease.check()


def test_a_group_of_an_older_launch_does_not_take_over(url: str) -> None:
    storage = Folder(url)
    claim(storage, "old", first=True)
    group = claim(storage, "old", first=False)
    claim(storage, "new", first=True)
    with pytest.raises(Superseded, match="by attempt 3"):
        group.check()
    with pytest.raises(Superseded, match="by attempt 3"):
        claim(storage, "old", first=False)
    assert claim(storage, "new", first=False).attempt.number == 4


def test_what_an_older_attempt_is_writing_is_never_seen(url: str, tmp_path: Path) -> None:
    old = claim(Folder(url), "old", first=True)

    def overtaken(directory: Path) -> None:
        saving.fill(directory, old.attempt.number)
        new = claim(Folder(url), "new", first=True)
        clean(new)
        write(new, 5)

    with pytest.raises((Superseded, FileNotFoundError)):
        write_checkpoint(old, 5, overtaken)
    with pytest.raises(Superseded):
        write(old, 6)
    storage = Folder(url)
    assert steps(storage) == [5]
    assert saving.authors(fetch(storage, 5, tmp_path)) == {b"\0\0\0\2"}
    assert [name for name in storage.names() if name.startswith(".")] == []


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
    """The next step that a saver has committed."""
    assert process.stdout is not None
    line = process.stdout.readline()
    assert line, process.stderr.read() if process.stderr else ""
    return int(line)


def test_of_two_processes_the_older_one_ends(url: str, tmp_path: Path) -> None:
    with saver(url) as old:
        await_step(old)
        with saver(url) as new:
            for _ in range(2):
                last = await_step(new)
            _, errors = old.communicate(timeout=120)
            assert errors.startswith("77 "), errors
            assert "superseded by attempt 2" in errors
            last = await_step(new)
    assert newest(url, tmp_path) >= last
    storage = Folder(url)
    for step in steps(storage):
        assert len(saving.authors(fetch(storage, step, tmp_path))) == 1, "never two hands in one"


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
        storage = Folder(url)
        assert newest(url, tmp_path) in (last, last + 1)
        for step in steps(storage):
            fetch(storage, step, tmp_path)  # raises if it is damaged
    clean(claim(storage, "next", first=True))
    seen = {name for name in storage.names() if name.startswith("step_")}
    assert seen == {f"step_{step:07d}" for step in steps(storage)}


# ---------------------------------------------------------------------------------------------
# Retention
# ---------------------------------------------------------------------------------------------


@given(
    scores=st.dictionaries(st.integers(1, 500), st.none() | st.floats(), min_size=1, max_size=40),
    newest=st.integers(1, 5),
    best=st.integers(0, 5),
    every=st.integers(0, 50),
)
def test_retention(scores: dict[int, float | None], newest: int, best: int, every: int) -> None:
    retention = Retention(newest, best, every)
    removed = set(expendable(scores, retention))
    kept = scores.keys() - removed
    steps = sorted(scores)
    assert kept >= set(steps[-newest:]), "the last one always"
    assert not every or all(step in kept for step in steps if step % every == 0)
    ranked = sorted((s, -i) for i, s in scores.items() if s is not None and math.isfinite(s))
    assert kept >= {-step for _, step in ranked[:best]}
    assert len(kept) <= newest + best + (len(steps) if every else 0)
    after = {step: scores[step] for step in kept}
    assert expendable(after, retention) == [], "removing once is enough"


def test_imported_weights_are_not_removed() -> None:
    assert expendable({0: None, 1: None, 2: None}, Retention(1, 0, 0)) == [1]


def test_an_unknown_scheme_is_told() -> None:
    with pytest.raises(UserError, match="cannot be reached"):
        Folder("nosuch://bucket/mine")
