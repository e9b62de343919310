"""Random thin-plate-spline warps and their closed-form jacobian (method §2)."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from prioritycut_ray.equivariance import (
    ThinPlateSpline,
    jacobian,
    random_spline,
    transform_frame,
    transform_points,
)


def spline(seed: int, batch: int = 2) -> ThinPlateSpline:
    """A transform ten times stronger than in training, in double precision."""
    generator = torch.Generator().manual_seed(seed)
    normal = torch.randn(batch, 31, generator=generator, dtype=torch.float64)
    return random_spline(10 * normal)


def identity(batch: int = 1) -> ThinPlateSpline:
    return random_spline(torch.zeros(batch, 31))


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 2**31))
def test_jacobian_equals_autograd(seed: int) -> None:
    transform = spline(seed)
    generator = torch.Generator().manual_seed(seed)
    points = torch.rand(2, 7, 2, generator=generator, dtype=torch.float64) * 2 - 1
    points.requires_grad_()
    mapped = transform_points(transform, points)
    rows = [
        torch.autograd.grad(mapped[..., axis].sum(), points, retain_graph=True)[0]
        for axis in (0, 1)
    ]
    torch.testing.assert_close(jacobian(transform, points), torch.stack(rows, dim=-2))


def test_jacobian_is_finite_at_the_control_points() -> None:
    """There the L1 distance has a kink, and log(r) a pole."""
    transform = spline(1, batch=1)
    axis = torch.linspace(-1, 1, 5, dtype=torch.float64)
    points = torch.cartesian_prod(axis, axis)[None].requires_grad_()
    derivative = jacobian(transform, points)
    derivative.sum().backward()
    assert derivative.isfinite().all()
    assert points.grad is not None
    assert points.grad.isfinite().all()


def test_one_control_point_by_hand() -> None:
    """The centre alone, weight 0.5, at (0.3, −0.4): r = 0.7, s = 0.5 · 0.49 · log 0.7."""
    weights = torch.zeros(1, 25)
    weights[0, 12] = 0.5
    transform = ThinPlateSpline(torch.tensor([[[1.0, 0.0, 0.1], [0.0, 2.0, 0.0]]]), weights)
    point = torch.tensor([[[0.3, -0.4]]])
    s = 0.5 * 0.49 * math.log(0.7 + 1e-6)
    expected = torch.tensor([[[0.3 + 0.1 + s, -0.8 + s]]])
    torch.testing.assert_close(transform_points(transform, point), expected)
    slope = 0.5 * (2 * 0.7 * math.log(0.7) + 0.7)  # ds/dr; r grows with x and falls with y
    derivative = torch.tensor([[1 + slope, -slope], [slope, 2 - slope]])
    torch.testing.assert_close(jacobian(transform, point)[0, 0], derivative, rtol=1e-4, atol=1e-5)


def test_zero_noise_is_the_identity() -> None:
    points = torch.rand(1, 6, 2) * 2 - 1
    assert torch.equal(transform_points(identity(), points), points)
    assert torch.equal(jacobian(identity(), points), torch.eye(2).expand(1, 6, 2, 2))


def test_noise_has_the_methods_strength() -> None:
    transform = random_spline(torch.ones(1, 31))
    expected = torch.tensor([[[1.05, 0.05, 0.05], [0.05, 1.05, 0.05]]])
    torch.testing.assert_close(transform.affine, expected)
    torch.testing.assert_close(transform.weights, torch.full((1, 25), 0.005))


def test_each_sample_has_its_own_transform() -> None:
    both = spline(3)
    points = torch.rand(2, 4, 2, dtype=torch.float64)
    for row in range(2):
        one = ThinPlateSpline(both.affine[row : row + 1], both.weights[row : row + 1])
        alone = transform_points(one, points[row : row + 1])
        torch.testing.assert_close(alone, transform_points(both, points)[row : row + 1])


def test_frame_is_reflected_at_its_border() -> None:
    """Shifted far to one side, a white frame stays white; zero padding would show black."""
    shift = torch.tensor([[[1.0, 0.0, 0.7], [0.0, 1.0, -0.4]]])
    transform = ThinPlateSpline(shift, torch.zeros(1, 25))
    warped = transform_frame(transform, torch.ones(1, 3, 16, 24))
    torch.testing.assert_close(warped, torch.ones(1, 3, 16, 24))


@pytest.mark.parametrize(("axis", "shift"), [(0, [0.5, 0.0]), (1, [0.0, 0.5])])
def test_frame_is_sampled_at_the_transformed_points(axis: int, shift: list[float]) -> None:
    """A linear ramp that is sampled half a unit further is brighter by that much inside."""
    size = 33
    centres = (2 * torch.arange(size) + 1) / size - 1
    ramp = centres.view(1, 1, 1, size) if axis == 0 else centres.view(1, 1, size, 1)
    frame = ramp.expand(1, 1, size, size)
    affine = torch.cat([torch.eye(2), torch.tensor(shift)[:, None]], dim=1)[None]
    warped = transform_frame(ThinPlateSpline(affine, torch.zeros(1, 25)), frame)
    torch.testing.assert_close(warped[0, 0, 16, 16].item(), 0.5, rtol=1e-4, atol=1e-4)
