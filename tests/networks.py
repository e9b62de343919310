"""Networks that have not been trained, made to do something that can be seen."""

import torch
from torch import nn

from prioritycut_ray.models.animator import Animator
from prioritycut_ray.models.thin_plate.animator import ThinPlateAnimator


def spread_keypoints(animator: Animator) -> None:
    """Make keypoints follow the frame: those of a fresh ResNet hardly differ between frames."""
    if not isinstance(animator, ThinPlateAnimator):
        return
    for layer in animator.detector.modules():
        if isinstance(layer, nn.BatchNorm2d):
            nn.init.ones_(layer.weight)  # The last one of each block is zero.
    generator = torch.Generator().manual_seed(0)
    nn.init.normal_(animator.detector.fg_encoder.fc.weight, std=0.05, generator=generator)
