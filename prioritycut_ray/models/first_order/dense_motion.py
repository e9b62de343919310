"""Sparse keypoint motion to a dense deformation and an occlusion map (method §1)."""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from prioritycut_ray.models.blocks import (
    AntiAliasDownsample,
    Hourglass,
    channels_last,
    coordinate_grid,
    in_conv_format,
    in_float32,
    inverse_2x2,
)
from prioritycut_ray.models.keypoints import Keypoints, heatmap_difference
from prioritycut_ray.models.sampling import warp_by_each


class DenseMotion(NamedTuple):
    """Where each driving pixel comes from, at the resolution of the motion network.

    Attributes:
        deformation: source position (x, y) of each pixel, in [-1, 1] inside the source.
        mask: softmax weight of each motion; ``mask[:, 0]`` is the background mask M_bg.
        occlusion_map: 1 = visible in the source, 0 = occluded, must be inpainted.
    """

    deformation: Float[Tensor, "B h w 2"]
    mask: Float[Tensor, "B K1 h w"]
    occlusion_map: Float[Tensor, "B 1 h w"]


class DenseMotionNetwork(nn.Module):
    """Combines the K keypoint motions and the static background (method §1, "Dense motion")."""

    def __init__(
        self,
        *,
        num_keypoints: int,
        block_expansion: int,
        max_features: int,
        num_blocks: int,
        scale_factor: float,
    ) -> None:
        super().__init__()
        self.down = AntiAliasDownsample(scale_factor)
        self.hourglass = Hourglass(
            (num_keypoints + 1) * 4,
            block_expansion=block_expansion,
            num_blocks=num_blocks,
            max_features=max_features,
        )
        features = self.hourglass.out_channels
        self.mask = nn.Conv2d(features, num_keypoints + 1, kernel_size=7, padding=3)
        self.occlusion = nn.Conv2d(features, 1, kernel_size=7, padding=3)

    def forward(
        self, source: Float[Tensor, "B 3 H W"], keypoints: Keypoints, driving: Keypoints
    ) -> DenseMotion:
        """Predict the motion from driving to source.

        Args:
            source: source frame in [0, 1].
            keypoints: keypoints of the source frame.
            driving: keypoints of the driving frame.
        """
        source = self.down(source)
        with in_float32(source):
            motions = sparse_motions(keypoints, driving, *source.shape[2:])
            heatmaps = heatmap_difference(keypoints, driving, *source.shape[2:])
            warped = warp_by_each(source, motions, align_corners=False)
        parts = [in_conv_format(heatmaps)[:, :, None], in_conv_format(warped)]
        stacked = torch.cat(parts, dim=2).flatten(1, 2)
        features = self.hourglass(channels_last(stacked))
        mask = torch.softmax(channels_last(self.mask(features)).float(), dim=1)
        return DenseMotion(
            deformation=(mask[..., None] * motions).sum(dim=1),
            mask=mask,
            occlusion_map=torch.sigmoid(self.occlusion(features).float()),
        )


def sparse_motions(
    source: Keypoints, driving: Keypoints, height: int, width: int
) -> Float[Tensor, "B K1 h w 2"]:
    """Return T_k(z) = μ_k^S + J_k^S (J_k^D)^-1 (z − μ_k^D), after the background's T_0(z) = z."""
    assert source.jacobian is not None
    assert driving.jacobian is not None
    grid = coordinate_grid(height, width, dtype=source.value.dtype, device=source.value.device)
    jacobian = source.jacobian @ inverse_2x2(driving.jacobian)
    offset = grid - driving.value[:, :, None, None]
    motions = torch.einsum("bkij,bkhwj->bkhwi", jacobian, offset)
    motions = motions + source.value[:, :, None, None]
    background = grid.expand(motions.shape[0], 1, -1, -1, -1)
    return torch.cat([background, motions], dim=1)
