"""Splines and the background's map to one deformation, and occlusion at four resolutions."""

from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from prioritycut_ray.models.blocks import (
    AntiAliasDownsample,
    Hourglass,
    UpBlock,
    channels_last,
    coordinate_grid,
    in_conv_format,
    in_float32,
)
from prioritycut_ray.models.instance_norm import InstanceNorm2d
from prioritycut_ray.models.keypoints import Keypoints, heatmap_difference
from prioritycut_ray.models.sampling import (
    grid_sample,
    prefers_rows,
    sample_rows,
    warp_by_each,
)
from prioritycut_ray.models.thin_plate.spline import POINTS, evaluate_splines, fit_splines

OCCLUSION_MAPS = 4
"""Their sides halve from one to the next; the largest has the size of the frame."""


class Dropout(NamedTuple):
    """Motions that a training step leaves out.

    Attributes:
        uniform: u, a number in [0, 1) for each motion; the background's is ignored.
        rate: P; motion k is kept where u_k < 1 − P.
    """

    uniform: Float[Tensor, "B K1"]
    rate: float


class DenseMotion(NamedTuple):
    """Where each driving pixel comes from, and which of them the source shows.

    Attributes:
        deformation: F, the source position (x, y) of each pixel, at the resolution of the network.
        mask: weight of each motion; ``mask[:, 0]`` is the background mask M_bg.
        occlusion_maps: 1 = visible in the source, 0 = occluded; from small to the frame's size.
    """

    deformation: Float[Tensor, "B h w 2"]
    mask: Float[Tensor, "B K1 h w"]
    occlusion_maps: tuple[Tensor, ...]

    @property
    def occlusion_map(self) -> Float[Tensor, "B 1 h w"]:
        """The occlusion map of the deformation's own resolution."""
        size = self.mask.shape[2:]
        return next(each for each in self.occlusion_maps if each.shape[2:] == size)


class DenseMotionNetwork(nn.Module):
    """Combines K splines and the background (method §7, "Dense motion")."""

    def __init__(
        self,
        *,
        num_splines: int,
        block_expansion: int,
        max_features: int,
        num_blocks: int,
        scale_factor: float,
    ) -> None:
        super().__init__()
        self.down = AntiAliasDownsample(scale_factor)
        self.hourglass = Hourglass(
            3 * (num_splines + 1) + POINTS * num_splines + 1,
            block_expansion=block_expansion,
            num_blocks=num_blocks,
            max_features=max_features,
            norm=InstanceNorm2d,
        )
        features = self.hourglass.out_channels
        self.maps = nn.Conv2d(features, num_splines + 1, kernel_size=7, padding=3)
        num_ups = self.down.stride.bit_length() - 1
        ups = [features // 2**i for i in range(num_ups + 1)]
        self.up = nn.ModuleList(UpBlock(i, o, norm=InstanceNorm2d) for i, o in pairwise(ups))
        self.num_coarse = OCCLUSION_MAPS - num_ups
        channels = [*self.hourglass.level_channels[-self.num_coarse :], *ups[1:]]
        self.occlusion = nn.ModuleList(
            nn.Conv2d(each, 1, kernel_size=7, padding=3) for each in channels
        )

    def forward(
        self,
        source: Float[Tensor, "B 3 H W"],
        keypoints: Keypoints,
        driving: Keypoints,
        background: Float[Tensor, "B 3 3"] | None = None,
        dropout: Dropout | None = None,
    ) -> DenseMotion:
        """Predict the motion from driving to source.

        Args:
            source: source frame in [0, 1].
            keypoints: keypoints of the source frame.
            driving: keypoints of the driving frame.
            background: A, the motion of the background; the identity by default.
            dropout: motions to leave out, in training.
        """
        source = self.down(source)
        with in_float32(source):
            motions = all_motions(keypoints, driving, background, *source.shape[2:])
            heatmaps = heatmap_difference(keypoints, driving, *source.shape[2:])
            warped = warp_by_each(source, motions, align_corners=True).flatten(1, 2)
        stacked = torch.cat([in_conv_format(heatmaps), in_conv_format(warped)], dim=1)
        levels = self.hourglass.levels(channels_last(stacked))
        mask = softmax_of_kept(channels_last(self.maps(levels[-1])).float(), dropout)
        return DenseMotion(
            deformation=(mask[..., None] * motions).sum(dim=1),
            mask=mask,
            occlusion_maps=self._occlusion_maps(levels),
        )

    def _occlusion_maps(self, levels: list[Tensor]) -> tuple[Tensor, ...]:
        features = levels[-self.num_coarse :]
        for block in self.up:
            features.append(block(features[-1]))
        return tuple(
            torch.sigmoid(conv(each).float())
            for conv, each in zip(self.occlusion, features, strict=True)
        )


def all_motions(
    source: Keypoints,
    driving: Keypoints,
    background: Float[Tensor, "B 3 3"] | None,
    height: int,
    width: int,
) -> Float[Tensor, "B K1 h w 2"]:
    """Return T_0, the background's motion, and the splines T_1..T_K at each pixel."""
    value = source.value
    groups = (points.value.unflatten(1, (-1, POINTS)) for points in (driving, source))
    grid = coordinate_grid(height, width, dtype=value.dtype, device=value.device).flatten(0, 1)
    bent = evaluate_splines(fit_splines(*groups), grid)
    still = grid.expand(value.shape[0], -1, -1)
    if background is not None:
        still = still @ background[:, :2, :2].mT + background[:, None, :2, 2]
    motions: Tensor = torch.cat([still[:, None], bent], dim=1).unflatten(2, (height, width))
    return motions


def softmax_of_kept(
    logits: Float[Tensor, "B K1 h w"], dropout: Dropout | None
) -> Float[Tensor, "B K1 h w"]:
    """Return the softmax over motions; with dropout, over the kept ones, with 1e-6 more below.

    The paper also divides the kept ones by 1 − P, which has no effect in its public code.
    """
    if dropout is None:
        return torch.softmax(logits, dim=1)
    kept: Tensor = dropout.uniform < 1 - dropout.rate
    kept[:, 0].fill_(True)
    powers = torch.exp(logits - logits.amax(dim=1, keepdim=True)) * kept[..., None, None]
    mask: Tensor = powers / (powers.sum(dim=1, keepdim=True) + 1e-6)
    return mask


def warp(
    image: Float[Tensor, "B C H W"], deformation: Float[Tensor, "B h w 2"]
) -> Float[Tensor, "B C H W"]:
    """Sample an image where the deformation points, resized bilinearly to the image.

    Args:
        image: image or features to sample; its dtype may differ from that of ``deformation``.
        deformation: (x, y); the centres of the corner pixels lie at ±1.
    """
    size = image.shape[2:]
    if deformation.shape[1:3] != size:
        deformation = F.interpolate(
            deformation.permute(0, 3, 1, 2), size=size, mode="bilinear", align_corners=True
        ).permute(0, 2, 3, 1)
    exact = image.to(deformation.dtype)
    if prefers_rows(exact):
        return sample_rows(exact, deformation).to(image.dtype)
    return grid_sample(exact, deformation, align_corners=True).to(image.dtype)
