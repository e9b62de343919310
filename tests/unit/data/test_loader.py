"""Loader workers that really die: loading continues, and a deadly clip is skipped."""

import logging
import os
import signal
import threading
import time
from collections.abc import Mapping, Sequence
from multiprocessing import resource_sharer
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

from prioritycut_ray.data import loader
from prioritycut_ray.data.loader import Decoding, load
from prioritycut_ray.errors import UserError

# torch warns of more workers than cores.
pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")
SHARES = [[number] for number in range(12)]


def name_of(clip: int) -> str:
    return f"film{clip}"


class Mortal:
    """Reads a number, unless a worker has yet to die of it; the folder counts its deaths."""

    def __init__(self, folder: Path, deaths: Mapping[int, int], how: signal.Signals) -> None:
        self.folder, self.deaths, self.how = folder, deaths, how

    def __call__(self, numbers: Sequence[int], avoid: Mapping[int, str], decoding: Decoding) -> str:
        [number] = numbers
        if number in avoid:
            return f"{number}: {avoid[number]}"
        with decoding(number):
            died = len(list(self.folder.glob(f"{number}-*")))
            if died < self.deaths.get(number, 0):
                (self.folder / f"{number}-{died}").touch()
                os.kill(os.getpid(), self.how)
        return str(number)


def read_all(
    folder: Path, deaths: Mapping[int, int], how: signal.Signals = signal.SIGSEGV, workers: int = 2
) -> list[str]:
    return list(load(Mortal(folder, deaths, how), SHARES, workers, name_of))


def test_only_a_clip_that_kills_twice_is_avoided(tmp_path: Path, caplog: Any) -> None:
    read = read_all(tmp_path, {5: 99})
    assert read[5] == "5: its decoder dies (SIGSEGV)"
    assert read[:5] + read[6:] == [str(number) for number in range(12) if number != 5]
    # Twice in a row; a death before earlier batches are delivered may be a third.
    assert len(list(tmp_path.glob("5-*"))) >= 2
    assert "a loader worker died (SIGSEGV at clip film5)" in caplog.text


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2, 3])
@pytest.mark.parametrize("deadly", [[0], [0, 1, 2], [3, 5, 11]])
def test_any_clips_may_kill(tmp_path: Path, deadly: list[int], workers: int) -> None:
    once = {number: 1 for number in (4, 8) if number not in deadly}
    read = read_all(tmp_path, dict.fromkeys(deadly, 99) | once, workers=workers)
    assert read == [
        f"{number}: its decoder dies (SIGSEGV)" if number in deadly else str(number)
        for number in range(12)
    ]


def test_no_clip_is_blamed_for_a_kill_from_outside(tmp_path: Path, caplog: Any) -> None:
    read = read_all(tmp_path, {5: 1}, signal.SIGKILL, workers=1)
    assert read == [str(number) for number in range(12)]
    assert "SIGKILL" in caplog.text


def test_batch_whose_worker_dies_before_it_is_taken_over_is_read_again(
    tmp_path: Path, caplog: Any
) -> None:
    class DyingSlowly(Mortal):
        """Closes its connections first and exits a second later, as with a core dump."""

        def __call__(self, numbers: Sequence[int], *given: Any) -> Any:
            if numbers == [2] and not (tmp_path / "closed").exists():
                resource_sharer.stop(timeout=60)
                (tmp_path / "closed").touch()
                time.sleep(1)
                os.kill(os.getpid(), signal.SIGKILL)
            return torch.tensor(int(super().__call__(numbers, *given)))

    # The worker has sent batch 1 when it dies; the memory of that batch disappears with it.
    batches = load(DyingSlowly(tmp_path, {}, signal.SIGKILL), SHARES, 1, name_of)
    first = next(batches)
    deadline = time.monotonic() + 60
    while not (tmp_path / "closed").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert [int(number) for number in [first, *batches]] == list(range(12))
    assert "a loader worker died (SIGKILL)" in caplog.text


def test_endless_dying_ends_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loader, "MOST_DEATHS", 0)
    with pytest.raises(UserError, match=r"died 1 times in a row \(SIGKILL at clip film0\)"):
        read_all(tmp_path, {0: 99}, signal.SIGKILL, workers=1)


def test_warnings_of_workers_are_logged_here(tmp_path: Path, caplog: Any) -> None:
    class Talking(Mortal):
        def __call__(self, *given: Any) -> str:
            logging.getLogger("prioritycut_ray.data").warning("seen %s", given[0])
            return super().__call__(*given)

    list(load(Talking(tmp_path, {}, signal.SIGSEGV), SHARES[:3], 2, name_of))
    assert [record.getMessage() for record in caplog.records] == [
        "seen [0]",
        "seen [1]",
        "seen [2]",
    ]


def test_only_a_gpu_pins_and_the_pinning_thread_has_its_device(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch's pinning thread uses the current device of the thread that starts the workers."""
    device: dict[int, torch.device] = {}  # by thread
    started: list[tuple[bool, torch.device | None]] = []

    class Watched(DataLoader[Any]):
        def __init__(self, *args: Any, pin_memory: bool, **options: Any) -> None:
            super().__init__(*args, **options)
            self.wanted = pin_memory

        def __iter__(self) -> Any:
            started.append((self.wanted, device.get(threading.get_ident())))
            return super().__iter__()

    monkeypatch.setattr(loader, "DataLoader", Watched)
    monkeypatch.setattr(
        torch.cuda, "set_device", lambda new: device.update({threading.get_ident(): new})
    )
    gpu = torch.device("cuda", 1)
    read = Mortal(tmp_path, {}, signal.SIGSEGV)
    for pin_for in (None, gpu):
        assert len(list(load(read, SHARES[:2], 1, name_of, pin_for=pin_for))) == 2
    assert started == [(False, None), (True, gpu)]
    assert threading.get_ident() not in device, "the main thread's device is its own affair"
