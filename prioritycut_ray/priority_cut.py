"""PriorityCut and CutMix masks, and mixing with them (method §4): pure tensor functions.

A mask M is 1 where the mixed image shows the real (driving) frame and 0 where it shows the
generated one.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from prioritycut_ray.models.animator import Animation


def priority_mask(
    occlusion_map: Float[Tensor, "B 1 h w"],
    background_mask: Float[Tensor, "B 1 h w"],
    *,
    top_k: float,
    size: tuple[int, int],
    background_threshold: float = 0.5,
) -> Float[Tensor, "B 1 H W"]:
    """Return the PriorityCut mask: 0 on the top-k percent occluded foreground pixels (method §4).

    The mask is computed at the resolution of the occlusion map, then enlarged by nearest neighbour.
    Foreground = {z : M_bg(z) < threshold}; in each sample, the n = round(k/100 · |foreground|)
    foreground pixels with the highest priority 1 − O(z) are cut. Ties go to the first pixel in
    reading order. Source: PriorityCut, abstract, introduction and figure 1; the text says that the
    percentage is of the foreground. Reconstructed by this project: the threshold on the background
    mask.

    Args:
        occlusion_map: O, 1 = visible in the source, 0 = occluded.
        background_mask: M_bg, the probability that a pixel moves with the background.
        top_k: k in percent of the foreground, 0 to 100.
        size: height and width of the mask.
        background_threshold: M_bg below which a pixel is foreground [reconstructed].

    Returns:
        The mask M, 0 or 1.
    """
    foreground = (background_mask < background_threshold).flatten(1)
    # Multiply by k first, in double precision: k/100 is inexact, and could change the rounding.
    count = (foreground.sum(dim=1, keepdim=True).double() * top_k / 100).round()
    # Ascending O is descending 1 − O, without the rounding that makes small O equal. Background
    # comes last, after every O in [0, 1].
    visible = torch.where(foreground, occlusion_map.flatten(1), torch.inf)
    order = visible.sort(dim=1, stable=True).indices
    rank = torch.empty_like(order).scatter_(
        1, order, torch.arange(order.shape[1], device=order.device).expand_as(order)
    )
    mask = (rank >= count).to(occlusion_map.dtype).view_as(occlusion_map)
    return F.interpolate(mask, size=size, mode="nearest")


def cutmix_mask(uniform: Float[Tensor, "B 4"], size: tuple[int, int]) -> Float[Tensor, "B 1 H W"]:
    """Return the CutMix mask of U-Net GAN: a random box, inverted half the time (method §4).

    Args:
        uniform: four numbers in [0, 1) per sample: area ratio λ, centre x, centre y, inversion.
        size: height and width of the mask.

    Returns:
        The mask M: 0 inside a box of side √(1 − λ), clipped to the image, and 1 outside; inverted
        if the last number is below one half.
    """
    height, width = size
    area_ratio, centre_x, centre_y, invert = uniform[:, :, None, None].unbind(1)
    half_side = (1 - area_ratio).sqrt() / 2
    y = torch.arange(height, device=uniform.device).view(1, height, 1) + 0.5
    x = torch.arange(width, device=uniform.device).view(1, 1, width) + 0.5
    inside = ((x - centre_x * width).abs() < half_side * width) & (
        (y - centre_y * height).abs() < half_side * height
    )
    mask = inside ^ (invert >= 0.5)
    return mask[:, None].to(uniform.dtype)


def swap_roles(
    mask: Float[Tensor, "B 1 H W"], uniform: Float[Tensor, " B"], swap_prob: float
) -> Float[Tensor, "B 1 H W"]:
    """Swap the roles of real and generated in some samples [reconstructed] (method §4)."""
    swap = (uniform < swap_prob).to(mask.dtype).view(-1, 1, 1, 1)
    return mask * (1 - swap) + (1 - mask) * swap


def mixing_mask(
    animation: Animation,
    uniform: Float[Tensor, "B 5"],
    *,
    mask: Literal["priority", "cutmix"],
    top_k: float,
    background_threshold: float,
    swap_prob: float,
) -> Float[Tensor, "B 1 H W"]:
    """Return a mask M of either kind for a batch of animations, at image size and detached.

    Args:
        animation: the generated frames to mix in.
        uniform: five numbers in [0, 1) per sample: four for the CutMix box, one for the swap.
        mask: kind of mask.
        top_k: see :func:`priority_mask`.
        background_threshold: see :func:`priority_mask`.
        swap_prob: see :func:`swap_roles`.
    """
    height, width = animation.prediction.shape[2:]
    if mask == "cutmix":
        chosen = cutmix_mask(uniform[:, :4], (height, width))
    else:
        chosen = priority_mask(
            animation.occlusion_map.detach(),
            animation.background_mask.detach(),
            top_k=top_k,
            size=(height, width),
            background_threshold=background_threshold,
        )
    return swap_roles(chosen, uniform[:, 4], swap_prob)


def mix(
    real: Float[Tensor, "B C H W"],
    fake: Float[Tensor, "B C H W"],
    mask: Float[Tensor, "B 1 H W"],
) -> Float[Tensor, "B C H W"]:
    """Return M ⊙ real + (1 − M) ⊙ fake (method §4), exactly, for masks of 0 and 1."""
    return torch.where(mask.bool(), real, fake)


def mix_probability(samples: int, *, mix_prob: float, warmup_samples: int) -> float:
    """Return p(t) = p_max · min(1, t / warm-up) (method §4), with t in samples seen."""
    if warmup_samples == 0:
        return mix_prob
    return mix_prob * min(1.0, samples / warmup_samples)
