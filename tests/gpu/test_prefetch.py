"""Prefetched frames: whole while memory is reused, and made beside the other work."""

from collections.abc import Iterator

import torch

from prioritycut_ray.ahead import ahead_on_gpu
from prioritycut_ray.models.animator import FramePair

LONG = 20_000_000
"""Clock cycles for which the consumer's stream is kept busy: some 10 ms."""


def numbered(count: int, device: torch.device) -> Iterator[FramePair]:
    """Frames that are all of one number each, from pinned memory."""
    for number in range(count):
        host = torch.full((4, 3, 128, 128), number, dtype=torch.uint8).pin_memory()
        yield FramePair(*(host.to(device, non_blocking=True).float() for _ in range(2)))


def test_frames_are_whole_though_their_memory_serves_again(gpu: torch.device) -> None:
    """The consumer drops each pair before its stream has come to it."""
    means = []
    for pair in ahead_on_gpu(numbered(60, gpu), gpu):
        torch.cuda._sleep(LONG)
        means.append(torch.stack([frame.mean() for frame in pair]))
        del pair
    expected = torch.arange(60.0, device=gpu)[:, None].expand(-1, 2)
    assert torch.equal(torch.stack(means), expected)


def test_they_are_made_on_another_stream(gpu: torch.device) -> None:
    streams = []

    def items() -> Iterator[FramePair]:
        for pair in numbered(2, gpu):
            streams.append(torch.cuda.current_stream())
            yield pair

    assert len(list(ahead_on_gpu(items(), gpu))) == 2
    assert streams[0] == streams[1] != torch.cuda.current_stream()
    assert streams[0].device == gpu
