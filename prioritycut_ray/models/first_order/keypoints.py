"""Keypoints with local affine transforms: detection, drawing, transfer (method §1, §6)."""

import math
from typing import NamedTuple

import torch
from jaxtyping import Float
from scipy.spatial import ConvexHull, QhullError
from torch import Tensor, nn

from prioritycut_ray.errors import UserError
from prioritycut_ray.models.blocks import (
    AntiAliasDownsample,
    Hourglass,
    channels_last,
    inverse_2x2,
)

HEATMAP_VARIANCE = 0.01
"""Variance of the Gaussians that stand for keypoints, in squared coordinate units (method §1)."""


class Keypoints(NamedTuple):
    """K keypoints of a batch of frames.

    Attributes:
        value: (x, y) in [-1, 1].
        jacobian: local affine transform around each keypoint, from a reference frame.
    """

    value: Float[Tensor, "B K 2"]
    jacobian: Float[Tensor, "B K 2 2"]

    def detach(self) -> "Keypoints":
        """The same keypoints without their gradient history."""
        return Keypoints(self.value.detach(), self.jacobian.detach())


class KeypointDetector(nn.Module):
    """Finds K keypoints and their jacobians in a frame (method §1, "Keypoint detector").

    Args:
        num_keypoints: K.
        block_expansion: hourglass width e.
        max_features: most channels of the hourglass.
        num_blocks: hourglass depth.
        scale_factor: the frame is down-sampled by it first, 1 over a whole number.
        temperature: of the softmax over space.
        single_jacobian_map: one jacobian map for all keypoints instead of one each.
    """

    def __init__(
        self,
        *,
        num_keypoints: int,
        block_expansion: int,
        max_features: int,
        num_blocks: int,
        scale_factor: float,
        temperature: float,
        single_jacobian_map: bool,
    ) -> None:
        super().__init__()
        self.temperature = temperature
        self.down = AntiAliasDownsample(scale_factor)
        self.predictor = Hourglass(
            3, block_expansion=block_expansion, num_blocks=num_blocks, max_features=max_features
        )
        features = self.predictor.out_channels
        self.kp = nn.Conv2d(features, num_keypoints, kernel_size=7)
        jacobian_maps = 1 if single_jacobian_map else num_keypoints
        self.jacobian = nn.Conv2d(features, 4 * jacobian_maps, kernel_size=7)
        nn.init.zeros_(self.jacobian.weight)
        identity = torch.tensor([1.0, 0.0, 0.0, 1.0]).repeat(jacobian_maps)
        self.jacobian.bias = nn.Parameter(identity)

    def forward(self, frame: Float[Tensor, "B 3 H W"]) -> Keypoints:
        """Detect keypoints in frames with values in [0, 1]."""
        features = self.predictor(self.down(frame))
        # Planes again: sums over space run along memory.
        logits = channels_last(self.kp(features)).float().contiguous()
        heatmap = torch.softmax(logits.flatten(2) / self.temperature, dim=-1).view_as(logits)
        jacobian = channels_last(self.jacobian(features))
        maps = jacobian.float().contiguous().unflatten(1, (-1, 4))
        return Keypoints(value=_expected_position(heatmap), jacobian=_expected_map(heatmap, maps))


def _expected_position(heatmap: Float[Tensor, "B K h w"]) -> Float[Tensor, "B K 2"]:
    """μ_k = Σ_z z·heat_k(z), from the sums of heat_k over columns and over rows."""
    x, y = (
        torch.linspace(-1, 1, size, dtype=heatmap.dtype, device=heatmap.device)
        for size in (heatmap.shape[3], heatmap.shape[2])
    )
    columns, rows = heatmap.sum(dim=2), heatmap.sum(dim=3)
    return torch.stack([(columns * x).sum(dim=-1), (rows * y).sum(dim=-1)], dim=-1)


def _expected_map(
    heatmap: Float[Tensor, "B K h w"], maps: Float[Tensor, "B M 4 h w"]
) -> Float[Tensor, "B K 2 2"]:
    """J_k = Σ_z heat_k(z)·map_k(z), with M = K maps or one that all keypoints share."""
    expected: Tensor = (heatmap[:, :, None] * maps).sum(dim=(-2, -1)).unflatten(-1, (2, 2))
    return expected


def keypoint_heatmaps(
    value: Float[Tensor, "B K 2"], height: int, width: int, *, dtype: torch.dtype | None = None
) -> Float[Tensor, "B K h w"]:
    """A Gaussian around each keypoint: exp(−‖z − μ_k‖² / (2·0.01)), values in [0, 1].

    The product of one Gaussian along x and one along y: H + W exponentials, not H·W.

    Args:
        value: the keypoints.
        height: of the heatmaps.
        width: of the heatmaps.
        dtype: of the heatmaps, and of their two factors; that of the keypoints unless given.
    """
    x, y = (
        torch.linspace(-1, 1, size, dtype=value.dtype, device=value.device)
        for size in (width, height)
    )
    along_x, along_y = (
        torch.exp(-(axis - centre[..., None]).square() / (2 * HEATMAP_VARIANCE)).to(dtype)
        for axis, centre in ((x, value[..., 0]), (y, value[..., 1]))
    )
    return along_y[:, :, :, None] * along_x[:, :, None]


def relative_keypoints(
    source: Keypoints, driving: Keypoints, initial: Keypoints, *, adapt_scale: bool = False
) -> Keypoints:
    """Source keypoints moved by the driving keypoints' change since the start (method §6).

    μ_new = μ^S + a·(μ^D_t − μ^D_0) and J_new = J^D_t (J^D_0)^-1 J^S, with
    a = √(hull area of μ^S) / √(hull area of μ^D_0), or 1.

    Args:
        source: of the source frame, batch 1.
        driving: of T driving frames.
        initial: of the first driving frame, batch 1.
        adapt_scale: scale the movement by the size of the source's face or body against the
            driving one's; else a = 1.

    Raises:
        UserError: ``adapt_scale``, and the keypoints of either frame span no area.
    """
    scale = movement_scale(source, initial) if adapt_scale else 1.0
    return moved_keypoints(source, driving, initial, scale)


def movement_scale(source: Keypoints, initial: Keypoints) -> float:
    """The a of :func:`relative_keypoints`: √(hull area of μ^S) / √(hull area of μ^D_0).

    Raises:
        UserError: the keypoints of either frame span no area.
    """
    return math.sqrt(
        _hull_area(source.value, "source") / _hull_area(initial.value, "first driving")
    )


def moved_keypoints(
    source: Keypoints, driving: Keypoints, initial: Keypoints, scale: float
) -> Keypoints:
    """:func:`relative_keypoints` with a scale that is known already."""
    return Keypoints(
        value=source.value + scale * (driving.value - initial.value),
        jacobian=driving.jacobian @ inverse_2x2(initial.jacobian) @ source.jacobian,
    )


def pose_distance(
    source: Float[Tensor, "1 K 2"], driving: Float[Tensor, "T K 2"]
) -> Float[Tensor, " T"]:
    """Σ_k ‖n(μ^S)_k − n(μ^D_t)_k‖², with n(μ) = (μ − mean of μ) / √(hull area of μ) (method §6).

    Infinite for a driving frame whose keypoints span no area. Computed on the CPU, where hulls are.

    Raises:
        UserError: the source's keypoints span no area.
    """
    reference = _normalised(source.cpu(), "source")
    distances = [_squared_distance(reference, frame[None]) for frame in driving.cpu()]
    return torch.tensor(distances)


def _squared_distance(reference: Tensor, driving: Tensor) -> float:
    try:
        return float((reference - _normalised(driving, "driving")).square().sum())
    except UserError:
        return math.inf


def _normalised(value: Float[Tensor, "1 K 2"], frame: str) -> Float[Tensor, "1 K 2"]:
    return (value - value.mean(dim=1, keepdim=True)) / math.sqrt(_hull_area(value, frame))


_SMALLEST_AREA = 1e-6
"""Of a hull, in squared coordinate units: about 1/60 of a pixel of a 256x256 frame."""


def _hull_area(value: Float[Tensor, "1 K 2"], frame: str) -> float:
    """Area of the convex hull of one frame's keypoints.

    Raises:
        UserError: the area is zero, so that no scale follows from it.
    """
    points = value[0].detach().cpu().double().numpy()
    try:
        area = float(ConvexHull(points).volume)  # "volume" is the area in two dimensions
    except (QhullError, ValueError):  # on one line, fewer than three, or NaN
        area = 0.0
    if area < _SMALLEST_AREA:
        raise UserError(
            f"no scale: the {len(points)} keypoints of the {frame} frame lie on one line or in one "
            "place; animate without --adapt-scale and --best-frame"
        )
    return area
