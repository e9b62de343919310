"""Augmentation of frame pairs, on the batch and its device.

Each sample's parameters come from its own seed, so they are the same in any batch, on any rank
and on any device. Both frames of a pair are changed alike, to keep the motion between them.
"""

from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from prioritycut_ray.transfer import send

Images = Float[Tensor, "B 3 H W"]
# ITU-R BT.601 luma, as torchvision rounds it.
LUMA = (0.2989, 0.587, 0.114)


def augment(
    source: Images,
    driving: Images,
    seeds: Int64[Tensor, " B"],
    *,
    horizontal_flip: bool,
    time_flip: bool,
    brightness: float,
    contrast: float,
    saturation: float,
    hue: float,
) -> tuple[Images, Images]:
    """Flip, swap and recolour pairs at random.

    The colour changes are those of torchvision's ``ColorJitter``, always in the order brightness,
    contrast, saturation, hue. Contrast is relative to each frame's own mean gray.

    Args:
        source: RGB in [0, 1].
        driving: RGB in [0, 1].
        seeds: one per sample, 0 or more.
        horizontal_flip: mirror half of the pairs, on average.
        time_flip: swap source and driving in half of the pairs, on average.
        brightness: x, for factors from [max(0, 1 - x), 1 + x]; 0 turns it off.
        contrast: the same.
        saturation: the same.
        hue: maximum rotation on the colour circle, either way, in turns (0 to 0.5); 0 turns it off.

    Returns:
        Source and driving, RGB in [0, 1].
    """
    draws = _draw(seeds, source)
    if time_flip:
        source, driving = _swapped(source, driving, draws.time < 0.5)
    pair = torch.cat([source, driving])
    if horizontal_flip:
        pair = torch.where(_per_pair(draws.mirror < 0.5), pair.flip(-1), pair)
    if brightness > 0:
        factor = _factor(draws.brightness, brightness)
        pair = _blend(pair, torch.zeros_like(pair), factor)
    if contrast > 0:
        factor = _factor(draws.contrast, contrast)
        pair = _blend(pair, _gray(pair).mean(dim=(1, 2, 3), keepdim=True), factor)
    if saturation > 0:
        factor = _factor(draws.saturation, saturation)
        pair = _blend(pair, _gray(pair), factor)
    if hue > 0:
        pair = _turn_hue(pair, _per_pair((2 * draws.hue - 1) * hue))
    changed_source, changed_driving = pair.contiguous(memory_format=torch.channels_last).chunk(2)
    return changed_source, changed_driving


class _Draws(NamedTuple):
    """Uniform numbers from [0, 1), one per sample."""

    time: Float[Tensor, " B"]
    mirror: Float[Tensor, " B"]
    brightness: Float[Tensor, " B"]
    contrast: Float[Tensor, " B"]
    saturation: Float[Tensor, " B"]
    hue: Float[Tensor, " B"]


def _draw(seeds: Int64[Tensor, " B"], like: Tensor) -> _Draws:
    # All are always drawn: turning one change off must not alter the others.
    rows = [np.random.default_rng(seed).random(len(_Draws._fields)) for seed in seeds.tolist()]
    table = torch.from_numpy(np.stack(rows)).to(like.dtype)
    return _Draws(*send(table, like.device).unbind(dim=1))


def _per_pair(value: Tensor) -> Tensor:
    """Repeat a value per sample [B] for both frames: [2B, 1, 1, 1]."""
    return value.repeat(2).view(-1, 1, 1, 1)


def _factor(draw: Float[Tensor, " B"], spread: float) -> Float[Tensor, "B2 1 1 1"]:
    low = max(0.0, 1 - spread)
    return _per_pair(low + draw * (1 + spread - low))


def _swapped(source: Images, driving: Images, chosen: Bool[Tensor, " B"]) -> tuple[Images, Images]:
    chosen = chosen.view(-1, 1, 1, 1)
    return torch.where(chosen, driving, source), torch.where(chosen, source, driving)


def _blend(images: Images, other: Tensor, factor: Tensor) -> Images:
    return (factor * images + (1 - factor) * other).clamp(0, 1)


def _gray(images: Images) -> Float[Tensor, "B 1 H W"]:
    red, green, blue = images.split(1, dim=1)
    gray: Tensor = LUMA[0] * red + LUMA[1] * green + LUMA[2] * blue
    return gray


def _turn_hue(images: Images, turns: Float[Tensor, "B 1 1 1"]) -> Images:
    """Rotate the hue in HSV by a fraction of the circle; keep saturation and value."""
    red, green, blue = images.unbind(dim=1)
    value, low = images.amax(dim=1), images.amin(dim=1)
    chroma = value - low
    safe = torch.where(chroma > 0, chroma, torch.ones_like(chroma))
    sixths = torch.where(
        value == red,
        (green - blue) / safe,
        torch.where(value == green, 2 + (blue - red) / safe, 4 + (red - green) / safe),
    )
    sixths = sixths + 6 * turns.squeeze(1)
    # Each channel is a trapezium over the colour circle; 5, 3, 1 shift it to red, green, blue.
    shift = torch.arange(5, 0, -2, dtype=images.dtype, device=images.device).view(1, 3, 1, 1)
    place = torch.remainder(shift + sixths.unsqueeze(1), 6)
    return value.unsqueeze(1) - chroma.unsqueeze(1) * torch.minimum(place, 4 - place).clamp(0, 1)
