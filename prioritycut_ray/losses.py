"""The losses of the method as pure functions (method §2, §3, §4).

Every function returns an unweighted scalar; the training step applies the weights of the config.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from prioritycut_ray import equivariance
from prioritycut_ray.equivariance import ThinPlateSpline
from prioritycut_ray.models.blocks import inverse_2x2
from prioritycut_ray.models.discriminators import DiscriminatorOutput
from prioritycut_ray.models.keypoints import Keypoints
from prioritycut_ray.priority_cut import mix

Scalar = Float[Tensor, ""]


class _FeatureDistance(torch.autograd.Function):
    """Σ_i mean |x_i − y_i| in float32, with gradients for x in one pass and in the layout of x.

    Autograd would go through a contiguous float32 tensor of x's size, which is 3 to 4 times slower.
    """

    @staticmethod
    def forward(ctx: Any, *levels: Tensor) -> Tensor:
        """Args: all x, then all y."""
        count = len(levels) // 2
        differences = torch._foreach_sub(levels[:count], levels[count:])
        ctx.save_for_backward(*differences)
        means = [difference.abs().mean(dtype=torch.float32) for difference in differences]
        return torch.stack(means).sum()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        differences = ctx.saved_tensors
        gradients = torch._foreach_sign(differences)
        shares = torch._foreach_div([gradient] * len(differences), [x.numel() for x in differences])
        torch._foreach_mul_(gradients, shares)
        return *gradients, *(None for _ in differences)


def feature_distance(predicted: Sequence[Tensor], target: Sequence[Tensor]) -> Scalar:
    """Return Σ_i mean |x_i − y_i| over feature levels, with detached targets (method §2).

    It is the perceptual loss (levels of a frozen network) and the feature matching loss (blocks of
    the discriminator). Features may be bfloat16; means are taken in float32.
    """
    xs, ys = zip(*zip(predicted, target, strict=True), strict=True)
    distance: Tensor = _FeatureDistance.apply(*xs, *ys)
    return distance


def equivariance_value(
    driving: Keypoints, transformed: Keypoints, transform: ThinPlateSpline
) -> Scalar:
    """Return mean |μ^D − T(μ(T-warped D))| (method §2)."""
    back = equivariance.transform_points(transform, transformed.value)
    return F.l1_loss(back, driving.value)


def equivariance_jacobian(
    driving: Keypoints, transformed: Keypoints, transform: ThinPlateSpline
) -> Scalar:
    """Return mean |I − (J^D)^-1 · ∇T · J'|, ∇T at the transformed keypoints (method §2)."""
    assert driving.jacobian is not None
    assert transformed.jacobian is not None
    product = (
        inverse_2x2(driving.jacobian)
        @ equivariance.jacobian(transform, transformed.value)
        @ transformed.jacobian
    )
    identity = torch.eye(2, dtype=product.dtype, device=product.device)
    return (identity - product).abs().mean()


def generator_adversarial(fake: DiscriminatorOutput) -> Scalar:
    """Return the generator's adversarial loss.

    LSGAN for the patch discriminator: mean (1 − D(D̂))² (method §2). For the U-Net discriminator
    ½ BCE(D_enc) + ½ BCE(D_dec) with target real, per-pixel terms averaged (method §3).
    """
    if fake.pixel_logits is None:
        return (1 - fake.logits).square().mean()
    return (bce(fake.logits, 1.0) + bce(fake.pixel_logits, 1.0)) / 2


def discriminator_adversarial(real: DiscriminatorOutput, fake: DiscriminatorOutput) -> Scalar:
    """Return the discriminator's adversarial loss for real and fake images.

    LSGAN for the patch discriminator: mean [(1 − D(real))² + D(fake)²]. For the U-Net
    discriminator ½(real: enc + dec) + ½(fake: enc + dec) (method §3).
    """
    if real.pixel_logits is None or fake.pixel_logits is None:
        return ((1 - real.logits).square() + fake.logits.square()).mean()
    of_real = bce(real.logits, 1.0) + bce(real.pixel_logits, 1.0)
    of_fake = bce(fake.logits, 0.0) + bce(fake.pixel_logits, 0.0)
    return (of_real + of_fake) / 2


def mixed_adversarial(mixed: DiscriminatorOutput, mask: Float[Tensor, "B 1 H W"]) -> Scalar:
    """Return the loss for mixed images: fake as a whole, real or fake per pixel (method §4)."""
    return bce(mixed.logits, 0.0) + F.binary_cross_entropy_with_logits(_pixels(mixed), mask)


def consistency(
    mixed: DiscriminatorOutput,
    real: DiscriminatorOutput,
    fake: DiscriminatorOutput,
    mask: Float[Tensor, "B 1 H W"],
) -> Scalar:
    """Return mean (D_dec(mix(D, D̂; M)) − mix(D_dec(D), D_dec(D̂); M))² on logits (method §4).

    Gradients flow through all three passes.
    """
    return F.mse_loss(_pixels(mixed), mix(_pixels(real), _pixels(fake), mask))


def bce(logits: Tensor, target: float) -> Scalar:
    """Return the mean binary cross-entropy of logits against a single target."""
    return F.binary_cross_entropy_with_logits(logits, torch.full_like(logits, target))


def _pixels(output: DiscriminatorOutput) -> Float[Tensor, "B 1 H W"]:
    assert output.pixel_logits is not None, "mixing needs the U-Net discriminator"
    return output.pixel_logits
