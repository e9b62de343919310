"""The reference's way of computing our networks: the baseline of the other benchmarks.

The networks and the losses are ours, computed as First Order Motion does: float32, contiguous
(NCHW), upsampling and pooling separate from convolutions, dense anti-alias kernels, the source
repeated K+1 times before it is sampled, two-dimensional Gaussians, a discriminator that computes
gradients in the generator step and runs one pass for each kind of image, optimiser steps tensor by
tensor, and losses read at every step. The thin-plate family is computed as the Thin-Plate Spline
Motion Model does: besides the above, torch's own instance and batch norms, splines by the inverses
of their matrices in float32, and each map of the encoder sampled twice, once for the prediction
and once for the warp loss. Neither is a copy of that code.
"""

import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Adam

from prioritycut_ray import losses, priority_cut
from prioritycut_ray.config import Config, LossConfig
from prioritycut_ray.equivariance import random_spline, transform_frame
from prioritycut_ray.models import blocks, discriminators
from prioritycut_ray.models import keypoints as gaussians
from prioritycut_ray.models.animator import Animation, FramePair, TrainingInputs
from prioritycut_ray.models.batch_norm import BatchNorm2d
from prioritycut_ray.models.blocks import AntiAliasDownsample, coordinate_grid
from prioritycut_ray.models.discriminators import Discriminator
from prioritycut_ray.models.first_order import dense_motion, generator
from prioritycut_ray.models.instance_norm import InstanceNorm2d
from prioritycut_ray.models.keypoints import HEATMAP_VARIANCE
from prioritycut_ray.models.perceptual import PerceptualPyramid
from prioritycut_ray.models.thin_plate import dense_motion as thin_plate
from prioritycut_ray.models.thin_plate import inpainting, resnet
from prioritycut_ray.models.thin_plate.spline import Splines
from prioritycut_ray.networks import build_perceptual
from prioritycut_ray.training.state import TrainState, new_state
from prioritycut_ray.training.steps import MicroBatch, draw_mask


def reference_state(config: Config, device: torch.device) -> TrainState:
    """A new state in the reference's memory layout, with its optimisers."""
    state = new_state(config, device)
    optim = config.optim
    for network in (state.ema, *state.networks()):
        network.to(memory_format=torch.contiguous_format)
    for name in ("animator", "discriminator"):
        if network := getattr(state, name):
            adam = Adam(
                network.parameters(),
                lr=optim.lr,
                betas=optim.betas,
                weight_decay=optim.weight_decay,
                foreach=False,
            )
            setattr(state, f"{name}_optimizer", adam)
    return state


def reference_perceptual(config: Config, device: torch.device) -> PerceptualPyramid:
    """The perceptual network in the reference's memory layout."""
    return build_perceptual(config, device).to(memory_format=torch.contiguous_format)


@contextmanager
def reference_layers() -> Iterator[None]:
    """Compute layers in the reference's way within this context."""
    replaced = [
        (blocks, "conv_of_enlarged", _enlarge_then_convolve),
        (discriminators, "conv_of_enlarged", _enlarge_then_convolve),
        (discriminators, "pooled_conv", _convolve_then_pool),
        (discriminators, "keypoint_heatmaps", _heatmaps),
        (discriminators, "channels_last", _as_it_is),
        (gaussians, "keypoint_heatmaps", _heatmaps),
        (dense_motion, "warp_by_each", _warp_by_each),
        (dense_motion, "channels_last", _as_it_is),
        (generator, "channels_last", _as_it_is),
        (thin_plate, "channels_last", _as_it_is),
        (thin_plate, "fit_splines", _fit_splines),
        (thin_plate, "evaluate_splines", _evaluate_splines),
        (thin_plate, "warp_by_each", _warp_by_each),
        (inpainting, "channels_last", _as_it_is),
        (inpainting, "warp", _deform),
        (resnet, "channels_last", _as_it_is),
        (AntiAliasDownsample, "forward", _blur_then_slice),
        (BatchNorm2d, "forward", nn.BatchNorm2d.forward),
        (InstanceNorm2d, "forward", nn.InstanceNorm2d.forward),
    ]
    with ExitStack() as stack:
        for owner, name, function in replaced:
            stack.enter_context(patch.object(owner, name, function))
        yield


def reference_step(
    state: TrainState, perceptual: PerceptualPyramid, batch: MicroBatch, config: Config
) -> dict[str, float]:
    """Update generator and discriminator; return the losses under the names of our step."""
    with reference_layers():
        animation, terms = _generator_step(state, perceptual, batch, config)
        if state.discriminator is None:
            return terms
        return terms | _discriminator_step(state, state.discriminator, animation, batch, config)


def _generator_step(
    state: TrainState, perceptual: PerceptualPyramid, batch: MicroBatch, config: Config
) -> tuple[Animation, dict[str, float]]:
    pair, weights = batch.pair, config.loss
    transform = random_spline(batch.randomness.spline, euclidean=state.animator.euclidean_warps)
    inputs = TrainingInputs(
        transform_frame(transform, pair.driving), batch.randomness.motion, state.samples
    )
    animation, transformed, own = state.animator(pair, inputs)
    driving = animation.driving_keypoints
    terms = {
        "perceptual": weights.perceptual.weight
        * losses.feature_distance(perceptual(animation.prediction), perceptual(pair.driving)),
        "equivariance_value": weights.equivariance_value
        * losses.equivariance_value(driving, transformed, transform),
        **{name: getattr(weights, name) * loss for name, loss in own.items()},
    }
    if state.discriminator is not None:
        terms |= _critique(state.discriminator, pair, animation, weights)
    if driving.jacobian is not None:
        terms["equivariance_jacobian"] = (
            weights.equivariance_jacobian
            * losses.equivariance_jacobian(driving, transformed, transform)
        )
    sum(terms.values()).backward()
    for part in state.animator.clipped_parts():
        _clip(part, config)
    state.animator_optimizer.step()
    state.animator_optimizer.zero_grad()
    return animation.detach(), {f"generator/{name}": term.item() for name, term in terms.items()}


def _critique(
    discriminator: Discriminator, pair: FramePair, animation: Animation, weights: LossConfig
) -> dict[str, Tensor]:
    """The losses of the generator that need a discriminator, which gets gradients for nothing."""
    keypoints = animation.driving_keypoints.value.detach()
    discriminator.eval()  # As in our step, so that the losses agree; it costs nothing.
    real = discriminator(pair.driving, keypoints)
    fake = discriminator(animation.prediction, keypoints)
    discriminator.train()
    return {
        "adversarial": weights.adversarial * losses.generator_adversarial(fake),
        "feature_matching": weights.feature_matching
        * losses.feature_distance(fake.features, real.features),
    }


def _discriminator_step(
    state: TrainState,
    discriminator: Discriminator,
    animation: Animation,
    batch: MicroBatch,
    config: Config,
) -> dict[str, float]:
    state.discriminator_optimizer.zero_grad()
    real_frame = batch.pair.driving
    keypoints = animation.driving_keypoints.value
    real = discriminator(real_frame, keypoints)
    fake = discriminator(animation.prediction, keypoints)
    mixing = config.priority_cut
    if mixing is None:
        terms = {"adversarial": losses.discriminator_adversarial(real, fake)}
    else:
        mask = draw_mask(animation, batch.randomness.mask, mixing)
        image = priority_cut.mix(real_frame, animation.prediction, mask)
        mixed = discriminator(image, keypoints)
        terms = {
            "mixed": losses.mixed_adversarial(mixed, mask),
            "consistency": mixing.consistency * losses.consistency(mixed, real, fake, mask),
        }
    sum(terms.values()).backward()
    _clip(discriminator, config)
    state.discriminator_optimizer.step()
    state.discriminator_optimizer.zero_grad()
    return {f"discriminator/{name}": term.item() for name, term in terms.items()}


def _clip(part: nn.Module, config: Config) -> None:
    if config.optim.max_grad_norm is not None:
        order = math.inf if config.optim.grad_norm == "maximum" else 2.0
        nn.utils.clip_grad_norm_(part.parameters(), config.optim.max_grad_norm, order)


def _enlarge_then_convolve(x: Tensor, conv: nn.Conv2d) -> Tensor:
    return conv(F.interpolate(x, scale_factor=2))


def _convolve_then_pool(x: Tensor, conv: nn.Conv2d) -> Tensor:
    return F.avg_pool2d(conv(x), 2)


def _as_it_is(x: Tensor) -> Tensor:
    return x


def _heatmaps(
    value: Tensor, height: int, width: int, *, dtype: torch.dtype | None = None
) -> Tensor:
    grid = coordinate_grid(height, width, dtype=value.dtype, device=value.device)
    squared = (grid - value[:, :, None, None]).square().sum(-1)
    return torch.exp(-squared / (2 * HEATMAP_VARIANCE)).to(dtype)


def _warp_by_each(image: Tensor, motions: Tensor, *, align_corners: bool) -> Tensor:
    count = motions.shape[1]
    repeated = image[:, None].repeat(1, count, 1, 1, 1).flatten(0, 1)
    warped = F.grid_sample(repeated, motions.flatten(0, 1), align_corners=align_corners)
    return warped.unflatten(0, (-1, count))


def _blur_then_slice(self: AntiAliasDownsample, x: Tensor) -> Tensor:
    if self.stride == 1:
        return x
    size, channels = len(self.kernel), x.shape[1]
    dense = torch.outer(self.kernel, self.kernel).expand(channels, 1, size, size)
    blurred = F.conv2d(F.pad(x, [size // 2] * 4), dense, groups=channels)
    return blurred[:, :, :: self.stride, :: self.stride]


def _fit_splines(source: Tensor, target: Tensor) -> Splines:
    batch, count, points, _ = source.shape
    distance = torch.norm(source[:, :, :, None] - source[:, :, None], dim=-1)
    squared = distance**2
    plane = torch.cat([source, source.new_ones(batch, count, points, 1)], dim=-1)
    below = torch.cat([plane.mT, source.new_zeros(batch, count, 3, 3)], dim=-1)
    above = torch.cat([squared * torch.log(squared + 1e-9), plane], dim=-1)
    matrix = torch.cat([above, below], dim=-2)
    matrix = matrix + 0.01 * torch.eye(points + 3, device=matrix.device).expand_as(matrix)
    values = torch.cat([target, target.new_zeros(batch, count, 3, 2)], dim=-2)
    solution = torch.inverse(matrix) @ values
    return Splines(source, solution[:, :, :points], solution[:, :, points:].mT)


def _evaluate_splines(splines: Splines, points: Tensor) -> Tensor:
    control, weights, affine = splines
    flat = affine[..., :2] @ points.mT + affine[..., 2:]
    squared = ((points - control[:, :, :, None]) ** 2).sum(-1)
    radial = squared * torch.log(squared + 1e-9)
    return flat.mT + radial.mT @ weights


def _deform(image: Tensor, deformation: Tensor) -> Tensor:
    size = image.shape[2:]
    if deformation.shape[1:3] != size:
        planes = deformation.permute(0, 3, 1, 2)
        planes = F.interpolate(planes, size=size, mode="bilinear", align_corners=True)
        deformation = planes.permute(0, 2, 3, 1)
    return F.grid_sample(image, deformation, align_corners=True)
