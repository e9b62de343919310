"""Splines through groups of five points (method §7, "Motions")."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from prioritycut_ray.models.thin_plate.spline import (
    Splines,
    eliminated,
    evaluate_splines,
    fit_splines,
)


def spread(seed: int, groups: int = 3) -> Tensor:
    """Groups of five points each: a pentagon of random radius and place, jittered."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.rand(1, groups, *shape, generator=generator, dtype=torch.float64)

    angles = torch.arange(5, dtype=torch.float64) * (2 * math.pi / 5) + 2 * math.pi * random(1)
    corners = torch.stack([angles.cos(), angles.sin()], dim=-1) * (0.3 + 0.3 * random(1, 1))
    return corners + 0.2 * (random(5, 2) - 0.5) + 0.6 * (random(1, 2) - 0.5)


def targets(seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(1, 3, 5, 2, generator=generator, dtype=torch.float64) * 2 - 1


def at(splines: Splines, points: Tensor) -> Tensor:
    """Each group's spline at its own points."""
    return torch.stack(
        [evaluate_splines(splines, points[0, k])[0, k] for k in range(points.shape[1])]
    )[None]


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 2**31))
def test_a_spline_misses_its_targets_by_the_regularisation_alone(seed: int) -> None:
    """Row i of (L + 0.01·I) [w; a] = [y; 0] says T(c_i) = y_i − 0.01·w_i."""
    points, wanted = spread(seed), targets(seed + 1)
    splines = fit_splines(points, wanted)
    missed = wanted - at(splines, points)
    torch.testing.assert_close(missed, 0.01 * splines.weights, rtol=1e-6, atol=1e-9)
    # Little for groups that span a third of the frame and more: 5 % of the frame.
    assert missed.abs().max() <= 0.1


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 2**31))
def test_points_that_do_not_move_leave_the_frame_where_it_is(seed: int) -> None:
    """To 5 % of a frame: the 0.01 shrinks affine maps, too."""
    points = spread(seed)
    grid = torch.rand(50, 2, dtype=torch.float64) * 2 - 1
    still = evaluate_splines(fit_splines(points, points), grid)
    assert (still - grid).abs().max() <= 0.1


def test_the_solution_is_that_of_the_stated_system() -> None:
    points, wanted = spread(0, groups=1), targets(0)[:, :1]
    splines = fit_splines(points, wanted)
    c, y = points[0, 0], wanted[0, 0]
    squared = torch.cdist(c, c).square()
    system = torch.zeros(8, 8, dtype=torch.float64)
    system[:5, :5] = squared * torch.log(squared + 1e-9)
    system[:5, 5:] = torch.cat([c, torch.ones(5, 1, dtype=torch.float64)], dim=1)
    system[5:, :5] = system[:5, 5:].T
    solution = torch.cat([splines.weights[0, 0], splines.affine[0, 0].T])
    right = torch.cat([y, torch.zeros(3, 2, dtype=torch.float64)])
    torch.testing.assert_close((system + 0.01 * torch.eye(8)) @ solution, right)


@pytest.mark.parametrize("together", [2, 3, 5])
@pytest.mark.parametrize("place", [(0.0, 0.0), (0.4, -0.7)])
def test_points_in_one_place_give_finite_values_and_gradients(
    together: int, place: tuple[float, float]
) -> None:
    points, wanted = spread(4).float(), targets(4).float()
    points[..., :together, :] = torch.tensor(place)
    points.requires_grad_()
    wanted.requires_grad_()
    grid = torch.cat([torch.rand(20, 2) * 2 - 1, torch.tensor([place])])
    bent = evaluate_splines(fit_splines(points, wanted), grid)
    assert bent.isfinite().all()
    for gradient in torch.autograd.grad(bent.square().sum(), (points, wanted)):
        assert gradient.isfinite().all()


def test_gradients_match_finite_differences() -> None:
    points, wanted = spread(5, groups=1), targets(5)[:, :1]
    grid = torch.rand(4, 2, dtype=torch.float64) * 2 - 1

    def bent(source: Tensor, target: Tensor) -> Tensor:
        return evaluate_splines(fit_splines(source, target), grid)

    inputs = (points.requires_grad_(), wanted.requires_grad_())
    assert torch.autograd.gradcheck(bent, inputs)


def test_groups_and_samples_do_not_depend_on_each_other() -> None:
    points, wanted = torch.cat([spread(1), spread(2)]), torch.cat([targets(1), targets(2)])
    grid = torch.rand(9, 2, dtype=torch.float64)
    both = evaluate_splines(fit_splines(points, wanted), grid)
    alone = evaluate_splines(fit_splines(points[1:, 2:], wanted[1:, 2:]), grid)
    torch.testing.assert_close(both[1:, 2:], alone)


@pytest.mark.parametrize("size", [1, 2, 8])
def test_elimination_solves_what_torch_solves(size: int) -> None:
    generator = torch.Generator().manual_seed(size)
    matrix = torch.randn(6, 4, size, size, generator=generator, dtype=torch.float64)
    values = torch.randn(6, 4, size, 2, generator=generator, dtype=torch.float64)
    torch.testing.assert_close(
        eliminated(matrix, values), torch.linalg.solve(matrix, values), atol=1e-9, rtol=1e-9
    )


def test_zeros_on_the_diagonal_need_pivots() -> None:
    order = torch.tensor([2, 0, 3, 1])
    matrix = torch.eye(4, dtype=torch.float64)[order] * torch.tensor([[2.0], [1e-12], [3.0], [5.0]])
    values = torch.arange(8, dtype=torch.float64).view(4, 2)
    expected = torch.linalg.solve(matrix, values)
    solution = eliminated(matrix[None, None], values[None, None])[0, 0]
    torch.testing.assert_close(solution, expected, atol=0, rtol=1e-12)
