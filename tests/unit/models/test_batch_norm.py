"""Our batch norm against torch's own in float64 (two processes: tests/integration/test_ddp.py)."""

from collections.abc import Iterator
from copy import deepcopy

import pytest
import torch
from torch import Tensor, nn

from prioritycut_ray.config import load_config
from prioritycut_ray.models.animator import Animator, FramePair
from prioritycut_ray.models.batch_norm import BatchNorm2d
from prioritycut_ray.networks import build_animator

SHAPES = [
    (2, 64, 32, 32),
    (3, 5, 7, 9),  # an odd number of pixels
    (4, 1, 8, 8),
    (1, 3, 5, 5),
    (2, 2048, 3, 2),  # more channels than a block has columns
    (16, 3, 66, 64),  # several blocks, the last of them shorter
]
LIMITS = {torch.float64: 1e-12, torch.float32: 5e-6, torch.bfloat16: 5e-3}


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def distance(ours: Tensor, exact: Tensor) -> float:
    assert ours.shape == exact.shape
    exact = exact.double()  # batches are counted in whole numbers
    return float((ours.double() - exact).norm() / exact.norm())


def results(norm: nn.Module, x: Tensor, gradient: Tensor) -> dict[str, Tensor]:
    x = x.clone().requires_grad_()
    out = norm(x)
    out.backward(gradient)
    assert x.grad is not None
    assert out.dtype == x.grad.dtype == x.dtype
    parameters = {f"gradient of {name}": p.grad for name, p in norm.named_parameters()}
    found = {"out": out.detach(), "gradient": x.grad, **parameters, **dict(norm.named_buffers())}
    return {name: tensor for name, tensor in found.items() if tensor is not None}


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize("shape", SHAPES)
def test_results_match_torch_in_float64(
    shape: tuple[int, int, int, int], dtype: torch.dtype, layout: torch.memory_format
) -> None:
    generator = torch.Generator().manual_seed(0)
    x, gradient = (
        torch.randn(shape, generator=generator).to(dtype).to(memory_format=layout) for _ in range(2)
    )
    x = x * 3 + 2
    exact, ours = nn.BatchNorm2d(shape[1]).double(), BatchNorm2d(shape[1])
    with torch.no_grad():
        exact.weight.uniform_(0.5, 2, generator=generator)
        exact.bias.normal_(generator=generator)
    ours = ours.to(torch.promote_types(dtype, torch.float32))
    ours.load_state_dict(exact.state_dict())
    expected = results(exact, x.double(), gradient.double())
    found = results(ours, x, gradient)
    assert found["out"].stride() == x.stride() or 1 in shape
    for name, tensor in expected.items():
        assert distance(found[name], tensor) <= LIMITS[dtype], name
    # A gradient in another layout than x.
    other = torch.contiguous_format if layout == torch.channels_last else torch.channels_last
    mixed = results(deepcopy(ours), x, gradient.contiguous(memory_format=other))
    assert distance(mixed["gradient"], expected["gradient"]) <= LIMITS[dtype]


def test_sums_in_channels_last_layout_are_accurate(threads: int) -> None:
    """Added one by one in float32, 131 072 numbers give errors of 1e-5 and more."""
    generator = torch.Generator().manual_seed(threads)
    shape = (8, 16, 128, 128)
    x, gradient = (torch.randn(shape, generator=generator) for _ in range(2))
    x += 1
    expected = results(nn.BatchNorm2d(16).double(), x.double(), gradient.double())
    x = x.to(memory_format=torch.channels_last)
    found = results(BatchNorm2d(16), x, gradient)
    for name, tensor in expected.items():
        assert distance(found[name], tensor) <= 2e-6, name


def test_a_network_in_training_mode_is_accurate(
    threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A narrow animator at 128x128 on noise, the hardest input, against itself in float64."""
    words = [
        "data.size=128",
        "model.detector.scale_factor=0.5",
        "model.generator.num_down_blocks=2",
    ]
    config = load_config("vox256", [*words, *NARROW])
    torch.manual_seed(1)
    animator = build_animator(config.model)
    frames = torch.rand(2, 4, 3, 128, 128)
    ours = predict(animator, frames)
    # The networks call float() where autocast must not lower the precision.
    monkeypatch.setattr(Tensor, "float", Tensor.double)
    exact = predict(animator.double(), frames.double())
    for name, tensor in exact.items():
        assert distance(ours[name], tensor) <= 5e-6, name


NARROW = [
    "data.size=128",
    "model.detector.scale_factor=0.5",
    *(f"model.{name}.block_expansion=4" for name in ("detector", "dense_motion", "generator")),
    *(f"model.{name}.max_features=16" for name in ("detector", "dense_motion", "generator")),
    *(f"model.{name}.num_blocks=2" for name in ("detector", "dense_motion")),
    "model.generator.num_bottleneck_blocks=2",
]


def predict(animator: Animator, frames: Tensor) -> dict[str, Tensor]:
    with torch.no_grad():
        animation = deepcopy(animator).train()(FramePair(*frames)).animation
    return {
        "keypoints": animation.driving_keypoints.value,
        "mask": animation.background_mask,
        "prediction": animation.prediction,
    }


def test_names_of_weights_and_buffers_match_torch() -> None:
    ours, torchs = BatchNorm2d(3), nn.BatchNorm2d(3)
    assert list(ours.state_dict()) == list(torchs.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(*_values(ours, torchs), strict=True))


def test_evaluation_mode_matches_torch() -> None:
    ours, torchs = BatchNorm2d(5), nn.BatchNorm2d(5)
    ours(torch.randn(4, 5, 6, 6))
    torchs.load_state_dict(ours.state_dict())
    x = torch.randn(4, 5, 6, 6)
    assert torch.equal(ours.eval()(x), torchs.eval()(x))
    assert all(torch.equal(a, b) for a, b in zip(*_values(ours, torchs), strict=True))


def _values(*modules: nn.Module) -> list[list[Tensor]]:
    return [list(module.state_dict().values()) for module in modules]
