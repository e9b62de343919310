"""Building blocks of the networks (method §1).

Module and attribute names follow the public implementation of First Order Motion, so that its
weights map onto ours by name.
"""

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from prioritycut_ray.models.batch_norm import BatchNorm2d
from prioritycut_ray.models.sampling import grid_sample


def channels_last(x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B C H W"]:
    """Return the tensor in channels-last layout, and keep its gradient in that layout.

    All networks compute in this layout, in which convolutions on CPUs and bfloat16 convolutions on
    GPUs are fastest. If an input and its gradient differ in layout, batch norm and pooling on CPUs
    fall back to loops that are up to 20 times slower, so code that breaks the layout must restore
    it. Compiled code chooses the layouts of gradients itself.
    """
    x = x.contiguous(memory_format=torch.channels_last)
    if x.requires_grad and not torch.compiler.is_compiling():
        x.register_hook(_channels_last_gradient)
    return x


def _channels_last_gradient(gradient: Tensor | None) -> Tensor | None:
    """The gradient is None if the loss does not depend on the tensor."""
    if gradient is None:
        return None
    return gradient.contiguous(memory_format=torch.channels_last)


def in_float32(x: Tensor) -> torch.autocast:
    """Disable autocast on the device of ``x``: for coordinates and what they are computed from."""
    return torch.autocast(x.device.type, enabled=False)


def in_conv_format(x: Tensor) -> Tensor:
    """Return the tensor in the format of convolutions: bfloat16 under autocast.

    Use it for inputs of several convolutions, and before concatenation with their results: the
    concatenation would be float32, and every convolution would round it again.
    """
    device = x.device.type
    if torch.is_autocast_enabled(device):
        return x.to(torch.get_autocast_dtype(device))
    return x


def enlarged(x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B C H2 W2"]:
    """Enlarge by 2 (nearest neighbour) without changing the format.

    Under autocast a GPU would compute this in float32, and everything after it up to the next
    convolution.
    """
    with torch.autocast(x.device.type, enabled=False):
        return F.interpolate(channels_last(x), scale_factor=2)


_FOLD_FROM = 8192
"""Smallest number of pixels in a batch for which folding a kernel pays off."""


def conv_of_enlarged(x: Float[Tensor, "B I H W"], conv: nn.Conv2d) -> Float[Tensor, "B O H2 W2"]:
    """Enlarge by 2 (nearest neighbour), then apply a padded 3x3 convolution.

    Together they equal a transposed 4x4 convolution with stride 2, which takes 16 products per
    pixel of ``x`` instead of 36.
    """
    if torch.compiler.is_exporting() or _pixels(x) < _FOLD_FROM:
        out: Tensor = conv(enlarged(in_conv_format(x)))
        return out
    folded = _box_filtered(conv.weight.flip(2, 3)).transpose(0, 1)
    return F.conv_transpose2d(x, folded, conv.bias, stride=2, padding=1)


def pooled_conv(x: Float[Tensor, "B I H W"], conv: nn.Conv2d) -> Float[Tensor, "B O h w"]:
    """Apply a padded 3x3 convolution, then average pooling by 2.

    Together they equal a 4x4 convolution with stride 2, which takes 16 products per pooled pixel
    instead of 36.
    """
    if _pixels(x) < 4 * _FOLD_FROM:
        return F.avg_pool2d(conv(x), 2)
    folded = _box_filtered(conv.weight, divisor=4)
    return F.conv2d(x, folded, conv.bias, stride=2, padding=1)


def _pixels(x: Tensor) -> int:
    return x.shape[0] * x.shape[2] * x.shape[3]


def _box_filtered(
    weight: Float[Tensor, "O I 3 3"], *, divisor: int = 1
) -> Float[Tensor, "O I 4 4"]:
    """Convolve a kernel with a 2x2 box of ones, and divide it by a number."""
    return F.avg_pool2d(weight, 2, stride=1, padding=1, divisor_override=divisor)


Norm = Callable[[int], nn.Module]
"""Builds the normalisation of a number of channels."""


class SameBlock(nn.Module):
    """Convolution → norm → ReLU at constant resolution."""

    def __init__(
        self, in_features: int, out_features: int, kernel_size: int = 3, *, norm: Norm = BatchNorm2d
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_features, out_features, kernel_size, padding=kernel_size // 2)
        self.norm = norm(out_features)

    def forward(self, x: Float[Tensor, "B I H W"]) -> Float[Tensor, "B O H W"]:
        return F.relu(self.norm(self.conv(x)))


class DownBlock(SameBlock):
    """:class:`SameBlock` → average pooling by 2."""

    def forward(self, x: Float[Tensor, "B I H W"]) -> Float[Tensor, "B O H2 W2"]:
        return F.avg_pool2d(super().forward(x), 2)


class UpBlock(SameBlock):
    """Nearest enlargement by 2 → :class:`SameBlock`."""

    def forward(self, x: Float[Tensor, "B I H W"]) -> Float[Tensor, "B O H2 W2"]:
        return F.relu(self.norm(conv_of_enlarged(x, self.conv)))


class ResBlock(nn.Module):
    """Pre-activation residual block: (norm → ReLU → convolution) twice, plus identity."""

    def __init__(self, features: int, *, norm: Norm = BatchNorm2d) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(features, features, 3, padding=1)
        self.conv2 = nn.Conv2d(features, features, 3, padding=1)
        self.norm1 = norm(features)
        self.norm2 = norm(features)

    def forward(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B C H W"]:
        out: Tensor = self.conv1(F.relu(self.norm1(x)))
        out = self.conv2(F.relu(self.norm2(out)))
        return out + x


class Encoder(nn.Module):
    """Down blocks; returns the features of every resolution."""

    def __init__(self, channels: Sequence[int], norm: Norm) -> None:
        super().__init__()
        self.down_blocks = nn.ModuleList(DownBlock(i, o, norm=norm) for i, o in pairwise(channels))

    def forward(self, x: Tensor) -> list[Tensor]:
        features = [x]
        for block in self.down_blocks:
            features.append(block(features[-1]))
        return features


class Decoder(nn.Module):
    """Up blocks, each followed by concatenation with the encoder's features of that size."""

    def __init__(self, in_channels: Sequence[int], out_channels: Sequence[int], norm: Norm) -> None:
        super().__init__()
        self.up_blocks = nn.ModuleList(
            UpBlock(i, o, norm=norm) for i, o in zip(in_channels, out_channels, strict=True)
        )

    def forward(self, features: list[Tensor]) -> list[Tensor]:
        *skips, out = features
        outputs = []
        for block, skip in zip(self.up_blocks, reversed(skips), strict=True):
            out = torch.cat([block(out), skip], dim=1)
            outputs.append(out)
        return outputs


class Hourglass(nn.Module):
    """U-shaped feature extractor at the resolution of its input (method §1).

    Encoder channel i is ``min(max_features, block_expansion·2^(i+1))``.

    Attributes:
        level_channels: channels of the decoder's levels, coarse to fine; the last one is
            ``out_channels = block_expansion + in_features``.
    """

    def __init__(
        self,
        in_features: int,
        *,
        block_expansion: int,
        num_blocks: int,
        max_features: int,
        norm: Norm = BatchNorm2d,
    ) -> None:
        super().__init__()
        inner = [min(max_features, block_expansion * 2**i) for i in range(num_blocks + 1)]
        self.encoder = Encoder([in_features, *inner[1:]], norm)
        ups = list(reversed(inner))
        # All but the innermost up block take a concatenated skip, hence twice the channels.
        self.decoder = Decoder([ups[0], *(2 * c for c in ups[1:-1])], ups[1:], norm)
        self.out_channels = block_expansion + in_features
        self.level_channels = [*(2 * c for c in ups[1:-1]), self.out_channels]

    def levels(self, x: Float[Tensor, "B I H W"]) -> list[Tensor]:
        """Return the output of every decoder level, coarse to fine."""
        outputs: list[Tensor] = self.decoder(self.encoder(in_conv_format(x)))
        return outputs

    def forward(self, x: Float[Tensor, "B I H W"]) -> Float[Tensor, "B O H W"]:
        return self.levels(x)[-1]


def gaussian_kernel(scale: float) -> Float[Tensor, " N"]:
    """Return the normalised 1-D anti-alias kernel for down-sampling by ``scale`` < 1 (method §1).

    sigma = (1/scale − 1)/2 and N = 2·round(4·sigma) + 1; the 2-D kernel is its outer product.
    """
    sigma = (1 / scale - 1) / 2
    half = round(4 * sigma)
    offsets = torch.arange(-half, half + 1, dtype=torch.float32)
    kernel = torch.exp(-(offsets**2) / (2 * sigma**2))
    return kernel / kernel.sum()


class AntiAliasDownsample(nn.Module):
    """Gaussian blur with zero padding, then every (1/scale)-th pixel (method §1).

    The Gaussian is applied as two 1-D filters, only at the pixels that are kept, and in float32,
    which costs nothing extra on three channels.
    """

    kernel: Tensor

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.stride = round(1 / scale)
        if self.stride < 1 or abs(self.stride * scale - 1) > 1e-6:
            raise ValueError(f"scale must be 1 divided by an integer, not {scale}")
        if self.stride > 1:
            self.register_buffer("kernel", gaussian_kernel(scale), persistent=False)

    def forward(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B C h w"]:
        if self.stride == 1:
            return x
        x = channels_last(x)  # An image expanded to a batch has no layout of its own.
        channels, size = x.shape[1], len(self.kernel)
        column = self.kernel.view(1, 1, size, 1).expand(channels, 1, size, 1)
        row = self.kernel.view(1, 1, 1, size).expand(channels, 1, 1, size)
        pad = size // 2
        with in_float32(x):
            x = F.conv2d(x, column, stride=(self.stride, 1), padding=(pad, 0), groups=channels)
            return F.conv2d(x, row, stride=(1, self.stride), padding=(0, pad), groups=channels)


def coordinate_grid(
    height: int, width: int, *, dtype: torch.dtype, device: torch.device
) -> Float[Tensor, "H W 2"]:
    """Return pixel positions (x, y) in [-1, 1]: the first pixel at -1 and the last at +1."""
    y = torch.linspace(-1, 1, height, dtype=dtype, device=device)
    x = torch.linspace(-1, 1, width, dtype=dtype, device=device)
    return torch.stack([x.expand(height, width), y[:, None].expand(height, width)], dim=-1)


def warp(
    image: Float[Tensor, "B C H W"], deformation: Float[Tensor, "B h w 2"]
) -> Float[Tensor, "B C H W"]:
    """Sample ``image`` where ``deformation`` points (backward warping).

    Positions put corner pixels at ±1, but sampling uses ``align_corners=False``. The reference has
    the same disagreement, and its published weights were trained with it: both are kept.

    Args:
        image: image or features to sample; its dtype may differ from that of ``deformation``.
        deformation: (x, y) in [-1, 1]; resized bilinearly to the size of the image if it differs.
    """
    height, width = image.shape[2:]
    if deformation.shape[1:3] != (height, width):
        deformation = F.interpolate(
            deformation.permute(0, 3, 1, 2), size=(height, width), mode="bilinear"
        ).permute(0, 2, 3, 1)
    return grid_sample(image.to(deformation.dtype), deformation).to(image.dtype)


_SMALLEST_DETERMINANT = 1e-6


def inverse_2x2(matrix: Float[Tensor, "*B 2 2"]) -> Float[Tensor, "*B 2 2"]:
    """Invert 2x2 matrices in closed form; the result is always finite.

    It is the exact inverse if |det| ≥ 1e-6. Otherwise the determinant is clamped to ±1e-6, so that
    values and gradients stay finite.
    """
    a, b, c, d = matrix.flatten(-2).unbind(-1)
    det = a * d - b * c
    bound = torch.full_like(det, _SMALLEST_DETERMINANT)
    if torch.compiler.is_exporting():  # ONNX has no copysign
        signed = torch.where(det < 0, -bound, bound)
    else:
        signed = torch.copysign(bound, det.detach())
    det = torch.where(det.abs() < bound, signed, det)
    adjugate: Tensor = torch.stack([d, -b, -c, a], dim=-1).unflatten(-1, (2, 2))
    return adjugate / det[..., None, None]
