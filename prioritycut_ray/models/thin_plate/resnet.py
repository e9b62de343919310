"""Keypoints and the background's motion, each by a ResNet-18 on full frames (method §7)."""

import timm
import torch
from jaxtyping import Float
from timm.models.resnet import ResNet
from torch import Tensor, nn

from prioritycut_ray.models.batch_norm import BatchNorm2d
from prioritycut_ray.models.blocks import channels_last, in_conv_format, in_float32
from prioritycut_ray.models.keypoints import Keypoints
from prioritycut_ray.models.thin_plate.spline import POINTS


class PointDetector(nn.Module):
    """Finds K groups of five keypoints: 2·sigmoid(x) − 1 of the last layer's numbers.

    Args:
        num_splines: K.
        channels: channels of the first stage; they double from stage to stage. 64 is ResNet-18.
    """

    def __init__(self, num_splines: int, channels: int = 64) -> None:
        super().__init__()
        self.fg_encoder = _resnet(num_splines * POINTS * 2, channels)

    def forward(self, frame: Float[Tensor, "B 3 H W"]) -> Keypoints:
        """Detect keypoints in frames with values in [0, 1]."""
        numbers = _numbers(self.fg_encoder, frame)
        return Keypoints(2 * torch.sigmoid(numbers.unflatten(1, (-1, 2))) - 1)


class BackgroundMotion(nn.Module):
    """Predicts how the background moves from one frame to another: an affine map.

    Args:
        channels: as of the detector.
    """

    def __init__(self, channels: int = 64) -> None:
        super().__init__()
        self.bg_encoder = _resnet(6, channels, in_channels=6)
        last = self.bg_encoder.fc
        nn.init.zeros_(last.weight)
        last.bias = nn.Parameter(torch.tensor([1.0, 0.0, 0.0, 0.0, 1.0, 0.0]))

    def forward(
        self, source: Float[Tensor, "B 3 H W"], driving: Float[Tensor, "B 3 H W"]
    ) -> Float[Tensor, "B 3 3"]:
        """Return A, which takes homogeneous positions in the driving frame to the source frame."""
        both = torch.cat([in_conv_format(source), in_conv_format(driving)], dim=1)
        rows = _numbers(self.bg_encoder, both).unflatten(1, (2, 3))
        last = torch.eye(3, dtype=rows.dtype, device=rows.device)[2:].expand(len(rows), 1, 3)
        return torch.cat([rows, last], dim=1)


def _resnet(outputs: int, channels: int, *, in_channels: int = 3) -> ResNet:
    network = timm.create_model(
        "resnet18",
        num_classes=outputs,
        in_chans=in_channels,
        channels=tuple(channels * 2**stage for stage in range(4)),
        norm_layer=BatchNorm2d,
        zero_init_last=False,  # As in the reference.
    )
    assert isinstance(network, ResNet)
    return network


def _numbers(network: ResNet, image: Float[Tensor, "B C H W"]) -> Float[Tensor, "B N"]:
    """Return the network's outputs; its last layer computes positions, so in float32."""
    features = network.forward_features(channels_last(image))
    with in_float32(image):
        numbers: Tensor = network.forward_head(features.float())
        return numbers


def background_distance(
    forth: Float[Tensor, "B 3 3"], back: Float[Tensor, "B 3 3"]
) -> Float[Tensor, ""]:
    """Return mean |I − A(S→D)·A(D→S)|, the background loss without its weight."""
    identity = torch.eye(3, dtype=forth.dtype, device=forth.device)
    return (identity - forth @ back).abs().mean()
