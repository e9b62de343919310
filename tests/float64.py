"""Training steps in float64, where two ways to round never tip a ReLU or an L1 loss."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import pytest
from torch import Tensor, nn

from prioritycut_ray.models.animator import FramePair
from prioritycut_ray.training.steps import MicroBatch, Randomness


@contextmanager
def in_float64(*networks: nn.Module) -> Iterator[None]:
    """Networks compute in float64, and so does what they would convert to float32."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Tensor, "float", Tensor.double)
        for network in networks:
            network.double()
        yield


def as_float64(batches: Sequence[MicroBatch]) -> list[MicroBatch]:
    return [
        MicroBatch(
            FramePair(*(frames.double() for frames in pair)),
            Randomness(mix, *(numbers.double() for numbers in randomness)),
        )
        for pair, (mix, *randomness) in batches
    ]
