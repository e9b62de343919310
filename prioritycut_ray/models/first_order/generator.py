"""The occlusion-aware generator: warp, mask, inpaint (method §1, "Generator")."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from prioritycut_ray.models.blocks import (
    DownBlock,
    ResBlock,
    SameBlock,
    UpBlock,
    channels_last,
    warp,
)
from prioritycut_ray.models.first_order.dense_motion import DenseMotion


class Generator(nn.Module):
    """Renders the driving frame from warped source features.

    Args:
        block_expansion: channels after the first block.
        max_features: maximum number of channels.
        num_down_blocks: number of times the resolution is halved before warping.
        num_bottleneck_blocks: number of residual blocks, which inpaint.
    """

    def __init__(
        self,
        *,
        block_expansion: int,
        max_features: int,
        num_down_blocks: int,
        num_bottleneck_blocks: int,
    ) -> None:
        super().__init__()
        channels = [min(max_features, block_expansion * 2**i) for i in range(num_down_blocks + 1)]
        self.first = SameBlock(3, channels[0], kernel_size=7)
        self.down_blocks = nn.ModuleList(
            DownBlock(channels[i], channels[i + 1]) for i in range(num_down_blocks)
        )
        self.bottleneck = nn.ModuleDict(
            {f"r{i}": ResBlock(channels[-1]) for i in range(num_bottleneck_blocks)}
        )
        self.up_blocks = nn.ModuleList(
            UpBlock(channels[i + 1], channels[i]) for i in reversed(range(num_down_blocks))
        )
        self.final = nn.Conv2d(channels[0], 3, kernel_size=7, padding=3)

    def encode(self, source: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B C h w"]:
        """Return features of the source frame, which do not depend on the motion."""
        features: Tensor = self.first(source)
        for block in self.down_blocks:
            features = block(features)
        return features

    def decode(
        self, features: Float[Tensor, "B C h w"], motion: DenseMotion
    ) -> Float[Tensor, "B 3 H W"]:
        """Warp source features by the motion, mask what is occluded, and inpaint it."""
        warped = warp(channels_last(features), motion.deformation)
        occlusion = motion.occlusion_map
        if occlusion.shape[2:] != warped.shape[2:]:
            occlusion = F.interpolate(occlusion, size=warped.shape[2:], mode="bilinear")
        features = channels_last(warped * occlusion.to(features.dtype))
        for block in self.bottleneck.values():
            features = block(features)
        for block in self.up_blocks:
            features = block(features)
        return torch.sigmoid(self.final(features).float())

    def forward(
        self, source: Float[Tensor, "B 3 H W"], motion: DenseMotion
    ) -> Float[Tensor, "B 3 H W"]:
        """Predict the driving frame, in (0, 1), from a source frame in [0, 1]."""
        return self.decode(self.encode(source), motion)
