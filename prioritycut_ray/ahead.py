"""Work done in a thread while the results before it are used."""

from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

T = TypeVar("T")


def ahead(items: Iterable[T], count: int = 1) -> Iterator[T]:
    """The same items in the same order, made by a thread while earlier ones are in use.

    Args:
        items: is iterated in the thread alone. Its errors are raised here; items of the same
            portion that came before an error are dropped.
        count: how many are made at a time; up to twice as many wait.
    """
    iterator = iter(items)

    def portion() -> list[T]:
        return list(islice(iterator, count))

    with ThreadPoolExecutor(1, thread_name_prefix="ahead") as thread:
        made = thread.submit(portion)
        while ready := made.result():
            made = thread.submit(portion)
            yield from ready
