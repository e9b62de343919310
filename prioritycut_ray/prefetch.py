"""Work done in a thread while the results before it are used."""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

import torch
from torch import Tensor

T = TypeVar("T")
Tensors = TypeVar("Tensors", bound=tuple[Tensor, ...])


def ahead(
    items: Iterable[T], count: int = 1, *, begin: Callable[[], None] | None = None
) -> Iterator[T]:
    """The same items in the same order, made by a thread while earlier ones are in use.

    Args:
        items: is iterated in the thread alone. Its errors are raised here; items of the same
            portion that came before an error are dropped.
        count: how many are made at a time; up to twice as many wait.
        begin: called once in the thread, first.
    """
    iterator = iter(items)

    def portion() -> list[T]:
        return list(islice(iterator, count))

    with ThreadPoolExecutor(1, thread_name_prefix="ahead", initializer=begin) as thread:
        made = thread.submit(portion)
        while ready := made.result():
            made = thread.submit(portion)
            yield from ready


def ahead_on_gpu(items: Iterable[Tensors], device: torch.device) -> Iterator[Tensors]:
    """As :func:`ahead`, for tensors of a GPU: made on a stream of their own.

    Their transfers and kernels run at the same time as those of the thread that uses them, whose
    stream waits for each item when it is handed over.

    Args:
        items: are made of the host's data alone, not of tensors that another stream computes.
        device: of the tensors.
    """
    stream = torch.cuda.Stream(device)

    def begin() -> None:
        # Device and stream are a thread's own: a new one has the first GPU and its default stream.
        torch.cuda.set_device(device)
        torch.cuda.set_stream(stream)

    marked = ((tensors, stream.record_event()) for tensors in items)
    for tensors, made in ahead(marked, begin=begin):
        consumer = torch.cuda.current_stream(device)
        consumer.wait_event(made)
        for tensor in tensors:
            # Freed, its memory serves `stream` again only when the consumer is done with it.
            tensor.record_stream(consumer)
        yield tensors
