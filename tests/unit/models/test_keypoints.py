"""Keypoints: their Gaussians, and the transfer of movement to another identity (method §1, §6)."""

import math

import pytest
import torch
from torch import Tensor

from prioritycut_ray.errors import UserError
from prioritycut_ray.models.keypoints import Keypoints, keypoint_heatmaps, relative_keypoints

SQUARE = torch.tensor([[[-0.5, -0.5], [0.5, -0.5], [0.5, 0.5], [-0.5, 0.5], [0.1, 0.0]]])


def keypoints(value: Tensor, jacobian: Tensor | None = None) -> Keypoints:
    identity = torch.eye(2).expand(*value.shape, 2)
    return Keypoints(value, identity if jacobian is None else jacobian)


def test_movement_is_added_to_the_source() -> None:
    driving = torch.cat([SQUARE + 0.1, SQUARE + torch.tensor([0.2, -0.3])])
    moved = relative_keypoints(keypoints(SQUARE / 2), keypoints(driving), keypoints(SQUARE))
    expected = torch.cat([SQUARE / 2 + 0.1, SQUARE / 2 + torch.tensor([0.2, -0.3])])
    torch.testing.assert_close(moved.value, expected)


def test_jacobians_follow_the_change_since_the_start() -> None:
    a, b, c = (torch.randn(1, 5, 2, 2) + 2 * torch.eye(2) for _ in range(3))
    moved = relative_keypoints(keypoints(SQUARE, a), keypoints(SQUARE, b), keypoints(SQUARE, c))
    torch.testing.assert_close(moved.jacobian, b @ torch.linalg.inv(c) @ a)


def test_no_movement_gives_the_source() -> None:
    jacobian = torch.randn(1, 5, 2, 2) + 3 * torch.eye(2)
    source, initial = keypoints(SQUARE / 3, jacobian), keypoints(SQUARE, jacobian * 2)
    moved = relative_keypoints(source, initial, initial, adapt_scale=True)
    torch.testing.assert_close(moved.value, source.value)
    torch.testing.assert_close(moved.jacobian, source.jacobian)


def test_adapted_scale_is_the_ratio_of_the_hulls_sides() -> None:
    """The source spans 0.6 x 0.6, the driving frame 1 x 1: its movement shrinks to 0.6."""
    source, initial = keypoints(0.6 * SQUARE), keypoints(SQUARE)
    driving = keypoints(SQUARE + torch.tensor([0.2, 0.0]))
    moved = relative_keypoints(source, driving, initial, adapt_scale=True)
    expected = 0.6 * SQUARE + torch.tensor([0.12, 0.0])
    torch.testing.assert_close(moved.value, expected)


def test_points_inside_the_hull_do_not_change_the_scale() -> None:
    inside = SQUARE.clone()
    inside[0, 4] = torch.tensor([-0.3, 0.2])
    moved = relative_keypoints(
        keypoints(inside), keypoints(SQUARE + 0.1), keypoints(SQUARE), adapt_scale=True
    )
    torch.testing.assert_close(moved.value, inside + 0.1)


@pytest.mark.parametrize(
    "flat",
    [
        torch.zeros(1, 5, 2),
        torch.linspace(-1, 1, 5).view(1, 5, 1).repeat(1, 1, 2),
        torch.full((1, 5, 2), math.nan),
    ],
    ids=["one place", "one line", "nan"],
)
def test_keypoints_without_an_area_give_no_scale(flat: Tensor) -> None:
    square, line = keypoints(SQUARE), keypoints(flat)
    with pytest.raises(UserError, match="of the source frame"):
        relative_keypoints(line, square, square, adapt_scale=True)
    with pytest.raises(UserError, match="of the first driving frame"):
        relative_keypoints(square, square, line, adapt_scale=True)


def test_two_keypoints_give_no_scale() -> None:
    two = keypoints(SQUARE[:, :2])
    with pytest.raises(UserError, match="the 2 keypoints"):
        relative_keypoints(two, two, two, adapt_scale=True)


def test_heatmap_peaks_at_its_keypoint_and_falls_off_like_a_gaussian() -> None:
    value = torch.tensor([[[0.0, 0.5], [-1.0, -1.0]]])
    heatmap = keypoint_heatmaps(value, 5, 21)  # pixels 0.1 apart in x, 0.5 in y
    assert heatmap.shape == (1, 2, 5, 21)
    assert heatmap[0, 0].argmax() == 3 * 21 + 10
    assert heatmap[0, 0, 3, 10] == 1
    torch.testing.assert_close(
        heatmap[0, 0, 3, 12].item(), math.exp(-(0.2**2) / 0.02), rtol=1e-4, atol=0.0
    )
    assert heatmap[0, 1, 0, 0] == 1
