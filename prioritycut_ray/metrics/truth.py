"""Errors where the truth is known: by region, and along the true motion."""

from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from numpy.typing import NDArray
from scipy.ndimage import distance_transform_edt
from torch import Tensor

from prioritycut_ray.metrics.aggregate import FrameScores, Metric, Tally

REGIONS = ("disoccluded", "rim", "elsewhere")
FLICKER = "flicker"
RIM_SHARE = 1 / 32
"""Width of the rim, as a share of the frame's side."""


class MotionTruth(NamedTuple):
    """How a clip truly moves.

    Attributes:
        flow: (x, y) in pixels: where the surface point at each pixel's centre lies in the previous
            frame, minus the centre; zero in the first frame.
        visible: whether the previous frame shows that point; False in the first frame.
    """

    flow: Float[Tensor, "T H W 2"]
    visible: Bool[Tensor, "T H W"]


def rim_width(size: int) -> int:
    """Return the width of the rim in pixels, for frames of a side: 2 at 64, 8 at 256."""
    return max(1, round(size * RIM_SHARE))


def truth_metrics(size: int) -> tuple[Metric, ...]:
    """Describe the metrics of :func:`region_errors` and :func:`warping_error`."""
    rim = rim_width(size)
    labels = ("L1 dis-occluded", "L1 at their rim", "L1 elsewhere")
    where = (
        "the pixels whose surface point the source frame does not show",
        f"the pixels that are not dis-occluded, at most {rim} px from the centre of one that is",
        "all other pixels",
    )
    return (
        *(
            Metric(key=key, label=label, definition=f"L1 over {pixels}", decimals=4)
            for key, label, pixels in zip(REGIONS, labels, where, strict=True)
        ),
        Metric(
            key=FLICKER,
            label="flicker",
            definition="L1 between each frame and the previous one, warped by the true flow "
            "(bilinear), over the pixels whose surface point both true frames show",
            decimals=4,
        ),
    )


def regions(disoccluded: NDArray[np.bool_]) -> dict[str, NDArray[np.bool_]]:
    """Divide frames into dis-occluded pixels, their rim, and all others.

    Args:
        disoccluded: `[T, H, W]`.

    Returns:
        Masks `[T, H, W]` by the names of :data:`REGIONS`; each pixel is in one.
    """
    width = rim_width(disoccluded.shape[-1])
    near = np.stack([_near(mask, width) for mask in disoccluded])
    return dict(zip(REGIONS, (disoccluded, near & ~disoccluded, ~near), strict=True))


def _near(mask: NDArray[np.bool_], width: int) -> NDArray[np.bool_]:
    if not mask.any():
        return mask
    near: NDArray[np.bool_] = distance_transform_edt(~mask) <= width
    return near


def region_errors(
    predicted: Float[Tensor, "T 3 H W"],
    true: Float[Tensor, "T 3 H W"],
    masks: dict[str, NDArray[np.bool_]],
) -> FrameScores:
    """Return L1 over each region, of values in [0, 1]; every pixel of a clip has the same weight.

    Args:
        predicted: the predictions.
        true: the true frames.
        masks: of :func:`regions`.
    """
    error = (predicted - true).abs().mean(1)
    return {name: _over(error, torch.from_numpy(mask)) for name, mask in masks.items()}


def warping_error(frames: Float[Tensor, "T 3 H W"], motion: MotionTruth) -> Tally:
    """Return L1 between each frame and the previous one, warped by the flow, where it is visible.

    Args:
        frames: a video with values in [0, 1].
        motion: of the video that it should be.
    """
    warped = torch.cat([frames[:1], warp(frames[:-1], motion.flow[1:].to(frames.device))])
    return _over((frames - warped).abs().mean(1), motion.visible)


def warp(frames: Float[Tensor, "T 3 H W"], flow: Float[Tensor, "T H W 2"]) -> Tensor:
    """Sample each frame bilinearly at every pixel's centre plus the flow in pixels (x, y)."""
    height, width = frames.shape[2:]
    rows, columns = (torch.arange(n, device=flow.device) + 0.5 for n in (height, width))
    x = (columns + flow[..., 0]) / width
    y = (rows[:, None] + flow[..., 1]) / height
    grid = (2 * torch.stack([x, y], dim=-1) - 1).to(frames.dtype)
    return F.grid_sample(frames, grid, padding_mode="border", align_corners=False)


def _over(error: Float[Tensor, "T H W"], mask: Bool[Tensor, "T H W"]) -> Tally:
    """Tally an error over the pixels of a mask; a frame without any does not count."""
    inside = mask.to(error.device)
    total = torch.where(inside, error, 0).double().sum((1, 2))
    return Tally(total.cpu().numpy(), mask.sum((1, 2)).double().cpu().numpy())
