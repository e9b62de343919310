"""Thin-plate splines through groups of five keypoints (method §7, "Motions")."""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

POINTS = 5
"""Keypoints of a group, which determine one spline."""
_REGULARISATION = 0.01
_EPSILON = 1e-9


class Splines(NamedTuple):
    """T_k(z) = A_k z + t_k + Σ_j U(‖z − c_kj‖²) w_kj for K groups; U(r²) = r²·log(r² + 1e-9).

    Attributes:
        control: c, the points that determine the splines, in [-1, 1].
        weights: w, one for each control point and coordinate.
        affine: [A | t].
    """

    control: Float[Tensor, "B K 5 2"]
    weights: Float[Tensor, "B K 5 2"]
    affine: Float[Tensor, "B K 2 3"]


def fit_splines(source: Float[Tensor, "B K 5 2"], target: Float[Tensor, "B K 5 2"]) -> Splines:
    """Fit splines that take each group of source points to its target points.

    They solve (L + 0.01·I) [w; A; t] = [target; 0] with L = [[U, P], [Pᵀ, 0]] and P = (x, y, 1).
    With the 0.01 points may coincide, and the splines miss the targets by a little. Computed in
    float64: in float32 the solution is accurate to 1e-5 only.
    """
    points = source.double()
    squared = (points[..., :, None, :] - points[..., None, :, :]).square().sum(-1)
    plane = torch.cat([points, torch.ones_like(points[..., :1])], dim=-1)
    zeros = points.new_zeros(*points.shape[:2], 3, 3)
    upper = torch.cat([_radial(squared), plane], dim=-1)
    lower = torch.cat([plane.mT, zeros], dim=-1)
    identity = torch.eye(POINTS + 3, dtype=points.dtype, device=points.device)
    matrix = torch.cat([upper, lower], dim=-2) + _REGULARISATION * identity
    values = torch.cat([target.double(), zeros[..., :2]], dim=-2)
    solution = _solved(matrix, values).to(source.dtype)
    return Splines(source, solution[..., :POINTS, :], solution[..., POINTS:, :].mT)


def _solved(matrix: Float[Tensor, "*B N N"], values: Float[Tensor, "*B N M"]) -> Tensor:
    if torch.compiler.is_exporting():
        return eliminated(matrix, values)
    # Unchecked: to report a singular matrix, the host would wait for a GPU.
    solution: Tensor = torch.linalg.solve_ex(matrix, values).result
    return solution


def eliminated(
    matrix: Float[Tensor, "*B N N"], values: Float[Tensor, "*B N M"]
) -> Float[Tensor, "*B N M"]:
    """Solve linear systems by Gauss–Jordan elimination with partial pivoting.

    It consists of elementary tensor operations, for graphs in formats without a solver (ONNX), and
    is as accurate as :func:`torch.linalg.solve`.
    """
    size = matrix.shape[-1]
    system = torch.cat([matrix, values], dim=-1)
    rows = torch.arange(size, device=matrix.device)
    is_left = torch.ones_like(matrix[..., 0], dtype=torch.bool)
    pivots = []
    for column in range(size):
        heights = torch.where(is_left, system[..., column].abs(), -1)
        is_pivot = heights.argmax(dim=-1, keepdim=True) == rows
        is_left = is_left & ~is_pivot
        pivots.append(is_pivot.to(matrix.dtype))
        pivot = pivots[-1][..., None, :] @ system
        pivot = pivot / pivot[..., column, None]
        # The pivot's own row becomes `pivot`, all others zero in this column.
        system = system - (system[..., column] - pivots[-1])[..., None] * pivot
    # Row i of the solution is in the pivot's row of column i.
    return torch.stack(pivots, dim=-2) @ system[..., size:]


def evaluate_splines(splines: Splines, points: Float[Tensor, "N 2"]) -> Float[Tensor, "B K N 2"]:
    """Return T_k(z) for points (x, y) that all splines share."""
    control, weights, affine = splines
    x = points[:, 0] - control[..., 0, None]
    y = points[:, 1] - control[..., 1, None]
    bent: Tensor = _radial(x.square() + y.square()).mT @ weights
    return points @ affine[..., :2].mT + affine[..., None, :, 2] + bent


def _radial(squared: Tensor) -> Tensor:
    return squared * torch.log(squared + _EPSILON)
