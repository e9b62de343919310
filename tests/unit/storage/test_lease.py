"""The lock of a retraining: one owner, expiry without trust in clocks, fencing."""

import json
import multiprocessing
import threading
import time
from datetime import UTC, datetime, timedelta, tzinfo
from pathlib import Path

import pytest

from prioritycut_ray.errors import LeaseHeld, Superseded
from prioritycut_ray.storage import lease as lease_module
from prioritycut_ray.storage.folder import Folder
from prioritycut_ray.storage.lease import Holder, leased

SHORT = 0.4


@pytest.fixture(params=["local", "memory"])
def models(request: pytest.FixtureRequest, tmp_path: Path) -> Folder:
    """An empty folder, on disk and on an object store of this process."""
    url = str(tmp_path / "models") if request.param == "local" else f"memory:/{tmp_path}"
    return Folder(url)


def left_behind(models: Folder, *, hours: float, seconds: float = SHORT) -> None:
    """A lease whose owner is dead; its clock was so many hours ahead of ours."""
    holder = Holder(
        owner="somewhere, process 1",
        renewed=datetime.now(UTC) + timedelta(hours=hours),
        seconds=seconds,
    )
    models.write("lease/000001.json", holder.model_dump_json().encode())


def test_the_second_is_told_who_is_at_work(models: Folder) -> None:
    with leased(models, 60) as lease:
        lease.check()
        with pytest.raises(LeaseHeld, match="another run is at work") as caught, leased(models, 60):
            pass
    assert caught.value.exit_code == 78
    assert "process" in str(caught.value)


def test_a_lease_that_was_given_back_is_free_at_once(models: Folder) -> None:
    tokens = []
    for _ in range(3):
        with leased(models, 3600) as lease:
            tokens.append(lease.token)
    assert tokens == [1, 2, 3]


def test_it_is_given_back_when_the_body_fails(models: Folder) -> None:
    with pytest.raises(RuntimeError), leased(models, 3600):
        raise RuntimeError
    with leased(models, 3600) as lease:
        assert lease.token == 2


def test_a_dead_owners_lease_is_held_until_it_runs_out(models: Folder) -> None:
    left_behind(models, hours=0, seconds=3600)
    with pytest.raises(LeaseHeld, match="somewhere, process 1"), leased(models, 60):
        pass


@pytest.mark.parametrize("hours", [-5, 5])
def test_a_dead_owners_lease_expires_whatever_its_clock_said(models: Folder, hours: float) -> None:
    left_behind(models, hours=hours)
    began = time.monotonic()
    with leased(models, SHORT) as lease:
        assert lease.token == 2
    assert time.monotonic() - began >= SHORT, "watched for the whole time of the lease"


@pytest.mark.parametrize("hours", [-5, 5])
def test_a_living_owner_with_a_wrong_clock_keeps_its_lease(
    models: Folder, hours: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Skewed(datetime):
        """The clock of the owner's thread is wrong, that of the main thread is right."""

        @classmethod
        def now(cls, tz: tzinfo | None = None) -> "Skewed":
            wrong = 3600 * hours if threading.current_thread().name == "lease" else 0
            return cls.fromtimestamp(time.time() + wrong, tz)

    monkeypatch.setattr(lease_module, "datetime", Skewed)
    with leased(models, 2.0) as lease:
        deadline = time.monotonic() + 60
        while json.loads(models.read("lease/000001.json"))["renewals"] < 1:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        with pytest.raises(LeaseHeld), leased(models, 2.0):
            pass
        lease.check()


def test_who_lost_the_lease_may_not_write(models: Folder) -> None:
    with leased(models, 3600) as frozen:
        models.write(
            "lease/000002.json",
            Holder(owner="other", renewed=datetime.now(UTC), seconds=1).model_dump_json().encode(),
        )
        with pytest.raises(Superseded, match=r"number 1.*number 2"):
            frozen.check()
    assert b"other" in models.read("lease/000002.json"), "it gives back its own alone"


def _contend(url: str, results: "multiprocessing.Queue[str]") -> None:
    try:
        with leased(Folder(url), 60):
            results.put("held")
            time.sleep(2)
    except LeaseHeld:
        results.put("refused")


def test_of_many_processes_at_once_one_wins(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    children = [context.Process(target=_contend, args=(str(tmp_path), results)) for _ in range(4)]
    for child in children:
        child.start()
    outcomes = [results.get(timeout=60) for _ in children]
    for child in children:
        child.join(60)
    assert sorted(outcomes) == ["held", "refused", "refused", "refused"]
