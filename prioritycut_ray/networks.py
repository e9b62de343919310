"""Build networks from a configuration."""

from typing import TypeVar

import torch
from torch import nn

from prioritycut_ray.config import Config, FirstOrderConfig, ModelConfig, ThinPlateConfig
from prioritycut_ray.models.animator import Animator
from prioritycut_ray.models.discriminators import (
    Discriminator,
    PatchDiscriminator,
    UNetDiscriminator,
)
from prioritycut_ray.models.first_order import dense_motion as first_order
from prioritycut_ray.models.first_order.animator import FirstOrderAnimator
from prioritycut_ray.models.first_order.detector import KeypointDetector
from prioritycut_ray.models.first_order.generator import Generator
from prioritycut_ray.models.perceptual import PerceptualPyramid, perceptual_features
from prioritycut_ray.models.thin_plate import dense_motion as thin_plate
from prioritycut_ray.models.thin_plate.animator import Schedule, ThinPlateAnimator
from prioritycut_ray.models.thin_plate.inpainting import InpaintingNetwork
from prioritycut_ray.models.thin_plate.resnet import BackgroundMotion, PointDetector
from prioritycut_ray.precision import resolve_precision


def build_animator(config: ModelConfig) -> Animator:
    """Build the animator of the configuration, with fresh weights, channels last."""
    return _channels_last(
        _first_order(config) if config.family == "first_order" else _thin_plate(config)
    )


def _first_order(config: FirstOrderConfig) -> Animator:
    keypoints = config.num_keypoints
    return FirstOrderAnimator(
        KeypointDetector(num_keypoints=keypoints, **config.detector.model_dump()),
        first_order.DenseMotionNetwork(num_keypoints=keypoints, **config.dense_motion.model_dump()),
        Generator(**config.generator.model_dump()),
    )


def _thin_plate(config: ThinPlateConfig) -> Animator:
    splines, dropout = config.num_splines, config.motion_dropout
    return ThinPlateAnimator(
        PointDetector(splines, config.resnet_channels),
        thin_plate.DenseMotionNetwork(num_splines=splines, **config.dense_motion.model_dump()),
        InpaintingNetwork(**config.inpainting.model_dump()),
        BackgroundMotion(config.resnet_channels) if config.background else None,
        Schedule(
            background_start=config.background_start,
            dropout_start=dropout.start,
            dropout_peak=dropout.peak,
            dropout_ramp=dropout.ramp_samples,
            dropout_end=dropout.end_samples,
        ),
    )


def build_discriminator(config: Config) -> Discriminator | None:
    """Build the discriminator of the configuration, with fresh weights, channels last.

    Returns:
        The discriminator, or None if the configuration has none.
    """
    options = config.discriminator
    if options.kind == "none":
        return None
    num_keypoints = config.model.num_keypoints if options.use_keypoints else 0
    if options.kind == "patch":
        patch = PatchDiscriminator(
            num_keypoints=num_keypoints,
            block_expansion=options.patch_block_expansion,
            max_features=options.max_features,
            num_blocks=options.patch_num_blocks,
            spectral=options.patch_spectral_norm,
        )
        return _channels_last(patch)
    unet = UNetDiscriminator(
        size=config.data.size,
        num_keypoints=num_keypoints,
        base_channels=options.unet_base_channels,
        max_features=options.max_features,
    )
    return _channels_last(unet)


_Network = TypeVar("_Network", bound=nn.Module)


def _channels_last(network: _Network) -> _Network:
    """Convert weights to channels last, the layout of all networks (models/blocks.py)."""
    return network.to(memory_format=torch.channels_last)


def build_perceptual(config: Config, device: torch.device | None = None) -> PerceptualPyramid:
    """Build the frozen network of the perceptual loss, on a device (by default, the CPU)."""
    options, device = config.loss.perceptual, device or torch.device("cpu")
    features = perceptual_features(options.weights, seed=options.seed)
    if resolve_precision(config.train.precision, device) == "bfloat16":
        # Frozen weights need not be rounded again at every use.
        for layer in features.modules():
            if isinstance(layer, nn.Conv2d):
                layer.to(torch.bfloat16)
    pyramid = PerceptualPyramid(
        features, options.scales, recompute=config.train.activation_checkpointing
    ).to(device)
    return pyramid.to(memory_format=torch.channels_last)
