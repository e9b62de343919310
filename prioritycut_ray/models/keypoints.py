"""Keypoints of any generator family: Gaussians, relative motion, poses (method §1, §6)."""

import math
from typing import NamedTuple

import torch
from jaxtyping import Float
from scipy.spatial import ConvexHull, QhullError
from torch import Tensor

from prioritycut_ray.errors import UserError
from prioritycut_ray.models.blocks import inverse_2x2

HEATMAP_VARIANCE = 0.01
"""Variance of the Gaussians that represent keypoints, in squared coordinate units (method §1)."""


class Keypoints(NamedTuple):
    """K keypoints of a batch of frames.

    Attributes:
        value: (x, y) in [-1, 1].
        jacobian: local affine transform around each keypoint, from a reference frame; None in a
            family that estimates none.
    """

    value: Float[Tensor, "B K 2"]
    jacobian: Float[Tensor, "B K 2 2"] | None = None

    def detach(self) -> "Keypoints":
        """Return the same keypoints without their gradient history."""
        value, jacobian = self
        return Keypoints(value.detach(), None if jacobian is None else jacobian.detach())

    def first(self) -> "Keypoints":
        """Return the keypoints of the first frame, as a batch of one."""
        value, jacobian = self
        return Keypoints(value[:1], None if jacobian is None else jacobian[:1])

    def expand_like(self, other: "Keypoints") -> "Keypoints":
        """Return the keypoints of one frame (B = 1) once for each frame of another batch."""
        value, jacobian = self
        count = other.value.shape[0]
        return Keypoints(
            value.expand(count, -1, -1),
            None if jacobian is None else jacobian.expand(count, -1, -1, -1),
        )


def keypoint_heatmaps(
    value: Float[Tensor, "B K 2"], height: int, width: int, *, dtype: torch.dtype | None = None
) -> Float[Tensor, "B K h w"]:
    """Draw a Gaussian around each keypoint: exp(−‖z − μ_k‖² / (2·0.01)), values in [0, 1].

    It is the product of a Gaussian along x and one along y: H + W exponentials instead of H·W.

    Args:
        value: the keypoints.
        height: height of the heatmaps.
        width: width of the heatmaps.
        dtype: dtype of the heatmaps and their two factors; by default, that of the keypoints.
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


def heatmap_difference(
    source: Keypoints, driving: Keypoints, height: int, width: int
) -> Float[Tensor, "B K1 h w"]:
    """Return H_k = driving Gaussian − source Gaussian, after the background's H_0 = 0."""
    both = torch.stack([driving.value, source.value])
    heatmaps = keypoint_heatmaps(both.flatten(0, 1), height, width)
    of_driving, of_source = heatmaps.unflatten(0, both.shape[:2]).unbind()
    difference = of_driving - of_source
    return torch.cat([torch.zeros_like(difference[:, :1]), difference], dim=1)


def relative_keypoints(
    source: Keypoints, driving: Keypoints, initial: Keypoints, *, adapt_scale: bool = False
) -> Keypoints:
    """Move source keypoints by the change of the driving keypoints since the start (method §6).

    μ_new = μ^S + a·(μ^D_t − μ^D_0) and J_new = J^D_t (J^D_0)^-1 J^S, with
    a = √(hull area of μ^S) / √(hull area of μ^D_0), or 1.

    Args:
        source: keypoints of the source frame, batch 1.
        driving: keypoints of T driving frames.
        initial: keypoints of the first driving frame, batch 1.
        adapt_scale: scale the movement by the size of the source's face or body relative to the
            driving one; otherwise a = 1.

    Raises:
        UserError: ``adapt_scale``, and the keypoints of either frame span no area.
    """
    scale = movement_scale(source, initial) if adapt_scale else 1.0
    return moved_keypoints(source, driving, initial, scale)


def movement_scale(source: Keypoints, initial: Keypoints) -> float:
    """Return the a of :func:`relative_keypoints`: √(hull area of μ^S) / √(hull area of μ^D_0).

    Raises:
        UserError: the keypoints of either frame span no area.
    """
    return math.sqrt(
        _hull_area(source.value, "source") / _hull_area(initial.value, "first driving")
    )


def moved_keypoints(
    source: Keypoints, driving: Keypoints, initial: Keypoints, scale: float
) -> Keypoints:
    """Move keypoints as :func:`relative_keypoints` does, with a known scale."""
    value = source.value + scale * (driving.value - initial.value)
    if source.jacobian is None or driving.jacobian is None or initial.jacobian is None:
        return Keypoints(value)
    return Keypoints(value, driving.jacobian @ inverse_2x2(initial.jacobian) @ source.jacobian)


def pose_distance(
    source: Float[Tensor, "1 K 2"], driving: Float[Tensor, "T K 2"]
) -> Float[Tensor, " T"]:
    """Return Σ_k ‖n(μ^S)_k − n(μ^D_t)_k‖², n(μ) = (μ − mean μ) / √(hull area of μ) (method §6).

    It is infinite for a driving frame whose keypoints span no area. Hulls are computed on the CPU.

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
"""Smallest valid area of a hull, in squared coordinate units: 1/60 pixel of a 256x256 frame."""


def _hull_area(value: Float[Tensor, "1 K 2"], frame: str) -> float:
    """Return the area of the convex hull of one frame's keypoints.

    Raises:
        UserError: the area is zero, so it gives no scale.
    """
    points = value[0].detach().cpu().double().numpy()
    try:
        area = float(ConvexHull(points).volume)  # "volume" is the area in two dimensions
    except (QhullError, ValueError):  # on one line, fewer than three, or NaN
        area = 0.0
    if area < _SMALLEST_AREA:
        raise UserError(
            f"the {len(points)} keypoints of the {frame} frame lie on one line or in one place and "
            "give no scale; animate without --adapt-scale and --best-frame"
        )
    return area
