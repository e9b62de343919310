"""Every loss on an example small enough to compute by hand (method §2, §3, §4)."""

from math import log

import pytest
import torch
from torch import Tensor

from prioritycut_ray import losses
from prioritycut_ray.equivariance import (
    ThinPlateSpline,
    jacobian,
    random_spline,
    transform_points,
)
from prioritycut_ray.models.discriminators import DiscriminatorOutput
from prioritycut_ray.models.keypoints import Keypoints
from prioritycut_ray.priority_cut import mix

A = log(3)
"""The logit of probability 3/4: cross-entropy log(4/3) if real, log 4 if fake."""
REAL, FAKE, EVEN = log(4 / 3), log(4), log(2)


def image(*rows: list[float]) -> Tensor:
    """One sample with one channel."""
    return torch.tensor(rows, dtype=torch.float32)[None, None]


def patch(logits: Tensor) -> DiscriminatorOutput:
    return DiscriminatorOutput(logits, None, ())


def unet(logit: float, pixels: Tensor) -> DiscriminatorOutput:
    return DiscriminatorOutput(torch.tensor([float(logit)]), pixels, ())


def close(loss: Tensor, expected: float) -> None:
    assert loss.shape == ()
    torch.testing.assert_close(loss, torch.tensor(expected))


# Patch discriminator: LSGAN and feature matching

PATCHES_OF_REAL = image([1, 2], [3, 4])
PATCHES_OF_FAKE = image([0, 1], [2, 0])


def test_generator_loss_is_the_squared_distance_to_one() -> None:
    close(losses.generator_adversarial(patch(PATCHES_OF_REAL)), (0 + 1 + 4 + 9) / 4)


def test_discriminator_loss_is_the_squared_distance_to_one_and_zero() -> None:
    loss = losses.discriminator_adversarial(patch(PATCHES_OF_REAL), patch(PATCHES_OF_FAKE))
    close(loss, (0 + 1 + 4 + 9) / 4 + (0 + 1 + 4 + 0) / 4)


def test_feature_distance_sums_the_mean_of_each_level() -> None:
    predicted = [image([1, 2], [3, 4]), image([5])]
    target = [image([0, 0], [0, 0]), image([7])]
    close(losses.feature_distance(predicted, target), 10 / 4 + 2)


def test_feature_distance_has_gradients_only_for_the_prediction() -> None:
    predicted, target = torch.zeros(3, requires_grad=True), torch.ones(3, requires_grad=True)
    losses.feature_distance([predicted], [target]).backward()
    assert predicted.grad is not None
    assert target.grad is None


def test_feature_distance_rejects_another_number_of_levels() -> None:
    with pytest.raises(ValueError, match="zip"):
        losses.feature_distance([torch.zeros(1)], [torch.zeros(1)] * 2)


# U-Net discriminator


PIXELS = image([A, -A], [0, 0])


def test_generator_loss_averages_image_and_pixels() -> None:
    pixels = (REAL + FAKE + 2 * EVEN) / 4
    close(losses.generator_adversarial(unet(A, PIXELS)), (REAL + pixels) / 2)


def test_discriminator_loss_averages_real_and_fake() -> None:
    real, fake = unet(A, PIXELS), unet(A, image([A, A], [A, 0]))
    pixels_of_real = (REAL + FAKE + 2 * EVEN) / 4
    pixels_of_fake = (3 * FAKE + EVEN) / 4
    expected = (REAL + pixels_of_real) / 2 + (FAKE + pixels_of_fake) / 2
    close(losses.discriminator_adversarial(real, fake), expected)


def test_mixed_image_is_fake_and_its_pixels_are_what_the_mask_says() -> None:
    mixed = unet(A, image([A, A], [-A, -A]))
    mask = image([1, 0], [1, 0])
    close(losses.mixed_adversarial(mixed, mask), FAKE + (REAL + FAKE + FAKE + REAL) / 4)


MASK = image([1, 0], [0, 0])


def test_consistency_compares_logits_of_the_mix_with_the_mix_of_logits() -> None:
    mixed = unet(0, image([1, 2], [3, 4]))
    real, fake = unet(0, image([1, 9], [9, 9])), unet(0, image([9, 2], [5, 1]))
    close(losses.consistency(mixed, real, fake, MASK), (0 + 0 + 4 + 9) / 4)


def test_consistency_is_zero_for_an_exactly_equivariant_discriminator() -> None:
    """It classifies each pixel independently; one with a receptive field is not equivariant."""
    real, fake = torch.rand(2, 2, 3, 8, 8)
    mask = torch.randint(0, 2, (2, 1, 8, 8)).float()

    def by_itself(frame: Tensor) -> DiscriminatorOutput:
        return DiscriminatorOutput(frame.mean((1, 2, 3)), frame.sum(1, keepdim=True).exp(), ())

    def around(frame: Tensor) -> DiscriminatorOutput:
        return by_itself(frame + frame.roll(1, -1))

    for judge, expected in ((by_itself, True), (around, False)):
        loss = losses.consistency(judge(mix(real, fake, mask)), judge(real), judge(fake), mask)
        assert (loss == 0) == expected


def test_consistency_sends_gradients_through_all_three_passes() -> None:
    pixels = [torch.randn(1, 1, 2, 2, requires_grad=True) for _ in range(3)]
    mixed, real, fake = (unet(0, p) for p in pixels)
    losses.consistency(mixed, real, fake, MASK).backward()
    of_mixed, of_real, of_fake = (p.grad for p in pixels)
    assert of_mixed is not None
    assert of_real is not None
    assert of_fake is not None
    assert (of_mixed != 0).all()
    assert torch.equal(of_real != 0, MASK.bool())
    assert torch.equal(of_fake != 0, ~MASK.bool())


def test_mixing_needs_logits_for_each_pixel() -> None:
    with pytest.raises(AssertionError, match="U-Net"):
        losses.mixed_adversarial(patch(PATCHES_OF_REAL), MASK)


# Equivariance

SHEAR = ThinPlateSpline(torch.tensor([[[1.0, 0.5, 0.25], [0.0, 1.0, 0.0]]]), torch.zeros(1, 25))
"""T(x, y) = (x + y/2 + 1/4, y)."""


def test_keypoints_of_the_warped_frame_are_mapped_back() -> None:
    transformed = Keypoints(torch.tensor([[[0.0, 0.5], [0.25, 0.0]]]), torch.zeros(1, 2, 2, 2))
    driving = Keypoints(torch.tensor([[[0.5, 0.5], [0.25, -0.5]]]), torch.zeros(1, 2, 2, 2))
    # T gives (0.5, 0.5) and (0.5, 0).
    expected = (0 + 0 + 0.25 + 0.5) / 4
    close(losses.equivariance_value(driving, transformed, SHEAR), expected)


def test_jacobians_are_compared_in_the_driving_keypoints_frame() -> None:
    """(J^D)^-1 · ∇T · J' = [[1/2, 0], [0, 1/4]] · [[1, 1/2], [0, 1]] · I."""
    value = torch.zeros(1, 1, 2)
    driving = Keypoints(value, torch.diag(torch.tensor([2.0, 4.0]))[None, None])
    transformed = Keypoints(value, torch.eye(2)[None, None])
    expected = (0.5 + 0.25 + 0 + 0.75) / 4
    close(losses.equivariance_jacobian(driving, transformed, SHEAR), expected)


def test_equivariant_keypoints_have_zero_loss() -> None:
    """The detector finds z' in the warped frame if it finds T(z') in the original."""
    transform = random_spline(5 * torch.randn(2, 31, dtype=torch.float64))
    value = torch.rand(2, 4, 2, dtype=torch.float64) * 2 - 1
    local = torch.randn(2, 4, 2, 2, dtype=torch.float64) + 3 * torch.eye(2)
    transformed = Keypoints(value, local)
    driving = Keypoints(transform_points(transform, value), jacobian(transform, value) @ local)
    zero = torch.zeros((), dtype=torch.float64)
    of_value = losses.equivariance_value(driving, transformed, transform)
    of_jacobian = losses.equivariance_jacobian(driving, transformed, transform)
    torch.testing.assert_close(of_value, zero)
    torch.testing.assert_close(of_jacobian, zero)


def test_singular_jacobian_gives_finite_gradients() -> None:
    singular = torch.zeros(1, 1, 2, 2, requires_grad=True)
    value = torch.zeros(1, 1, 2)
    loss = losses.equivariance_jacobian(
        Keypoints(value, singular), Keypoints(value, torch.eye(2)[None, None]), SHEAR
    )
    loss.backward()
    assert loss.isfinite()
    assert singular.grad is not None
    assert singular.grad.isfinite().all()
