"""What rank 0 writes into a run's folder in the background; local, on S3, and on a full disk."""

import json
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from prioritycut_ray.errors import DiskFull, Superseded
from prioritycut_ray.runs.attempts import claim_run
from prioritycut_ray.runs.checkpoints import newest_intact, steps
from prioritycut_ray.runs.retention import Retention
from prioritycut_ray.runs.verdicts import Verdict, read_verdicts
from prioritycut_ray.runs.writer import RunWriter
from prioritycut_ray.storage.folder import Folder
from prioritycut_ray.training.tracking import Tracker
from tests import saving


@pytest.fixture(params=["local", "s3"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Where a run's folder will be."""
    return str(tmp_path / "mine") if request.param == "local" else new_bucket(request)


def new_bucket(request: pytest.FixtureRequest) -> str:
    return f"{request.getfixturevalue('bucket')}/runs/mine"


def writer_of(
    url: str, *, start: int = 0, best: int = 0, every: int = 0, metric: str = "loss"
) -> RunWriter:
    """Return the writer of a new attempt."""
    claim = claim_run(Folder(url), "test", first=True)
    return RunWriter(claim, start=start, retention=Retention(2, best, every), metric=metric)


fill = partial(saving.fill, attempt=1)


def rows(url: str) -> list[int]:
    folder = Folder(url)
    names = [f"metrics/{name}" for name in folder.names("metrics")]
    return [json.loads(line)["step"] for name in names for line in folder.read(name).splitlines()]


def test_rows_beyond_the_start_are_dropped(url: str) -> None:
    with writer_of(url) as writer:
        for step in range(1, 101):
            writer.log({"step": step, "loss": 1.0})
        writer.flush()
        assert rows(url) == list(range(1, 101))
    with writer_of(url, start=70) as writer:
        writer.log({"step": 71, "loss": 1.0})
    assert rows(url) == list(range(1, 72))
    with writer_of(url):
        pass
    assert rows(url) == []


def test_a_row_that_a_kill_has_cut_off_is_dropped(tmp_path: Path) -> None:
    with writer_of(str(tmp_path)) as writer:
        writer.log({"step": 1})
        writer.log({"step": 2})
    (file,) = (tmp_path / "metrics").iterdir()
    file.write_bytes(file.read_bytes()[:-4])
    with writer_of(str(tmp_path), start=2):
        pass
    assert rows(str(tmp_path)) == [1]


def test_the_best_of_all_attempts_are_kept(url: str) -> None:
    losses = {1: 3.0, 2: 1.0, 3: 2.0, 4: 5.0, 5: float("nan"), 6: 1.5, 7: 4.0}
    for numbers in ((1, 2, 3), (4, 5, 6, 7)):
        with writer_of(url, start=numbers[0] - 1, best=1, every=4) as writer:
            for step in numbers:
                writer.save(step, {"loss": losses[step]}, fill)
    assert steps(Folder(url)) == [2, 4, 6, 7]


def verdict(step: int, l1: float, sample: str = "a") -> Verdict:
    return Verdict(step=step, sample=sample, clips=1, skipped={}, scores={"val/l1": l1})


def test_a_checkpoint_is_held_until_its_verdict_which_ranks_it(url: str) -> None:
    with writer_of(url, best=1, metric="val/l1") as writer:
        for step in range(1, 7):
            writer.save(step, {}, fill)
            if step < 4:
                writer.hold(step)
        writer.flush()
        assert steps(Folder(url)) == [1, 2, 3, 5, 6]
        writer.conclude(verdict(1, 0.3))
        writer.conclude(verdict(2, 0.2))
        writer.release(3)
        writer.conclude(verdict(5, float("nan")))
    assert steps(Folder(url)) == [2, 5, 6]
    with writer_of(url, start=6, best=1, metric="val/l1") as writer:
        writer.save(7, {}, fill)
    assert steps(Folder(url)) == [2, 6, 7]
    assert [v.step for v in read_verdicts(Folder(url))] == [1, 2, 5]


def test_verdicts_beyond_the_start_are_dropped(url: str) -> None:
    with writer_of(url) as writer:
        for step in (1, 2, 3):
            writer.conclude(verdict(step, 0.1))
    with writer_of(url, start=2):
        pass
    assert [v.step for v in read_verdicts(Folder(url))] == [1, 2]


def test_one_checkpoint_is_written_at_a_time(tmp_path: Path) -> None:
    release, order = threading.Event(), list[str]()

    def slow(directory: Path) -> None:
        assert release.wait(60)
        fill(directory)

    def let_go() -> None:
        order.append("let go")
        release.set()

    with writer_of(str(tmp_path)) as writer:
        writer.save(1, {}, slow)
        order.append("training continues")
        threading.Timer(0.1, let_go).start()
        writer.save(2, {}, fill)
        order.append("saved again")
    assert order == ["training continues", "let go", "saved again"]
    assert steps(Folder(tmp_path)) == [1, 2]


def test_a_background_error_is_raised_by_the_next_call(tmp_path: Path) -> None:
    def broken(directory: Path) -> None:
        raise RuntimeError("broken")

    writer = writer_of(str(tmp_path))
    writer.save(1, {}, broken)
    with pytest.raises(RuntimeError, match="broken"):
        writer.wait()
    with pytest.raises(RuntimeError, match="broken"):
        writer.log({"step": 1})
    with pytest.raises(RuntimeError, match="broken"):
        writer.save(2, {}, fill)
    with pytest.raises(RuntimeError, match="broken"), writer:
        pass
    assert steps(Folder(tmp_path)) == []


def test_an_attempt_that_has_lost_the_run_writes_nothing(url: str) -> None:
    old = writer_of(url)
    old.save(1, {}, fill)
    old.wait()
    with writer_of(url, start=1):
        pass
    lost = old.save(2, {}, fill)
    with pytest.raises(Superseded):
        lost.result()
    with pytest.raises(Superseded), old:
        old.log({"step": 2})
    assert steps(Folder(url)) == [1]
    assert rows(url) == []


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of one megabyte."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "none", str(folder)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("this user may not mount a file system")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_a_full_disk_is_named_and_leaves_checkpoints_intact(
    small_disk: Path, tmp_path: Path
) -> None:
    run = small_disk / "mine"

    def too_much(directory: Path) -> None:
        fill(directory)
        (directory / "large.bin").write_bytes(bytes(2_000_000))

    writer = writer_of(str(run))
    writer.save(1, {}, fill)
    writer.save(2, {}, too_much)
    with pytest.raises(DiskFull, match=f"{run}: no space left") as caught, writer:
        pass
    assert caught.value.exit_code == 73
    found = newest_intact(Folder(run), tmp_path)
    assert found is not None
    assert found[0] == 1
    with writer_of(str(run), start=1) as writer:
        writer.save(2, {}, fill)
    assert steps(Folder(run)) == [1, 2], "with less to write the run continues"


def test_tensorboard_continues_in_place(url: str) -> None:
    """Killed before the first checkpoint, then once more after one at step 4."""
    for start, numbers in ((0, (2, 4, 6)), (0, (2, 4, 6)), (4, (6, 8))):
        # TensorBoard reads event files in the order of their names, which begin with the second.
        time.sleep(1)
        with writer_of(url, start=start) as writer:
            tracker = Tracker(writer, start=start)
            for step in numbers:
                tracker.scalars({"loss": float(step)}, step)
                tracker.pictures({"columns": torch.zeros(3, 4, 4, dtype=torch.uint8)}, step)
            writer.flush()
            if numbers[-1] == 8:
                tracker.close()
    events = EventAccumulator(f"{url}/tensorboard")
    events.Reload()
    assert [event.step for event in events.Scalars("loss")] == [2, 4, 6, 8]
    assert [event.step for event in events.Images("columns")] == [2, 4, 6, 8]
    assert rows(url) == [2, 4, 6, 8]
