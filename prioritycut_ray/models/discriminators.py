"""The patch discriminator of the baseline and the U-Net discriminator (method §3)."""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from prioritycut_ray.models.blocks import (
    channels_last,
    conv_of_enlarged,
    enlarged,
    in_conv_format,
    pooled_conv,
)
from prioritycut_ray.models.instance_norm import contiguous_gradient
from prioritycut_ray.models.keypoints import keypoint_heatmaps
from prioritycut_ray.models.spectral import (
    normalised_weights,
    spectral_norm,
    spectral_norm_of_reference,
)


class DiscriminatorOutput(NamedTuple):
    """The output of a discriminator for a batch of images.

    Attributes:
        logits: one per patch `[B, 1, h, w]` (patch) or one per image `[B]` (U-Net).
        pixel_logits: one per pixel (U-Net), or None (patch).
        features: encoder features, fine to coarse, for feature matching.
    """

    logits: Float[Tensor, "B *patches"]
    pixel_logits: Float[Tensor, "B 1 H W"] | None
    features: tuple[Tensor, ...]

    def rows(self, rows: slice) -> "DiscriminatorOutput":
        """Return the output for some rows of the batch."""
        return DiscriminatorOutput(
            self.logits[rows],
            None if self.pixel_logits is None else self.pixel_logits[rows],
            tuple(level[rows] for level in self.features),
        )


def _condition(
    image: Float[Tensor, "B 3 H W"], keypoints: Float[Tensor, "B K 2"]
) -> Float[Tensor, "B C H W"]:
    """Concatenate images and the keypoint Gaussians of their driving frames."""
    image = in_conv_format(image)
    heatmaps = keypoint_heatmaps(keypoints, *image.shape[2:], dtype=image.dtype)
    return channels_last(torch.cat([image, heatmaps], dim=1))


class PatchBlock(nn.Module):
    """Convolution 4x4 without padding → (instance norm) → LeakyReLU 0.2 → (average pooling 2)."""

    def __init__(self, conv: nn.Module, norm: nn.Module | None, *, pool: bool) -> None:
        super().__init__()
        self.conv = conv
        if norm is not None:
            self.norm = norm
        self.has_norm = norm is not None
        self.pool = pool

    def forward(self, x: Float[Tensor, "B I H W"]) -> Float[Tensor, "B O h w"]:
        out = self.conv(x)
        if self.has_norm:
            # torch's instance norm returns contiguous planes.
            out = channels_last(contiguous_gradient(self.norm(channels_last(out))))
        out = F.leaky_relu(out, 0.2)
        return F.avg_pool2d(out, 2) if self.pool else out


class PatchDiscriminator(nn.Module):
    """The discriminator of First Order Motion (method §3, the baseline of the ablation).

    Args:
        num_keypoints: number of keypoint Gaussians that condition it, or 0.
        block_expansion: width e; block i has ``min(max_features, e·2^(i+1))`` channels.
        max_features: maximum number of channels.
        num_blocks: depth.
        spectral: spectral normalisation of every convolution.
    """

    def __init__(
        self,
        *,
        num_keypoints: int,
        block_expansion: int,
        max_features: int,
        num_blocks: int,
        spectral: bool,
    ) -> None:
        super().__init__()
        normalise: Callable[[nn.Module], nn.Module] = (
            spectral_norm_of_reference if spectral else nn.Identity()
        )
        channels = [min(max_features, block_expansion * 2 ** (i + 1)) for i in range(num_blocks)]
        inputs = [3 + num_keypoints, *channels]
        self.use_keypoints = num_keypoints > 0
        self.down_blocks = nn.ModuleList(
            PatchBlock(
                normalise(nn.Conv2d(inputs[i], out, kernel_size=4)),
                nn.InstanceNorm2d(out, affine=True) if i else None,
                pool=i < num_blocks - 1,
            )
            for i, out in enumerate(channels)
        )
        self.conv = normalise(nn.Conv2d(channels[-1], 1, kernel_size=1))

    def encode(
        self, image: Float[Tensor, "B 3 H W"], keypoints: Float[Tensor, "B K 2"]
    ) -> tuple[Tensor, ...]:
        """Return the features that feature matching compares, fine to coarse."""
        out = _condition(image, keypoints) if self.use_keypoints else image
        features = []
        for block in self.down_blocks:
            out = block(out)
            features.append(out)
        return tuple(features)

    def forward(
        self, image: Float[Tensor, "B 3 H W"], keypoints: Float[Tensor, "B K 2"]
    ) -> DiscriminatorOutput:
        """Classify images in [0, 1], given the keypoint positions of the driving frame."""
        features = self.encode(image, keypoints)
        return DiscriminatorOutput(self.conv(features[-1]).float(), None, features)


def _spectral_conv(in_features: int, out_features: int, kernel_size: int) -> nn.Conv2d:
    """Return a spectrally normalised convolution at constant resolution."""
    return spectral_norm(
        nn.Conv2d(in_features, out_features, kernel_size, padding=kernel_size // 2)
    )


class ResidualDownBlock(nn.Module):
    """(ReLU → 3x3 convolution) twice → average pooling 2, plus a 1x1 pooled shortcut."""

    def __init__(self, in_features: int, out_features: int, *, preactivation: bool) -> None:
        super().__init__()
        self.preactivation = preactivation
        self.conv1 = _spectral_conv(in_features, out_features, 3)
        self.conv2 = _spectral_conv(out_features, out_features, 3)
        self.shortcut = _spectral_conv(in_features, out_features, 1)

    def forward(self, x: Float[Tensor, "B I H W"]) -> Float[Tensor, "B O h w"]:
        out = F.relu(x) if self.preactivation else x
        out = F.relu(self.conv1(out))
        # Pooling and a 1x1 convolution commute; pooling first is four times cheaper.
        shortcut: Tensor = self.shortcut(F.avg_pool2d(x, 2))
        return pooled_conv(out, self.conv2) + shortcut


class ResidualUpBlock(nn.Module):
    """ReLU → nearest x2 → 3x3 convolution → ReLU → 3x3 convolution, plus a 1x1 shortcut."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.conv1 = _spectral_conv(in_features, out_features, 3)
        self.conv2 = _spectral_conv(out_features, out_features, 3)
        self.shortcut = _spectral_conv(in_features, out_features, 1)

    def forward(self, x: Float[Tensor, "B I h w"]) -> Float[Tensor, "B O H W"]:
        out: Tensor = conv_of_enlarged(F.relu(x), self.conv1)
        out = self.conv2(F.relu(out)) + enlarged(self.shortcut(x))
        return out


def unet_channels(size: int, base: int, max_features: int) -> list[int]:
    """Return encoder channels from ``size``/2 down to 4x4 (method §3).

    They are base·[1, 2, 4, 8, 8, 16] at size 256.
    """
    depth = size.bit_length() - 3
    if size != 2 ** (depth + 2) or depth < 2:
        raise ValueError(f"the U-Net discriminator needs a power of two >= 16, not size {size}")
    multipliers = [min(2**i, 8) for i in range(depth - 1)] + [min(2 ** (depth - 1), 16)]
    return [min(base * m, max_features) for m in multipliers]


class UNetDiscriminator(nn.Module):
    """A discriminator that also classifies every pixel (method §3, U-Net GAN).

    Args:
        size: side of the square images, a power of two.
        num_keypoints: number of keypoint Gaussians that condition it, or 0.
        base_channels: c; the encoder has c·[1, 2, 4, 8, 8, 16] channels at 256.
        max_features: maximum number of channels.
    """

    def __init__(
        self, *, size: int, num_keypoints: int, base_channels: int, max_features: int
    ) -> None:
        super().__init__()
        channels = unet_channels(size, base_channels, max_features)
        inputs = [3 + num_keypoints, *channels]
        self.use_keypoints = num_keypoints > 0
        self.down_blocks = nn.ModuleList(
            ResidualDownBlock(inputs[i], out, preactivation=i > 0) for i, out in enumerate(channels)
        )
        self.head = spectral_norm(nn.Linear(channels[-1], 1))
        ups = list(reversed(channels))
        # All but the innermost up block take a concatenated skip.
        up_inputs = [ups[0], *(2 * c for c in ups[1:])]
        up_outputs = [*ups[1:], base_channels]
        self.up_blocks = nn.ModuleList(
            ResidualUpBlock(i, o) for i, o in zip(up_inputs, up_outputs, strict=True)
        )
        self.pixel_head = _spectral_conv(base_channels, 1, 1)

    def encode(
        self, image: Float[Tensor, "B 3 H W"], keypoints: Float[Tensor, "B K 2"]
    ) -> tuple[Tensor, ...]:
        """Return the features that feature matching compares, fine to coarse."""
        out = _condition(image, keypoints) if self.use_keypoints else image
        features = []
        for block in self.down_blocks:
            out = block(out)
            features.append(out)
        return tuple(features)

    def forward(
        self, image: Float[Tensor, "B 3 H W"], keypoints: Float[Tensor, "B K 2"]
    ) -> DiscriminatorOutput:
        """Classify images in [0, 1], given the keypoint positions of the driving frame."""
        with normalised_weights(self):
            features = self.encode(image, keypoints)
            *skips, out = features
            logits = self.head(F.relu(out).sum(dim=(2, 3))).squeeze(1).float()
            out = self.up_blocks[0](out)
            for block, skip in zip(self.up_blocks[1:], reversed(skips), strict=True):
                out = block(torch.cat([out, skip], dim=1))
            return DiscriminatorOutput(logits, self.pixel_head(F.relu(out)).float(), features)


Discriminator = PatchDiscriminator | UNetDiscriminator
