"""The keypoint detector: an hourglass, and expectations over its heatmaps (method §1)."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from prioritycut_ray.models.blocks import AntiAliasDownsample, Hourglass, channels_last
from prioritycut_ray.models.keypoints import Keypoints


class KeypointDetector(nn.Module):
    """Finds K keypoints and their jacobians in a frame (method §1, "Keypoint detector").

    Args:
        num_keypoints: K.
        block_expansion: hourglass width e.
        max_features: maximum number of channels of the hourglass.
        num_blocks: hourglass depth.
        scale_factor: factor by which the frame is down-sampled first, 1 / an integer.
        temperature: temperature of the softmax over space.
        single_jacobian_map: use one jacobian map for all keypoints instead of one each.
    """

    def __init__(
        self,
        *,
        num_keypoints: int,
        block_expansion: int,
        max_features: int,
        num_blocks: int,
        scale_factor: float,
        temperature: float,
        single_jacobian_map: bool,
    ) -> None:
        super().__init__()
        self.temperature = temperature
        self.down = AntiAliasDownsample(scale_factor)
        self.predictor = Hourglass(
            3, block_expansion=block_expansion, num_blocks=num_blocks, max_features=max_features
        )
        features = self.predictor.out_channels
        self.kp = nn.Conv2d(features, num_keypoints, kernel_size=7)
        jacobian_maps = 1 if single_jacobian_map else num_keypoints
        self.jacobian = nn.Conv2d(features, 4 * jacobian_maps, kernel_size=7)
        nn.init.zeros_(self.jacobian.weight)
        identity = torch.tensor([1.0, 0.0, 0.0, 1.0]).repeat(jacobian_maps)
        self.jacobian.bias = nn.Parameter(identity)

    def forward(self, frame: Float[Tensor, "B 3 H W"]) -> Keypoints:
        """Detect keypoints in frames with values in [0, 1]."""
        features = self.predictor(self.down(frame))
        # Contiguous planes again: sums over space run along memory.
        logits = channels_last(self.kp(features)).float().contiguous()
        heatmap = torch.softmax(logits.flatten(2) / self.temperature, dim=-1).view_as(logits)
        jacobian = channels_last(self.jacobian(features))
        maps = jacobian.float().contiguous().unflatten(1, (-1, 4))
        return Keypoints(value=_expected_position(heatmap), jacobian=_expected_map(heatmap, maps))


def _expected_position(heatmap: Float[Tensor, "B K h w"]) -> Float[Tensor, "B K 2"]:
    """Return μ_k = Σ_z z·heat_k(z), from sums of heat_k over columns and over rows."""
    x, y = (
        torch.linspace(-1, 1, size, dtype=heatmap.dtype, device=heatmap.device)
        for size in (heatmap.shape[3], heatmap.shape[2])
    )
    columns, rows = heatmap.sum(dim=2), heatmap.sum(dim=3)
    return torch.stack([(columns * x).sum(dim=-1), (rows * y).sum(dim=-1)], dim=-1)


def _expected_map(
    heatmap: Float[Tensor, "B K h w"], maps: Float[Tensor, "B M 4 h w"]
) -> Float[Tensor, "B K 2 2"]:
    """Return J_k = Σ_z heat_k(z)·map_k(z), with M = K maps, or M = 1 shared by all keypoints."""
    expected: Tensor = (heatmap[:, :, None] * maps).sum(dim=(-2, -1)).unflatten(-1, (2, 2))
    return expected
