"""Copies what the source shows, and paints what is occluded (method §7, "Inpainting")."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from prioritycut_ray.models.blocks import (
    DownBlock,
    ResBlock,
    SameBlock,
    UpBlock,
    channels_last,
)
from prioritycut_ray.models.instance_norm import InstanceNorm2d
from prioritycut_ray.models.thin_plate.dense_motion import OCCLUSION_MAPS, DenseMotion, warp


class InpaintingNetwork(nn.Module):
    """Renders the driving frame from the warped maps of the source at four resolutions.

    Args:
        block_expansion: channels after the first block.
        max_features: maximum number of channels.
    """

    def __init__(self, *, block_expansion: int, max_features: int) -> None:
        super().__init__()
        num_blocks = OCCLUSION_MAPS - 1
        channels = [min(max_features, block_expansion * 2**i) for i in range(num_blocks + 1)]
        self.first = SameBlock(3, channels[0], kernel_size=7, norm=InstanceNorm2d)
        self.down_blocks = nn.ModuleList(
            DownBlock(channels[i], channels[i + 1], norm=InstanceNorm2d) for i in range(num_blocks)
        )
        ups = list(reversed(channels))
        # All but the deepest take a concatenated map of the encoder, hence twice the channels.
        inputs = [ups[0], *(2 * each for each in ups[1:-1])]
        self.up_blocks = nn.ModuleList(
            UpBlock(i, o, norm=InstanceNorm2d) for i, o in zip(inputs, ups[1:], strict=True)
        )
        self.resblock = nn.ModuleList(
            ResBlock(each, norm=InstanceNorm2d) for each in inputs for _ in range(2)
        )
        self.final = nn.Conv2d(channels[0], 3, kernel_size=7, padding=3)

    def encode(self, image: Float[Tensor, "B 3 H W"]) -> tuple[Tensor, ...]:
        """Return the encoder's maps of an image, from the smallest to the frame's size."""
        maps = [self.first(image)]
        for block in self.down_blocks:
            maps.append(block(maps[-1]))
        return tuple(reversed(maps))

    def decode(
        self,
        source: Float[Tensor, "B 3 H W"],
        maps: tuple[Tensor, ...],
        motion: DenseMotion,
    ) -> Float[Tensor, "B 3 H W"]:
        """Warp the source and its maps by the motion, mask what is occluded, and paint that.

        Args:
            source: source frame in [0, 1].
            maps: its maps, as :meth:`encode` returns them.
            motion: the motion from driving to source.
        """
        visible = [
            warp(channels_last(each), motion.deformation) * occlusion.to(each.dtype)
            for each, occlusion in zip(maps, motion.occlusion_maps, strict=True)
        ]
        out = channels_last(visible[0])
        for place, block in enumerate(self.up_blocks):
            if place:
                out = torch.cat([out, channels_last(visible[place])], dim=1)
            out = block(self.resblock[2 * place + 1](self.resblock[2 * place](out)))
        occlusion = motion.occlusion_maps[-1]
        out = out * (1 - occlusion).to(out.dtype) + visible[-1]
        painted = torch.sigmoid(self.final(channels_last(out)).float())
        return painted * (1 - occlusion) + warp(source, motion.deformation) * occlusion


def warp_distance(
    source_maps: tuple[Tensor, ...], driving_maps: tuple[Tensor, ...], motion: DenseMotion
) -> Float[Tensor, ""]:
    """Return Σ mean |E(D) ⊙ O − warped E(S) ⊙ O| over the maps, the warp loss without its weight.

    Only the deformation receives gradients.
    """
    terms = []
    for source, driving, occlusion in zip(
        source_maps, driving_maps, motion.occlusion_maps, strict=True
    ):
        warped = warp(channels_last(source.detach()), motion.deformation)
        terms.append(_VisibleDistance.apply(warped, driving.detach(), occlusion.detach()))
    return torch.stack(terms).sum()


class _VisibleDistance(torch.autograd.Function):
    """mean |x − y| ⊙ O in float32, with gradients for x in its format and in one pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, occlusion: Tensor) -> Tensor:
        difference = x - y
        ctx.save_for_backward(difference, occlusion)
        of_pixels = difference.abs().sum(dim=1, keepdim=True, dtype=torch.float32)
        return (of_pixels * occlusion).sum() / difference.numel()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        difference, occlusion = ctx.saved_tensors
        shares = (occlusion * (gradient / difference.numel())).to(difference.dtype)
        return difference.sign().mul_(shares), None, None
