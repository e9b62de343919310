"""Pictures of the method: pure functions from tensors to uint8 images."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from torch import Tensor

from prioritycut_ray.models.animator import Animation, FramePair
from prioritycut_ray.models.blocks import coordinate_grid
from prioritycut_ray.priority_cut import mix
from prioritycut_ray.transfer import send

Panel = UInt8[Tensor, "3 _H _W"]
"""A picture of any size."""

_PALETTE = torch.tensor(
    [
        [230, 25, 75],
        [60, 180, 75],
        [255, 225, 25],
        [0, 130, 200],
        [245, 130, 48],
        [145, 30, 180],
        [70, 240, 240],
        [240, 50, 230],
        [210, 245, 60],
        [250, 190, 212],
    ],
    dtype=torch.float32,
).div(255)
_HIDDEN, _CUT = (1.0, 0.1, 0.1), (0.1, 0.4, 1.0)
"""Red for parts that the source does not show, blue for parts that a mask cuts."""


def to_uint8(image: Float[Tensor, "... H W"]) -> UInt8[Tensor, "... H W"]:
    """Convert values in [0, 1] to 0 … 255, rounded, on the CPU."""
    return image.detach().clamp(0, 1).mul(255).round().to(torch.uint8).cpu()


def grid(columns: Sequence[Float[Tensor, "B _C _H _W"]], *, gap: int = 2) -> Panel:
    """Arrange samples as rows and pictures as columns, with white gaps.

    C is 1 or 3. Smaller columns are enlarged by nearest neighbour, so that the resolution of a map
    stays visible.
    """
    height, width = max(column.shape[2] for column in columns), max(c.shape[3] for c in columns)
    rows = torch.stack([_as_rgb(column, height, width) for column in columns], dim=1)
    padded = F.pad(rows, (0, gap, 0, gap), value=1.0)
    batch, count, _, tall, wide = padded.shape
    sheet = padded.permute(2, 0, 3, 1, 4).reshape(3, batch * tall, count * wide)
    return to_uint8(sheet[:, :-gap, :-gap])


def stack(panels: Sequence[Panel], *, gap: int = 2) -> Panel:
    """Stack panels of equal width vertically, with white gaps."""
    padded = [F.pad(panel, (0, 0, 0, gap), value=255) for panel in panels]
    return torch.cat(padded, dim=1)[:, :-gap]


def method_columns(
    pair: FramePair,
    animation: Animation,
    mask: Float[Tensor, "B 1 H W"] | None,
    *,
    rows: slice = slice(None),
) -> Panel:
    """Draw the method's six columns: source, driving, generated, occlusion map, mask, mixed image.

    Black means occluded in the map, and generated in the mask. Without a mask (mixing is off), the
    last two columns are omitted.
    """
    columns = [*pair, animation.prediction, animation.occlusion_map]
    if mask is not None:
        columns += [mask, mix(pair.driving, animation.prediction, mask)]
    return grid([column[rows] for column in columns])


def review_panel(
    pair: FramePair, animation: Animation, mask: Float[Tensor, "B 1 H W"]
) -> UInt8[Tensor, "B H2 W3 3"]:
    """Draw six tiles as frames of a video: two rows of three.

    Top: source, driving, generated. Bottom: the difference between driving and generated times four
    (grey is zero); the generated frame, red where the source is occluded; the driving frame, blue
    where the mask cuts.
    """
    prediction = animation.prediction
    difference = 0.5 + 2 * (prediction - pair.driving)
    hidden = tint(prediction, 1 - _full_size_occlusion(animation), _HIDDEN)
    cut = tint(pair.driving, 1 - mask, _CUT)
    return tiles([*pair, prediction], [difference, hidden, cut])


def motion_panel(
    pair: FramePair, animation: Animation, mask: Float[Tensor, "B 1 H W"]
) -> UInt8[Tensor, "B H2 W3 3"]:
    """Draw six tiles of an animation of another identity, as frames of a video.

    Top: source, driving, generated. Bottom: the occlusion map (black is occluded in the source);
    the generated frame, red where it is occluded; the generated frame, blue where the mask cuts.
    """
    prediction, occlusion = animation.prediction, _full_size_occlusion(animation)
    hidden = tint(prediction, 1 - occlusion, _HIDDEN)
    cut = tint(prediction, 1 - mask, _CUT)
    return tiles([*pair, prediction], [occlusion.expand(-1, 3, -1, -1), hidden, cut])


def _full_size_occlusion(animation: Animation) -> Float[Tensor, "B 1 H W"]:
    size = animation.prediction.shape[2:]
    return F.interpolate(animation.occlusion_map, size=size, mode="bilinear")


def tiles(*rows: Sequence[Float[Tensor, "B 3 H W"]]) -> UInt8[Tensor, "B _H _W 3"]:
    """Arrange pictures of equal size in rows, as frames of a video."""
    whole = torch.cat([torch.cat(list(row), dim=3) for row in rows], dim=2)
    return to_uint8(whole).permute(0, 2, 3, 1)


def tint(
    image: Float[Tensor, "B 3 H W"],
    weight: Float[Tensor, "B 1 H W"],
    colour: tuple[float, float, float],
) -> Float[Tensor, "B 3 H W"]:
    """Blend a colour over an image, by 0.6 where the weight is 1."""
    share = 0.6 * weight.to(image.dtype)
    tone = send(torch.tensor(colour, dtype=image.dtype), image.device)
    return image * (1 - share) + tone.view(1, 3, 1, 1) * share


def draw_keypoints(
    image: Float[Tensor, "B 3 H W"], value: Float[Tensor, "B K 2"]
) -> Float[Tensor, "B 3 H W"]:
    """Draw a disc at each keypoint, in its own colour, on images in [0, 1]."""
    height, width = image.shape[2:]
    positions = coordinate_grid(height, width, dtype=image.dtype, device=image.device)
    radius = 0.035
    palette = send(_PALETTE, image.device)
    for k in range(value.shape[1]):
        distance = (positions - value[:, k, None, None]).norm(dim=-1)
        colour = palette[k % len(palette)].view(1, 3, 1, 1)
        image = torch.where((distance < radius)[:, None], colour, image)
    return image


def _as_rgb(image: Tensor, height: int, width: int) -> Tensor:
    image = image.detach().float()
    if image.shape[2:] != (height, width):
        image = F.interpolate(image, size=(height, width), mode="nearest")
    return image.expand(-1, 3, -1, -1)
