"""Our instance norm against torch's own in float64."""

import pytest
import torch
from torch import nn

from prioritycut_ray.models.instance_norm import InstanceNorm2d
from tests.unit.models.test_batch_norm import LIMITS, distance, results, threads

__all__ = ["threads"]

SHAPES = [
    (2, 64, 32, 32),
    (3, 5, 7, 9),  # an odd number of pixels
    (4, 1, 8, 8),
    (1, 3, 5, 5),
    (2, 2048, 3, 2),  # more channels than a block has columns
    (2, 3, 664, 520),  # several blocks, the last of them shorter
]


def pair(channels: int, dtype: torch.dtype) -> tuple[nn.Module, nn.Module]:
    """torch's layer in float64, and ours with the same weights."""
    generator = torch.Generator().manual_seed(1)
    exact, ours = nn.InstanceNorm2d(channels, affine=True).double(), InstanceNorm2d(channels)
    with torch.no_grad():
        exact.weight.uniform_(0.5, 2, generator=generator)
        exact.bias.normal_(generator=generator)
    ours = ours.to(torch.promote_types(dtype, torch.float32))
    ours.load_state_dict(exact.state_dict())
    return exact, ours


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize("shape", SHAPES)
def test_results_match_torch_in_float64(
    shape: tuple[int, int, int, int], dtype: torch.dtype, layout: torch.memory_format
) -> None:
    generator = torch.Generator().manual_seed(0)
    x, gradient = (
        torch.randn(shape, generator=generator).to(dtype).to(memory_format=layout) for _ in range(2)
    )
    x = x * 3 + 2
    exact, ours = pair(shape[1], dtype)
    expected = results(exact, *(tensor.double().contiguous() for tensor in (x, gradient)))
    found = results(ours, x, gradient)
    assert found["out"].stride() == found["gradient"].stride() == x.stride() or 1 in shape
    for name, tensor in expected.items():
        assert distance(found[name], tensor) <= LIMITS[dtype], name
    # A gradient in another layout than x.
    other = torch.contiguous_format if layout == torch.channels_last else torch.channels_last
    mixed = results(ours, x, gradient.contiguous(memory_format=other))
    assert distance(mixed["gradient"], expected["gradient"]) <= LIMITS[dtype]


@pytest.mark.usefixtures("threads")
def test_sums_in_channels_last_layout_are_accurate() -> None:
    """Added one by one in float32, 131 072 numbers give errors of 1e-5 and more."""
    generator = torch.Generator().manual_seed(2)
    x, gradient = (torch.randn(2, 16, 512, 256, generator=generator) for _ in range(2))
    x += 1
    exact, ours = pair(16, torch.float32)
    expected = results(exact, x.double(), gradient.double())
    found = results(ours, x.to(memory_format=torch.channels_last), gradient)
    for name, tensor in expected.items():
        assert distance(found[name], tensor) <= 2e-6, name


def test_images_of_a_batch_do_not_influence_each_other() -> None:
    x = torch.randn(3, 4, 6, 6).to(memory_format=torch.channels_last)
    norm = InstanceNorm2d(4).eval()
    assert torch.equal(norm(x)[1:2], norm(x[1:2]))
    assert list(norm.state_dict()) == ["weight", "bias"]
