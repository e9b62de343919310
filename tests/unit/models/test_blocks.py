"""Building blocks against simpler forms of the same equations (method §1)."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from prioritycut_ray.models.blocks import (
    AntiAliasDownsample,
    DownBlock,
    Hourglass,
    ResBlock,
    SameBlock,
    UpBlock,
    coordinate_grid,
    gaussian_kernel,
    inverse_2x2,
    warp,
)


@pytest.mark.parametrize(("scale", "taps"), [(0.5, 5), (0.25, 13), (0.125, 29), (1 / 3, 9)])
def test_separable_downsampling_equals_the_dense_kernel(scale: float, taps: int) -> None:
    """The reference applies a depth-wise 2-D Gaussian to all pixels, zero padded, then slices."""
    image = torch.rand(2, 3, 48, 72, dtype=torch.float64)
    sigma = (1 / scale - 1) / 2
    offsets = torch.arange(taps, dtype=torch.float64) - taps // 2
    squared = offsets[:, None] ** 2 + offsets**2
    kernel = torch.exp(-squared / (2 * sigma**2))
    kernel = (kernel / kernel.sum()).expand(3, 1, taps, taps)
    step = round(1 / scale)
    blurred = F.conv2d(F.pad(image, [taps // 2] * 4), kernel, groups=3)
    down = AntiAliasDownsample(scale).double()
    torch.testing.assert_close(down(image), blurred[:, :, ::step, ::step], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("scale", [0.5, 0.25, 0.125])
def test_kernel_is_normalised_and_symmetric(scale: float) -> None:
    kernel = gaussian_kernel(scale)
    torch.testing.assert_close(kernel.sum(), torch.tensor(1.0))
    assert torch.equal(kernel, kernel.flip(0))
    assert kernel.argmax() == len(kernel) // 2


def test_scale_one_changes_nothing() -> None:
    image = torch.rand(1, 3, 8, 8)
    down = AntiAliasDownsample(1.0)
    assert torch.equal(down(image), image)
    assert not list(down.buffers())


def test_kernel_is_not_part_of_a_checkpoint() -> None:
    assert not AntiAliasDownsample(0.25).state_dict()


@pytest.mark.parametrize("scale", [0.3, 0.75, 2.0])
def test_scale_that_is_not_one_over_an_integer_is_rejected(scale: float) -> None:
    with pytest.raises(ValueError, match="1 divided by an integer"):
        AntiAliasDownsample(scale)


def test_coordinate_grid_is_x_then_y_with_corners_at_one() -> None:
    grid = coordinate_grid(2, 3, dtype=torch.float32, device=torch.device("cpu"))
    expected = [[[-1, -1], [0, -1], [1, -1]], [[-1, 1], [0, 1], [1, 1]]]
    assert grid.tolist() == expected


def test_warp_samples_where_the_deformation_points() -> None:
    """With align_corners=False, pixel i of 4 lies at (2i + 1)/4 − 1; pixels outside are zero."""
    image = torch.arange(16.0).view(1, 1, 4, 4)
    at = torch.tensor([[-0.75, -0.75], [0.75, -0.75], [-0.75, 0.75], [3.0, 0.0]]).view(1, 2, 2, 2)
    enlarged = at.repeat_interleave(2, 1).repeat_interleave(2, 2)
    assert warp(image, enlarged)[0, 0, ::2, ::2].tolist() == [[0, 3], [12, 0]]


def test_warp_enlarges_a_coarse_deformation_bilinearly() -> None:
    image = torch.rand(1, 2, 8, 8)
    coarse = torch.rand(1, 4, 4, 2) * 2 - 1
    fine = F.interpolate(coarse.permute(0, 3, 1, 2), size=(8, 8), mode="bilinear")
    expected = F.grid_sample(image, fine.permute(0, 2, 3, 1), align_corners=False)
    torch.testing.assert_close(warp(image, coarse), expected)


entries = st.floats(-10, 10, width=32)
matrices = st.tuples(entries, entries, entries, entries).map(
    lambda m: torch.tensor(m, dtype=torch.float64).view(2, 2)
)


@settings(deadline=None)
@given(matrices)
def test_inverse_is_exact_away_from_singularity(matrix: torch.Tensor) -> None:
    if torch.linalg.det(matrix).abs() < 1e-5:
        return
    product = inverse_2x2(matrix) @ matrix
    torch.testing.assert_close(product, torch.eye(2, dtype=torch.float64), rtol=0, atol=1e-7)


@settings(deadline=None)
@given(matrices, st.sampled_from([0.0, 1e-12, -1e-12, 1.0]))
def test_inverse_and_its_gradient_are_finite_everywhere(
    matrix: torch.Tensor, factor: float
) -> None:
    """The second row is a multiple of the first, so the determinant is about zero."""
    singular = torch.stack([matrix[0], factor * matrix[0]]).float().requires_grad_()
    inverse = inverse_2x2(singular)
    inverse.sum().backward()
    assert inverse.isfinite().all()
    assert singular.grad is not None
    assert singular.grad.isfinite().all()


def test_inverse_of_a_batch_keeps_its_order() -> None:
    batch = torch.rand(3, 4, 2, 2, dtype=torch.float64) + 2 * torch.eye(2)
    torch.testing.assert_close(inverse_2x2(batch), torch.linalg.inv(batch))


def test_inverse_bounds_the_determinant_with_its_sign() -> None:
    """Det = ±1e-8 is clamped to ±1e-6: the inverse is 1e-2 of the exact one."""
    for sign in (1.0, -1.0):
        matrix = torch.diag(torch.tensor([1e-4, sign * 1e-4], dtype=torch.float64))
        expected = torch.linalg.inv(matrix) * 1e-2
        torch.testing.assert_close(inverse_2x2(matrix), expected)


@pytest.mark.parametrize(
    ("blocks", "widest", "channels"),
    [(3, 1024, [8, 16, 32]), (2, 6, [6, 6]), (4, 20, [8, 16, 20, 20])],
)
def test_hourglass_keeps_the_size_and_caps_its_channels(
    blocks: int, widest: int, channels: list[int]
) -> None:
    hourglass = Hourglass(5, block_expansion=4, num_blocks=blocks, max_features=widest).eval()
    assert hourglass(torch.rand(1, 5, 32, 48)).shape == (1, 4 + 5, 32, 48)
    assert hourglass.out_channels == 4 + 5
    assert [b.conv.out_channels for b in hourglass.encoder.down_blocks] == channels
    mirrored = [*reversed(channels[:-1]), 4]
    assert [b.conv.out_channels for b in hourglass.decoder.up_blocks] == mirrored


def test_hourglass_ends_with_its_input_as_skip() -> None:
    frame = torch.rand(1, 3, 16, 16)
    hourglass = Hourglass(3, block_expansion=4, num_blocks=2, max_features=8).eval()
    assert torch.equal(hourglass(frame)[:, -3:], frame)


def test_blocks_change_the_resolution_as_documented() -> None:
    x = torch.rand(2, 3, 8, 8)
    assert SameBlock(3, 5, kernel_size=7)(x).shape == (2, 5, 8, 8)
    assert DownBlock(3, 5)(x).shape == (2, 5, 4, 4)
    assert UpBlock(3, 5)(x).shape == (2, 5, 16, 16)
    assert ResBlock(3)(x).shape == (2, 3, 8, 8)


def test_residual_block_adds_to_its_input_before_activation() -> None:
    block = ResBlock(3)
    nn.init.zeros_(block.conv2.weight)
    assert block.conv2.bias is not None
    nn.init.zeros_(block.conv2.bias)
    x = torch.randn(1, 3, 4, 4)
    assert torch.equal(block(x), x)
