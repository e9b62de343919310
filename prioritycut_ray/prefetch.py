"""Prefetching: a thread makes the next items while the current ones are in use."""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

import torch
from torch import Tensor

T = TypeVar("T")
Tensors = TypeVar("Tensors", bound=tuple[Tensor, ...])


def prefetch(
    items: Iterable[T], count: int = 1, *, begin: Callable[[], None] | None = None
) -> Iterator[T]:
    """Yield the same items in the same order, made by a thread while earlier ones are in use.

    Args:
        items: iterated in the thread only. Its errors are raised here; items of the same chunk
            that precede an error are dropped.
        count: items made at a time; up to twice as many wait.
        begin: called once in the thread before anything else.
    """
    iterator = iter(items)

    def chunk() -> list[T]:
        return list(islice(iterator, count))

    with ThreadPoolExecutor(1, thread_name_prefix="prefetch", initializer=begin) as thread:
        made = thread.submit(chunk)
        while ready := made.result():
            made = thread.submit(chunk)
            yield from ready


def prefetch_on_gpu(items: Iterable[Tensors], device: torch.device) -> Iterator[Tensors]:
    """Prefetch tensors of a GPU; they are made on a separate stream.

    Their transfers and kernels run concurrently with those of the consuming thread, whose stream
    waits for each item when it is yielded.

    Args:
        items: made from host data only, not from tensors that another stream computes.
        device: of the tensors.
    """
    stream = torch.cuda.Stream(device)

    def begin() -> None:
        # Device and stream are thread-local: a new thread has the first GPU's default stream.
        torch.cuda.set_device(device)
        torch.cuda.set_stream(stream)

    marked = ((tensors, stream.record_event()) for tensors in items)
    for tensors, made in prefetch(marked, begin=begin):
        consumer = torch.cuda.current_stream(device)
        consumer.wait_event(made)
        for tensor in tensors:
            # `stream` must not reuse the memory before the consumer has finished with it.
            tensor.record_stream(consumer)
        yield tensors
