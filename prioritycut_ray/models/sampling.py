"""Bilinear sampling of images at given positions, with optional deterministic gradients on GPUs.

The gradient of an image is a sum over the positions that fall on each of its pixels. On CUDA torch
adds them up in arbitrary order (atomic additions), so two runs never give the same result.
"""

from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

Padding = Literal["zeros", "reflection"]


def grid_sample(
    image: Float[Tensor, "B C H W"],
    grid: Float[Tensor, "B h w 2"],
    padding: Padding = "zeros",
    *,
    align_corners: bool = False,
) -> Float[Tensor, "B C h w"]:
    """``F.grid_sample``, bilinear.

    On CUDA under ``torch.use_deterministic_algorithms``, which torch's own gradient does not
    support, gradients come from :class:`DeterministicSample`; with ``align_corners`` there are none
    for reflection padding.

    Args:
        image: image to sample.
        grid: positions (x, y); the edges of the image lie at -1 and 1.
        padding: what lies outside the image.
        align_corners: whether the centres of the outer pixels, not the edges, lie at -1 and 1.
    """
    differentiable = torch.is_grad_enabled() and (image.requires_grad or grid.requires_grad)
    if image.is_cuda and differentiable and torch.are_deterministic_algorithms_enabled():
        if align_corners:
            assert padding == "zeros"
            grid = between_edges(grid, *image.shape[2:])
        sampled: Tensor = DeterministicSample.apply(image, grid, padding)
        return sampled
    return F.grid_sample(image, grid, padding_mode=padding, align_corners=align_corners)


def warp_by_each(
    image: Float[Tensor, "B C h w"], motions: Float[Tensor, "B K1 h w 2"], *, align_corners: bool
) -> Float[Tensor, "B K1 C h w"]:
    """Warp the image by each of the motions.

    The motions are stacked into one tall grid, so that the image is not repeated K+1 times.
    """
    batch, count, height, width, _ = motions.shape
    tall = motions.reshape(batch, count * height, width, 2)
    warped = grid_sample(image, tall, align_corners=align_corners)
    each: Tensor = warped.unflatten(2, (count, height)).transpose(1, 2)
    return each


def between_edges(grid: Float[Tensor, "B h w 2"], height: int, width: int) -> Tensor:
    """Convert positions where ±1 are the centres of the outer pixels: to where they are edges."""
    x, y = grid.unbind(-1)
    return torch.stack([x * (1 - 1 / width), y * (1 - 1 / height)], dim=-1)


class DeterministicSample(torch.autograd.Function):
    """:func:`grid_sample` with gradients that are bitwise reproducible.

    Each position reads the four pixels around it. Their gradients are added up by
    ``index_put_(accumulate=True)``, which sorts by pixel first.
    """

    @staticmethod
    def forward(ctx: Any, image: Tensor, grid: Tensor, padding: Padding) -> Tensor:
        ctx.save_for_backward(image, grid)
        ctx.padding = padding
        return F.grid_sample(image, grid, padding_mode=padding, align_corners=False)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        image, grid = ctx.saved_tensors
        height, width = image.shape[2:]
        x, slope_x = _in_pixels(grid[..., 0].flatten(), width, ctx.padding)
        y, slope_y = _in_pixels(grid[..., 1].flatten(), height, ctx.padding)
        pixels, gradients = _rows(image), _rows(gradient)
        first = torch.arange(len(image), device=image.device)[:, None] * (height * width)
        first = first.expand(-1, len(x) // len(image)).flatten()  # of each position's own image
        of_image = torch.zeros_like(pixels) if ctx.needs_input_grad[0] else None
        of_x, of_y = torch.zeros_like(x), torch.zeros_like(y)
        left, top = x.floor(), y.floor()
        for column, share_x, sign_x in ((left, left + 1 - x, -1), (left + 1, x - left, 1)):
            for row, share_y, sign_y in ((top, top + 1 - y, -1), (top + 1, y - top, 1)):
                # A NaN position is outside.
                inside = (column >= 0) & (column < width) & (row >= 0) & (row < height)
                index = first + torch.where(inside, row * width + column, 0).long()
                if of_image is not None:
                    share = torch.where(inside, share_x * share_y, 0)
                    of_image.index_put_((index,), gradients * share[:, None], accumulate=True)
                if ctx.needs_input_grad[1]:
                    product = torch.where(inside, (pixels[index] * gradients).sum(dim=1), 0)
                    of_x += sign_x * share_y * product
                    of_y += sign_y * share_x * product
        return (
            None if of_image is None else _as_image(of_image, image),
            torch.stack([of_x * slope_x, of_y * slope_y], dim=-1).view_as(grid),
            None,
        )


def _in_pixels(
    position: Float[Tensor, " N"], size: int, padding: Padding
) -> tuple[Float[Tensor, " N"], Float[Tensor, " N"]]:
    """Convert positions in [-1, 1] along one axis to pixels; return these and the derivatives."""
    pixel = ((position + 1) * size - 1) / 2
    slope = torch.full_like(pixel, size / 2)
    if padding == "zeros":
        return pixel, slope
    # Reflect at the edges, half a pixel outside the outer pixels, as often as needed.
    offset = pixel + 0.5
    odd = (offset.abs() / size).floor() % 2 == 1
    rest = offset.abs().fmod(size)
    reflected = torch.where(odd, size - rest, rest) - 0.5
    slope = torch.where(odd ^ (offset < 0), -slope, slope)
    # Between an outer pixel and the edge, sampling reads only that pixel.
    return reflected.clamp(0, size - 1), torch.where(
        (reflected > 0) & (reflected < size - 1), slope, 0
    )


def _rows(image: Float[Tensor, "B C H W"]) -> Float[Tensor, "N C"]:
    """Return one row for each pixel."""
    return image.permute(0, 2, 3, 1).reshape(-1, image.shape[1])


def _as_image(
    rows: Float[Tensor, "N C"], like: Float[Tensor, "B C H W"]
) -> Float[Tensor, "B C H W"]:
    batch, _, height, width = like.shape
    return rows.view(batch, height, width, -1).permute(0, 3, 1, 2)


_ROWS_FROM = 32
"""Smallest number of channels for which :func:`sample_rows` is faster than ``F.grid_sample``."""


def prefers_rows(image: Float[Tensor, "B C H W"]) -> bool:
    """Return whether :func:`sample_rows` samples an image faster: feature maps on CPUs."""
    on_cpu = image.device.type == "cpu" and not torch.compiler.is_compiling()
    return on_cpu and image.shape[1] >= _ROWS_FROM


def sample_rows(
    image: Float[Tensor, "B C H W"], grid: Float[Tensor, "B h w 2"]
) -> Float[Tensor, "B C h w"]:
    """Sample an image as :func:`grid_sample` does with ``align_corners`` and zeros outside.

    In channels-last layout an image is a matrix of pixels × channels, and each position adds up
    four of its rows: an embedding bag, which returns channels last too. ``F.grid_sample`` gathers
    channel by channel.
    """
    batch, channels, height, width = image.shape
    columns, shares_x = _neighbours(grid[..., 0], width)
    rows, shares_y = _neighbours(grid[..., 1], height)
    first = torch.arange(batch, dtype=torch.int32, device=image.device) * (height * width)
    pixels = first[:, None, None, None, None] + rows[..., None] * width + columns[..., None, :]
    shares = shares_y[..., None] * shares_x[..., None, :]
    sampled = F.embedding_bag(
        pixels.view(-1, 4), _rows(image), per_sample_weights=shares.view(-1, 4), mode="sum"
    )
    return sampled.view(batch, *grid.shape[1:3], channels).permute(0, 3, 1, 2)


def _neighbours(
    position: Float[Tensor, "B h w"], size: int
) -> tuple[Int[Tensor, "B h w 2"], Float[Tensor, "B h w 2"]]:
    """Return the two pixels around each position along one axis, and their shares of the value."""
    pixel = (position + 1) * ((size - 1) / 2)
    lower = pixel.detach().floor()
    upper_share = pixel - lower
    index = lower[..., None].int() + torch.arange(2, dtype=torch.int32, device=position.device)
    inside = (index >= 0) & (index < size)
    return index.clamp(0, size - 1), torch.stack([1 - upper_share, upper_share], dim=-1) * inside
