"""Random thin-plate-spline warps with a known jacobian, for the equivariance losses (method §2)."""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from prioritycut_ray.models.blocks import coordinate_grid
from prioritycut_ray.models.sampling import grid_sample

SIGMA_AFFINE = 0.05
SIGMA_SPLINE = 0.005
_EPSILON = 1e-6
_EPSILON_OF_SQUARE = 1e-9


class ThinPlateSpline(NamedTuple):
    """T(z) = A z + t + (s(z), s(z)) with s(z) = Σ_j w_j · r_j² log(r_j + 1e-6), r_j = ‖z − c_j‖₁.

    As in the reference, r is the L1 distance, and the same s moves x and y. A Euclidean one, as in
    the thin-plate family (method §7), has s(z) = Σ_j w_j · r_j² log(r_j² + 1e-9), r_j = ‖z − c_j‖₂,
    no jacobian, and puts the centres of a frame's corner pixels at ±1.

    Attributes:
        affine: [A | t].
        weights: w, one per control point of a square grid (5x5 in training).
        euclidean: whether r is the Euclidean distance.
    """

    affine: Float[Tensor, "B 2 3"]
    weights: Float[Tensor, "B J"]
    euclidean: bool = False


def random_spline(normal: Float[Tensor, "B 31"], *, euclidean: bool = False) -> ThinPlateSpline:
    """Build random transforms from 6 + 25 standard normal numbers per sample (method §2)."""
    identity = torch.eye(2, 3, dtype=normal.dtype, device=normal.device)
    affine = identity + SIGMA_AFFINE * normal[:, :6].view(-1, 2, 3)
    return ThinPlateSpline(affine, SIGMA_SPLINE * normal[:, 6:], euclidean)


def _offsets(transform: ThinPlateSpline, points: Tensor) -> Float[Tensor, "P N J 2"]:
    """Return z − c_j for every point and control point."""
    side = round(transform.weights.shape[1] ** 0.5)
    control = coordinate_grid(side, side, dtype=points.dtype, device=points.device)
    return points[:, :, None] - control.reshape(1, 1, -1, 2)


def transform_points(
    transform: ThinPlateSpline, points: Float[Tensor, "P N 2"]
) -> Float[Tensor, "B N 2"]:
    """Return T(z) for points (x, y) in [-1, 1], per sample or (P = 1) the same for all."""
    matrix, translation = transform.affine[:, :, :2], transform.affine[:, :, 2]
    offsets = _offsets(transform, points)
    if transform.euclidean:
        squared = offsets.square().sum(-1)
        radial = squared * torch.log(squared + _EPSILON_OF_SQUARE)
    else:
        distance = offsets.abs().sum(-1)
        radial = distance.square() * torch.log(distance + _EPSILON)
    spline = torch.einsum("bnj,bj->bn", radial, transform.weights)
    return points @ matrix.mT + translation[:, None] + spline[..., None]


def jacobian(
    transform: ThinPlateSpline, points: Float[Tensor, "B N 2"]
) -> Float[Tensor, "B N 2 2"]:
    """Return ∇T = A + 1·∇s(z)ᵀ, ∇s = Σ_j w_j (2 r log(r + ε) + r²/(r + ε)) sign(z − c_j)."""
    offsets = _offsets(transform, points)
    distance = offsets.abs().sum(-1)
    slope = 2 * distance * torch.log(distance + _EPSILON) + distance.square() / (
        distance + _EPSILON
    )
    gradient = torch.einsum("bnj,bj,bnjc->bnc", slope, transform.weights, offsets.sign())
    return transform.affine[:, None, :, :2] + gradient[:, :, None]


def transform_frame(
    transform: ThinPlateSpline, frame: Float[Tensor, "B C H W"]
) -> Float[Tensor, "B C H W"]:
    """Sample the frame at T(z), with reflection padding."""
    height, width = frame.shape[2:]
    grid = coordinate_grid(height, width, dtype=frame.dtype, device=frame.device)
    warped = transform_points(transform, grid.reshape(1, -1, 2)).view(-1, height, width, 2)
    sampled = grid_sample(frame, warped, padding="reflection", align_corners=transform.euclidean)
    return sampled.contiguous(memory_format=torch.channels_last)
