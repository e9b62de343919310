"""Number formats on a GPU, against the same work on a CPU in double precision."""

from copy import deepcopy

import numpy as np
import pytest
import torch
from torch import nn

from prioritycut_ray.config import load_config
from prioritycut_ray.equivariance import jacobian, random_spline, transform_points
from prioritycut_ray.evaluation.scoring import Extractors, score_frames
from prioritycut_ray.inference.animate import animate
from prioritycut_ray.metrics.aggregate import value_of
from prioritycut_ray.models.first_order.dense_motion import sparse_motions
from prioritycut_ray.models.keypoints import Keypoints, relative_keypoints
from prioritycut_ray.networks import build_animator
from prioritycut_ray.precision import float32_products
from tests.conftest import TINY

CPU = torch.device("cpu")


def coordinates(dtype: torch.dtype, device: torch.device) -> dict[str, torch.Tensor]:
    """All matrix products of coordinates, for the same random numbers."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    spline = random_spline(random(8, 31))
    points = random(8, 200, 2).clamp(-1, 1)
    source, driving, initial = (
        Keypoints(
            random(8, 10, 2).clamp(-1, 1), torch.eye(2).to(device, dtype) + random(8, 10, 2, 2) / 4
        )
        for _ in range(3)
    )
    return {
        "points": transform_points(spline, points),
        "jacobian": jacobian(spline, points),
        "motions": sparse_motions(source, driving, 64, 64),
        "relative": relative_keypoints(source, driving, initial).jacobian,
    }


@pytest.mark.parametrize("convolutions", ["ieee", "tf32"])
def test_coordinates_are_those_of_the_cpu(device: torch.device, convolutions: str) -> None:
    """Even if the process asks for rounding; to a thousandth of a pixel at 256x256."""
    expected = coordinates(torch.float64, CPU)
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    try:
        with float32_products(convolutions=convolutions):
            ours = coordinates(torch.float32, device)
    finally:
        torch.backends.cuda.matmul.fp32_precision = before
    for name, values in expected.items():
        scale = float(values.abs().max())
        difference = float((ours[name].double().cpu() - values).abs().max())
        assert difference < 1e-5 * max(1.0, scale), name


def test_the_check_above_sees_rounding(gpu: torch.device) -> None:
    if torch.cuda.get_device_capability(gpu) < (8, 0):
        pytest.skip("this GPU has no TF32")
    a = torch.randn(512, 512, device=gpu)
    exact = a.double() @ a.double()
    differences = {}
    for products in ("ieee", "tf32"):
        with float32_products(convolutions="tf32"):
            torch.backends.cuda.matmul.fp32_precision = products
            differences[products] = float((a @ a - exact).abs().max())
    assert differences["tf32"] > 10 * differences["ieee"]


@pytest.mark.parametrize("relative", [True, False])
def test_animation_gives_the_pictures_of_the_cpu(device: torch.device, relative: bool) -> None:
    config = load_config(str(TINY))
    generator = torch.Generator().manual_seed(0)
    source = torch.rand(1, 3, 32, 32, generator=generator)
    driving = np.random.default_rng(0).integers(0, 256, (20, 32, 32, 3), dtype=np.uint8)
    pictures = []
    for place in (CPU, device):
        torch.manual_seed(0)
        animator = build_animator(config.model).to(place).eval()
        parts = animate(animator, source.to(place), driving, relative=relative, adapt_scale=False)
        pictures.append(torch.cat([part.animation.prediction.cpu() for part in parts]))
    assert float((pictures[0] - pictures[1]).abs().max()) < 0.02, "TF32 only in convolutions"


class Difference(nn.Module):
    """Replaces the perceptual distance: a bare machine does not have its weights."""

    def forward(self, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
        return (first - second).abs().mean(dim=(1, 2, 3))


def test_evaluation_gives_the_scores_of_the_cpu(device: torch.device) -> None:
    config = load_config(str(TINY))
    torch.manual_seed(0)
    animator = build_animator(config.model).eval()
    frames = np.random.default_rng(0).integers(0, 256, (6, 32, 32, 3), dtype=np.uint8)
    extractors = Extractors(Difference(), "difference")
    scores = [
        score_frames(frames, [deepcopy(animator).to(place)], extractors) for place in (CPU, device)
    ]
    for ours, expected in zip(scores[1], scores[0], strict=True):
        assert ours.keys() == expected.keys()
        for name in expected:
            first, second = (value_of(name, tallies[name]) for tallies in (ours, expected))
            assert first == pytest.approx(second, rel=1e-4), name
