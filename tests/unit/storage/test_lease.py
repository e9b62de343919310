"""The lease: one holder, expiry without trust in clocks, fencing."""

import json
import multiprocessing
import time
from datetime import UTC, datetime, timedelta
from multiprocessing.queues import Queue
from multiprocessing.synchronize import Barrier, Event
from pathlib import Path

import pytest

from prioritycut_ray.errors import LeaseHeld, Superseded
from prioritycut_ray.storage.folder import Folder
from prioritycut_ray.storage.lease import LeaseRecord, leased

SHORT = 0.4


@pytest.fixture(params=["local", "memory"])
def models(request: pytest.FixtureRequest, tmp_path: Path) -> Folder:
    """An empty folder, on disk and on an object store of this process."""
    url = str(tmp_path / "models") if request.param == "local" else f"memory:/{tmp_path}"
    return Folder(url)


def left_behind(models: Folder, *, hours: float, seconds: float = SHORT) -> None:
    """Leave the lease of a dead holder whose clock was ``hours`` ahead of ours."""
    record = LeaseRecord(
        owner="somewhere, process 1",
        renewed=datetime.now(UTC) + timedelta(hours=hours),
        seconds=seconds,
    )
    models.write("lease/000001.json", record.model_dump_json().encode())


def test_a_second_process_learns_who_holds_the_lease(models: Folder) -> None:
    with leased(models, 60) as lease:
        lease.check()
        with (
            pytest.raises(LeaseHeld, match="another process is working there") as caught,
            leased(models, 60),
        ):
            pass
    assert caught.value.exit_code == 78
    assert "process" in str(caught.value)


def test_a_released_lease_is_free_at_once(models: Folder) -> None:
    tokens = []
    for _ in range(3):
        with leased(models, 3600) as lease:
            tokens.append(lease.token)
    assert tokens == [1, 2, 3]


def test_it_is_released_when_the_body_fails(models: Folder) -> None:
    with pytest.raises(RuntimeError), leased(models, 3600):
        raise RuntimeError
    with leased(models, 3600) as lease:
        assert lease.token == 2


def test_the_lease_of_a_dead_holder_is_held_until_it_expires(models: Folder) -> None:
    left_behind(models, hours=0, seconds=3600)
    with pytest.raises(LeaseHeld, match="somewhere, process 1"), leased(models, 60):
        pass


def test_the_file_of_a_released_lease_is_read(models: Folder) -> None:
    content = (
        b'{"owner":"gpu-1, process 7, 0f1e2d3c","renewed":"2026-11-29T03:00:00.123456Z",'
        b'"seconds":60.0,"renewals":40,"released":true}'
    )
    models.write("lease/000007.json", content)
    with leased(models, 60) as lease:
        assert lease.token == 8


@pytest.mark.parametrize("hours", [-5, 5])
def test_the_lease_of_a_dead_holder_expires_whatever_its_clock_said(
    models: Folder, hours: float
) -> None:
    left_behind(models, hours=hours)
    began = time.monotonic()
    with leased(models, SHORT) as lease:
        assert lease.token == 2
    assert time.monotonic() - began >= SHORT, "watched for the whole duration"


@pytest.mark.parametrize("hours", [-5, 5])
def test_a_living_holder_with_a_wrong_clock_keeps_its_lease(models: Folder, hours: float) -> None:
    def wrong_clock() -> datetime:
        return datetime.now(UTC) + timedelta(hours=hours)

    with leased(models, 2.0, clock=wrong_clock) as lease:
        deadline = time.monotonic() + 60
        while json.loads(models.read("lease/000001.json"))["renewals"] < 1:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        with pytest.raises(LeaseHeld), leased(models, 2.0):
            pass
        lease.check()


def test_a_process_that_lost_the_lease_may_not_write(models: Folder) -> None:
    with leased(models, 3600) as frozen:
        models.write(
            "lease/000002.json",
            LeaseRecord(owner="other", renewed=datetime.now(UTC), seconds=1)
            .model_dump_json()
            .encode(),
        )
        with pytest.raises(
            Superseded, match=r"superseded by a newer one \(lease/000002\.json: other"
        ):
            frozen.check()
    assert b"other" in models.read("lease/000002.json"), "it releases nothing but its own"


def _contend(url: str, start: Barrier, finish: Event, outcomes: "Queue[str]") -> None:
    start.wait(60)
    try:
        with leased(Folder(url), 3600):
            outcomes.put("held")
            assert finish.wait(60)
    except LeaseHeld:
        outcomes.put("refused")


def test_of_many_processes_at_once_one_wins(tmp_path: Path) -> None:
    """The winner holds the lease until all have tried: a late process cannot win as well."""
    context = multiprocessing.get_context("fork")
    start, finish, outcomes = context.Barrier(4), context.Event(), context.Queue()
    arguments = (str(tmp_path), start, finish, outcomes)
    children = [context.Process(target=_contend, args=arguments) for _ in range(4)]
    for child in children:
        child.start()
    seen = [outcomes.get(timeout=60) for _ in children]
    finish.set()
    for child in children:
        child.join(60)
    assert [child.exitcode for child in children] == [0, 0, 0, 0]
    assert sorted(seen) == ["held", "refused", "refused", "refused"]
