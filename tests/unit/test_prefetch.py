"""Prefetched items come in order, with their errors, and are made while others are in use."""

import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from prioritycut_ray.prefetch import prefetch, prefetch_on_gpu


@pytest.mark.parametrize("count", [1, 3, 100])
def test_order_and_number_are_kept(count: int) -> None:
    assert list(prefetch(range(10), count)) == list(range(10))
    assert list(prefetch([], count)) == []


def test_the_next_item_is_made_while_this_one_is_used() -> None:
    begun = [threading.Event() for _ in range(3)]

    def items() -> Iterator[int]:
        for number, event in enumerate(begun):
            event.set()
            yield number

    for number in prefetch(items()):
        assert all(event.wait(30) for event in begun[: number + 2])


def test_an_error_is_raised_in_place_of_its_item() -> None:
    def items() -> Iterator[int]:
        yield from range(4)
        raise ValueError("no fifth")

    made = prefetch(items(), 2)
    assert [next(made) for _ in range(4)] == [0, 1, 2, 3]
    with pytest.raises(ValueError, match="no fifth"):
        next(made)


def test_closing_early_leaves_no_thread() -> None:
    items = prefetch(iter(int, 1))
    next(items)
    items.close()
    assert not any(thread.name.startswith("prefetch") for thread in threading.enumerate())


class Recorder:
    """Stands in for torch.cuda and its streams: notes each call and the thread that made it."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, str]] = []
        self.users = self.Stream("users")

    def note(self, call: str) -> None:
        thread = "prefetch" if threading.current_thread().name.startswith("prefetch") else "user"
        self.calls.append((thread, call))

    def Stream(self, name: object) -> "RecordedStream":
        return RecordedStream(self, "own" if isinstance(name, torch.device) else str(name))

    def set_device(self, device: torch.device) -> None:
        self.note(f"device {device}")

    def set_stream(self, stream: "RecordedStream") -> None:
        self.note(f"stream {stream.name}")

    def current_stream(self, device: torch.device) -> "RecordedStream":
        return self.users


class RecordedStream:
    def __init__(self, recorder: Recorder, name: str) -> None:
        self.recorder, self.name, self.events = recorder, name, 0

    def record_event(self) -> str:
        self.events += 1
        self.recorder.note(f"event {self.events} on {self.name}")
        return f"event {self.events}"

    def wait_event(self, event: str) -> None:
        self.recorder.note(f"{self.name} waits for {event}")


class RecordedTensor:
    def __init__(self, recorder: Recorder, name: str) -> None:
        self.recorder, self.name = recorder, name

    def record_stream(self, stream: RecordedStream) -> None:
        self.recorder.note(f"{self.name} kept for {stream.name}")


def test_gpu_items_are_made_on_a_separate_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the right device; the consumer waits for them, and their memory for the consumer."""
    recorder = Recorder()
    monkeypatch.setattr(torch, "cuda", recorder)

    def items() -> Iterator[Any]:
        for number in range(2):
            recorder.note(f"made {number}")
            yield RecordedTensor(recorder, f"{number}a"), RecordedTensor(recorder, f"{number}b")

    for first, _ in prefetch_on_gpu(items(), torch.device("cuda", 1)):
        recorder.note(f"used {first.name}")
    by = {
        who: [call for thread, call in recorder.calls if thread == who]
        for who in ("prefetch", "user")
    }
    assert by["prefetch"] == [
        *("device cuda:1", "stream own"),
        *("made 0", "event 1 on own", "made 1", "event 2 on own"),
    ]
    assert by["user"] == [
        *("users waits for event 1", "0a kept for users", "0b kept for users", "used 0a"),
        *("users waits for event 2", "1a kept for users", "1b kept for users", "used 1a"),
    ]
