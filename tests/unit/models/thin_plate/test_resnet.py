"""Keypoints and the background's motion by ResNets (method §7)."""

import torch
from torch import nn

from prioritycut_ray.models.thin_plate.resnet import (
    BackgroundMotion,
    PointDetector,
    background_distance,
)


def test_keypoints_lie_in_the_frame() -> None:
    detector = PointDetector(num_splines=2).eval()
    found = detector(torch.rand(2, 3, 32, 32))
    assert found.value.shape == (2, 10, 2)
    assert found.jacobian is None
    assert (found.value.abs() < 1).all()
    nn.init.constant_(detector.fg_encoder.fc.bias, 50.0)
    assert (detector(torch.rand(1, 3, 32, 32)).value <= 1).all()


def test_no_residual_branch_starts_at_zero() -> None:
    """As in the reference; by timm's default they all do."""
    encoder = PointDetector(num_splines=2, channels=8).fg_encoder
    started = [
        weight
        for name, weight in encoder.named_parameters()
        if name.startswith("layer") and "bn" in name and name.endswith("weight")
    ]
    assert len(started) == 16  # two in each of eight blocks
    for weight in started:
        torch.testing.assert_close(weight, torch.ones_like(weight))


def test_the_background_starts_at_rest_and_stays_an_affine_map() -> None:
    background = BackgroundMotion()
    frames = torch.rand(2, 4, 3, 32, 32)
    torch.testing.assert_close(background(*frames), torch.eye(3).expand(4, 3, 3))
    optimizer = torch.optim.Adam(background.parameters(), lr=1e-2)
    for _ in range(3):
        optimizer.zero_grad()
        (background(*frames) - 2).square().sum().backward()
        optimizer.step()
    moved = background(*frames)
    assert (moved[:, :2] - torch.eye(3)[:2]).abs().min() > 1e-4
    assert torch.equal(moved[:, 2], torch.tensor([0.0, 0.0, 1.0]).expand(4, 3))


def test_there_and_back_is_no_distance() -> None:
    forth = torch.eye(3) + 0.1 * torch.rand(2, 3, 3)
    forth[:, 2] = torch.tensor([0.0, 0.0, 1.0])
    assert background_distance(forth, torch.linalg.inv(forth)) < 1e-6
    shifted = torch.eye(3)[None].clone()
    shifted[0, 0, 2] = 0.9
    torch.testing.assert_close(background_distance(shifted, shifted), torch.tensor(1.8 / 9))
