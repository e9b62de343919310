"""LPIPS with a local backbone, and the proxy that is never called LPIPS."""

from pathlib import Path

import pytest
import torch
import torchmetrics.functional.image.lpips as reference
import torchvision

from prioritycut_ray.errors import UserError
from prioritycut_ray.metrics.perceptual import perceptual_distance, perceptual_metric


def pictures() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return (
        torch.rand(2, 3, 64, 64, generator=generator),
        torch.rand(2, 3, 64, 64, generator=generator),
    )


def test_the_proxy_says_that_it_is_one() -> None:
    metric = perceptual_metric("proxy")
    assert "lpips" not in metric.key.lower()
    assert "proxy" in metric.label
    assert "not LPIPS" in metric.label
    a, b = pictures()
    distance = perceptual_distance("proxy")
    assert torch.equal(distance(a, a), torch.zeros(2))
    near, far = distance(a, (a + 0.02 * b).clamp(0, 1)), distance(a, b)
    assert (near < far).all()


def test_lpips_with_a_local_backbone_equals_the_formula(tmp_path: Path) -> None:
    """By the paper's formula: weighted squared distances of unit-length features."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        alexnet = torchvision.models.alexnet(weights=None).eval()
    torch.save(alexnet.state_dict(), tmp_path / "alexnet.pth")
    file = Path(reference.__file__).parent / "lpips_models" / "alex.pth"
    heads = torch.load(file, map_location="cpu", weights_only=True)
    a, b = pictures()
    with torch.no_grad():
        got = perceptual_distance(str(tmp_path / "alexnet.pth"))(a, b)
        expected = torch.zeros(2)
        mean = torch.tensor([-0.030, -0.088, -0.188]).view(1, 3, 1, 1)
        std = torch.tensor([0.458, 0.448, 0.450]).view(1, 3, 1, 1)
        x, y = ((2 * image - 1 - mean) / std for image in (a, b))
        level = 0
        for layer in alexnet.features[:12]:
            x, y = layer(x), layer(y)
            if isinstance(layer, torch.nn.ReLU):
                unit = [v / (v.square().sum(1, keepdim=True).sqrt() + 1e-8) for v in (x, y)]
                squared = (unit[0] - unit[1]).square()
                weight = heads[f"lin{level}.model.1.weight"]
                expected += (squared * weight.view(1, -1, 1, 1)).sum(1).mean((1, 2))
                level += 1
    assert level == 5
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6)
    metric = perceptual_metric(str(tmp_path / "alexnet.pth"))
    assert metric.key == "lpips_alex"
    assert "sha256" in metric.definition


def test_other_weights_are_refused(tmp_path: Path) -> None:
    torch.save({"features.0.weight": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(UserError, match=r"other\.pth.*AlexNet or VGG-16"):
        perceptual_metric(str(tmp_path / "other.pth"))
