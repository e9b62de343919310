"""The reference's way of computing our networks: the baseline of the other benchmarks.

The networks and the losses are ours, computed as First Order Motion does: float32, contiguous
(NCHW), upsampling and pooling separate from convolutions, dense anti-alias kernels, the source
repeated K+1 times before it is sampled, two-dimensional Gaussians, a discriminator that computes
gradients in the generator step and runs one pass for each kind of image, optimiser steps tensor by
tensor, and losses read at every step. It is not a copy of that code.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Adam

from prioritycut_ray import losses, priority_cut
from prioritycut_ray.config import Config
from prioritycut_ray.equivariance import random_spline, transform_frame
from prioritycut_ray.models import blocks, discriminators
from prioritycut_ray.models.animator import Animation, TrainingInputs
from prioritycut_ray.models.batch_norm import BatchNorm2d
from prioritycut_ray.models.blocks import AntiAliasDownsample, coordinate_grid
from prioritycut_ray.models.first_order import dense_motion, generator
from prioritycut_ray.models.keypoints import HEATMAP_VARIANCE
from prioritycut_ray.models.perceptual import PerceptualPyramid
from prioritycut_ray.networks import build_perceptual
from prioritycut_ray.training.state import TrainState, new_state
from prioritycut_ray.training.steps import MicroBatch, draw_mask


def reference_state(config: Config, device: torch.device) -> TrainState:
    """A new state in the reference's memory layout, with its optimisers."""
    state = new_state(config, device)
    for network in (state.animator, state.ema, state.discriminator):
        network.to(memory_format=torch.contiguous_format)
    networks = {"animator": state.animator, "discriminator": state.discriminator}
    for name, network in networks.items():
        adam = Adam(
            network.parameters(), lr=config.optim.lr, betas=config.optim.betas, foreach=False
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
        (dense_motion, "keypoint_heatmaps", _heatmaps),
        (dense_motion, "warp_by_each", _warp_by_each),
        (dense_motion, "channels_last", _as_it_is),
        (generator, "channels_last", _as_it_is),
        (AntiAliasDownsample, "forward", _blur_then_slice),
        (BatchNorm2d, "forward", nn.BatchNorm2d.forward),
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
        animation, of_generator = _generator_step(state, perceptual, batch, config)
        return of_generator | _discriminator_step(state, animation, batch, config)


def _generator_step(
    state: TrainState, perceptual: PerceptualPyramid, batch: MicroBatch, config: Config
) -> tuple[Animation, dict[str, float]]:
    pair, weights = batch.pair, config.loss
    transform = random_spline(batch.randomness.spline)
    inputs = TrainingInputs(
        transform_frame(transform, pair.driving), batch.randomness.motion, state.samples
    )
    animation, transformed, _ = state.animator(pair, inputs)
    keypoints = animation.driving_keypoints.value.detach()
    state.discriminator.eval()  # As in our step, so that the losses agree; it costs nothing.
    real = state.discriminator(pair.driving, keypoints)
    fake = state.discriminator(animation.prediction, keypoints)
    state.discriminator.train()
    driving = animation.driving_keypoints
    terms = {
        "perceptual": weights.perceptual.weight
        * losses.feature_distance(perceptual(animation.prediction), perceptual(pair.driving)),
        "adversarial": weights.adversarial * losses.generator_adversarial(fake),
        "feature_matching": weights.feature_matching
        * losses.feature_distance(fake.features, real.features),
        "equivariance_value": weights.equivariance_value
        * losses.equivariance_value(driving, transformed, transform),
        "equivariance_jacobian": weights.equivariance_jacobian
        * losses.equivariance_jacobian(driving, transformed, transform),
    }
    sum(terms.values()).backward()
    state.animator_optimizer.step()
    state.animator_optimizer.zero_grad()
    state.discriminator_optimizer.zero_grad()
    return animation.detach(), {f"generator/{name}": term.item() for name, term in terms.items()}


def _discriminator_step(
    state: TrainState, animation: Animation, batch: MicroBatch, config: Config
) -> dict[str, float]:
    real_frame = batch.pair.driving
    keypoints = animation.driving_keypoints.value
    real = state.discriminator(real_frame, keypoints)
    fake = state.discriminator(animation.prediction, keypoints)
    mixing = config.priority_cut
    if mixing is None:
        terms = {"adversarial": losses.discriminator_adversarial(real, fake)}
    else:
        mask = draw_mask(animation, batch.randomness.mask, mixing)
        image = priority_cut.mix(real_frame, animation.prediction, mask)
        mixed = state.discriminator(image, keypoints)
        terms = {
            "mixed": losses.mixed_adversarial(mixed, mask),
            "consistency": mixing.consistency * losses.consistency(mixed, real, fake, mask),
        }
    sum(terms.values()).backward()
    state.discriminator_optimizer.step()
    state.discriminator_optimizer.zero_grad()
    return {f"discriminator/{name}": term.item() for name, term in terms.items()}


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


def _warp_by_each(image: Tensor, motions: Tensor) -> Tensor:
    count = motions.shape[1]
    repeated = image[:, None].repeat(1, count, 1, 1, 1).flatten(0, 1)
    warped = F.grid_sample(repeated, motions.flatten(0, 1), align_corners=False)
    return warped.unflatten(0, (-1, count))


def _blur_then_slice(self: AntiAliasDownsample, x: Tensor) -> Tensor:
    if self.stride == 1:
        return x
    size, channels = len(self.kernel), x.shape[1]
    dense = torch.outer(self.kernel, self.kernel).expand(channels, 1, size, size)
    blurred = F.conv2d(F.pad(x, [size // 2] * 4), dense, groups=channels)
    return blurred[:, :, :: self.stride, :: self.stride]
