"""Sampling with deterministic gradients against torch's own."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from prioritycut_ray.models.sampling import (
    DeterministicSample,
    Padding,
    between_edges,
    grid_sample,
    sample_rows,
)

PADDINGS: tuple[Padding, ...] = ("zeros", "reflection")


def values_and_gradients(sampled: Tensor, image: Tensor, grid: Tensor) -> list[Tensor]:
    weights = torch.rand(sampled.shape, generator=torch.Generator().manual_seed(1))
    loss = (sampled * weights.to(sampled.dtype)).sum()
    return [sampled.detach(), *torch.autograd.grad(loss, (image, grid))]


def positions(reach: float, *, dtype: torch.dtype = torch.float64) -> Tensor:
    """Random positions within ±reach, and some on edges, corners and centres of pixels."""
    generator = torch.Generator().manual_seed(0)
    grid = (torch.rand(3, 16, 20, 2, dtype=dtype, generator=generator) * 2 - 1) * reach
    special = torch.tensor([-1, 1, 0, 1 / 7, -1 / 7, 6 / 7, -6 / 7, 3, -3], dtype=dtype)
    grid[:, 0, : len(special), 0] = special
    grid[:, 1, : len(special), 1] = special
    return grid


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("reach", [0.8, 1.2, 9.0])
@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
def test_values_and_gradients_match_torch(
    padding: Padding, reach: float, layout: torch.memory_format
) -> None:
    generator = torch.Generator().manual_seed(2)
    for dtype, limit in ((torch.float64, 1e-12), (torch.float32, 1e-6)):
        image = torch.rand(3, 5, 7, 9, dtype=dtype, generator=generator)
        image = image.to(memory_format=layout).requires_grad_()
        grid = positions(reach, dtype=dtype).requires_grad_()
        torchs = F.grid_sample(image, grid, padding_mode=padding, align_corners=False)
        ours = DeterministicSample.apply(image, grid, padding)
        for found, expected in zip(
            values_and_gradients(ours, image, grid),
            values_and_gradients(torchs, image, grid),
            strict=True,
        ):
            assert found.shape == expected.shape
            assert (found - expected).norm() <= limit * expected.norm()


@pytest.mark.parametrize("reach", [0.8, 1.0, 1.2, 9.0])
def test_centres_at_the_ends_are_converted_to_edges(reach: float) -> None:
    image = torch.rand(3, 5, 7, 9, dtype=torch.float64).requires_grad_()
    grid = positions(reach).requires_grad_()
    torchs = F.grid_sample(image, grid, padding_mode="zeros", align_corners=True)
    ours = DeterministicSample.apply(image, between_edges(grid, 7, 9), "zeros")
    found, of_image, of_grid = values_and_gradients(ours, image, grid)
    expected, expected_image, expected_grid = values_and_gradients(torchs, image, grid)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(of_image, expected_image)
    # The corner pixels themselves are kinks, where rounding decides which side counts.
    smooth = (grid.detach().abs() != 1).all(dim=-1)
    torch.testing.assert_close(of_grid[smooth], expected_grid[smooth])


@pytest.mark.parametrize("padding", PADDINGS)
def test_gradients_match_finite_differences(padding: Padding) -> None:
    image = torch.rand(2, 2, 4, 5, dtype=torch.float64, requires_grad=True)
    grid = (torch.rand(2, 3, 3, 2, dtype=torch.float64) * 3 - 1.5).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda *inputs: DeterministicSample.apply(*inputs, padding), (image, grid)
    )


@pytest.mark.parametrize("wanted", ["image", "grid"])
def test_only_inputs_that_need_a_gradient_get_one(wanted: str) -> None:
    image, grid = torch.rand(3, 5, 7, 9), positions(1.0, dtype=torch.float32)
    (image if wanted == "image" else grid).requires_grad_()
    DeterministicSample.apply(image, grid, "zeros").sum().backward()
    assert (image.grad is None) == (wanted == "grid")
    assert (grid.grad is None) == (wanted == "image")


def test_a_nan_position_is_ignored() -> None:
    """Its step is skipped; an index out of bounds would end the process on CUDA."""
    image = torch.rand(1, 2, 4, 4, requires_grad=True)
    grid = torch.zeros(1, 2, 2, 2)
    grid[0, 0, 0, 0], grid[0, 1, 1, 1] = math.nan, math.inf
    grid.requires_grad_()
    DeterministicSample.apply(image, grid, "zeros").sum().backward()
    assert image.grad is not None
    assert image.grad.isfinite().all()
    assert image.grad.sum() == pytest.approx(2 * 2.0), "two positions and two channels"


def test_torchs_own_kernel_is_used_unless_determinism_is_requested() -> None:
    image, grid = torch.rand(1, 2, 4, 4, requires_grad=True), torch.zeros(1, 2, 2, 2)
    assert "GridSampler" in type(grid_sample(image, grid).grad_fn).__name__


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
def test_sampling_by_rows_equals_grid_sample(layout: torch.memory_format) -> None:
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(2, 5, 6, 9, dtype=torch.float64, generator=generator)
    image = image.to(memory_format=layout).requires_grad_()
    grid = torch.rand(2, 7, 4, 2, dtype=torch.float64, generator=generator) * 3 - 1.5
    grid[0, 0, :, 0] = torch.tensor([-1, 1, -1e30, 1e30])  # on the outer pixels, and far outside
    grid[0, 1] = torch.tensor([1.0, 1.0])
    grid.requires_grad_()
    weights = torch.randn(2, 5, 7, 4, dtype=torch.float64, generator=generator)
    ours, theirs = (
        [sampled.detach(), *torch.autograd.grad((sampled * weights).sum(), (image, grid))]
        for sampled in (
            sample_rows(image, grid),
            F.grid_sample(image, grid, align_corners=True),
        )
    )
    assert ours[0].stride(1) == 1, "channels last"
    inside = grid.abs().amax(dim=-1, keepdim=True) < 1  # elsewhere only values must agree
    torch.testing.assert_close(ours[:2], theirs[:2])
    torch.testing.assert_close(ours[2] * inside, theirs[2] * inside)
