"""Prefetched frames stay intact while memory is reused, and are made on another stream."""

import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch

from prioritycut_ray.models.animator import FramePair
from prioritycut_ray.prefetch import prefetch_on_gpu

LONG = 20_000_000
"""Clock cycles for which the consumer stream is kept busy: about 10 ms."""


def numbered(count: int, device: torch.device) -> Iterator[FramePair]:
    """Pairs of frames, each filled with its number, from pinned memory."""
    for number in range(count):
        host = torch.full((4, 3, 128, 128), number, dtype=torch.uint8).pin_memory()
        yield FramePair(*(host.to(device, non_blocking=True).float() for _ in range(2)))


def test_frames_are_intact_though_their_memory_is_reused(gpu: torch.device) -> None:
    """The consumer drops each pair before its stream has used it."""
    means = []
    for pair in prefetch_on_gpu(numbered(60, gpu), gpu):
        torch.cuda._sleep(LONG)
        means.append(torch.stack([frame.mean() for frame in pair]))
        del pair
    expected = torch.arange(60.0, device=gpu)[:, None].expand(-1, 2)
    assert torch.equal(torch.stack(means), expected)


def test_items_are_made_on_another_stream(gpu: torch.device) -> None:
    streams = []

    def items() -> Iterator[FramePair]:
        for pair in numbered(2, gpu):
            streams.append(torch.cuda.current_stream())
            yield pair

    assert len(list(prefetch_on_gpu(items(), gpu))) == 2
    assert streams[0] == streams[1] != torch.cuda.current_stream()
    assert streams[0].device == gpu


ON_THE_SECOND = """
import torch
from prioritycut_ray.prefetch import prefetch_on_gpu
from prioritycut_ray.data.loader import load

device = torch.device("cuda", 1)
torch.cuda.set_device(device)
made = load(lambda numbers, *_: torch.ones(8), [[0], [1]], 1, str, pin_for=device)
items = ((batch.to(device, non_blocking=True),) for batch in made)
assert [float(tensor.sum()) for tensor, in prefetch_on_gpu(items, device)] == [8, 8]
print(torch._C._cuda_hasPrimaryContext(0), torch._C._cuda_hasPrimaryContext(1))
"""


def test_the_second_gpu_does_not_open_the_first(gpu: torch.device) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    command = [sys.executable, "-c", ON_THE_SECOND]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert said.strip() == "False True"
