"""Items are made ahead: in order, at the same time as they are used, and with their errors."""

import threading
from collections.abc import Iterator

import pytest

from prioritycut_ray.ahead import ahead


@pytest.mark.parametrize("count", [1, 3, 100])
def test_order_and_number_stay(count: int) -> None:
    assert list(ahead(range(10), count)) == list(range(10))
    assert list(ahead([], count)) == []


def test_the_next_item_is_made_while_this_one_is_used() -> None:
    begun = [threading.Event() for _ in range(3)]

    def items() -> Iterator[int]:
        for number, event in enumerate(begun):
            event.set()
            yield number

    for number in ahead(items()):
        assert all(event.wait(30) for event in begun[: number + 2])


def test_an_error_comes_where_its_item_would_have_come() -> None:
    def items() -> Iterator[int]:
        yield from range(4)
        raise ValueError("no fifth")

    made = ahead(items(), 2)
    assert [next(made) for _ in range(4)] == [0, 1, 2, 3]
    with pytest.raises(ValueError, match="no fifth"):
        next(made)


def test_whoever_stops_early_leaves_no_thread() -> None:
    items = ahead(iter(int, 1))
    next(items)
    items.close()
    assert not any(thread.name.startswith("ahead") for thread in threading.enumerate())
