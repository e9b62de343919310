"""Optimisations do not change results (docs/performance.md)."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from prioritycut_ray.config import Config, load_config
from prioritycut_ray.losses import feature_distance
from prioritycut_ray.models import blocks
from prioritycut_ray.models.animator import FramePair
from prioritycut_ray.models.blocks import conv_of_enlarged, coordinate_grid, pooled_conv
from prioritycut_ray.models.keypoints import HEATMAP_VARIANCE, keypoint_heatmaps
from prioritycut_ray.networks import build_animator, build_discriminator, build_perceptual
from prioritycut_ray.precision import autocast, has_bfloat16, resolve_precision
from prioritycut_ray.training.state import TrainState, new_state
from prioritycut_ray.training.steps import draw_randomness, micro_batches, training_step
from prioritycut_ray.training.trainer import agree_on_precision
from prioritycut_ray.training.worker import Worker
from tests.places import FAMILIES, TINY

CPU = torch.device("cpu")
either_family = pytest.mark.parametrize("source_of_model", FAMILIES.values(), ids=FAMILIES)


def with_gradients(output: Tensor, *inputs: Tensor) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    weights = torch.rand(output.shape, dtype=output.dtype, generator=generator)
    return [output, *torch.autograd.grad((output * weights).sum(), inputs)]


@pytest.fixture(params=["folded", "plain"])
def fold(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fold kernels at any size, or never."""
    monkeypatch.setattr(blocks, "_FOLD_FROM", 0 if request.param == "folded" else 2**60)


@pytest.mark.usefixtures("fold")
def test_folded_kernels_equal_the_convolution_that_they_replace() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(2, 5, 12, 8, dtype=torch.float64, generator=generator, requires_grad=True)
    conv = nn.Conv2d(5, 7, 3, padding=1).double()
    inputs = (x, *conv.parameters())
    for ours, plain in (
        (conv_of_enlarged(x, conv), conv(F.interpolate(x, scale_factor=2))),
        (pooled_conv(x, conv), F.avg_pool2d(conv(x), 2)),
    ):
        torch.testing.assert_close(with_gradients(ours, *inputs), with_gradients(plain, *inputs))


def test_heatmaps_as_products_equal_the_two_dimensional_gaussian() -> None:
    value = torch.rand(2, 3, 2, dtype=torch.float64) * 3 - 1.5
    grid = coordinate_grid(9, 14, dtype=value.dtype, device=CPU)
    squared = (grid - value[:, :, None, None]).square().sum(-1)
    torch.testing.assert_close(
        keypoint_heatmaps(value, 9, 14), torch.exp(-squared / (2 * HEATMAP_VARIANCE))
    )


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_feature_distance_has_the_gradient_of_mean_absolute_differences(
    layout: torch.memory_format,
) -> None:
    x, y = (torch.randn(2, 3, 5, 7, dtype=torch.float64).to(memory_format=layout) for _ in range(2))
    y[0] = x[0]  # the gradient of |0| is 0
    x.requires_grad_()
    ours, plain = feature_distance([x], [y]), (x - y).abs().mean()
    torch.testing.assert_close(ours.double(), plain)
    (gradient,) = torch.autograd.grad(3 * ours, x)
    torch.testing.assert_close(gradient, *torch.autograd.grad(3 * plain, x), rtol=1e-6, atol=0)
    assert gradient.stride() == x.stride()


@pytest.mark.parametrize(
    "words", [[], ["discriminator.kind=patch", "discriminator.patch_num_blocks=2"]]
)
def test_encode_gives_the_features_of_a_full_forward_pass(words: list[str]) -> None:
    mixing = ["priority_cut=null"] if words else []
    discriminator = build_discriminator(load_config(str(TINY), [*words, *mixing])).eval()
    images, keypoints = torch.rand(2, 3, 32, 32), torch.rand(2, 4, 2) * 2 - 1
    with torch.no_grad():
        whole, alone = discriminator(images, keypoints), discriminator.encode(images, keypoints)
    assert all(torch.equal(a, b) for a, b in zip(whole.features, alone, strict=True))


@either_family
def test_one_source_for_many_driving_frames_equals_repeating_it(source_of_model: Path) -> None:
    torch.manual_seed(0)  # The splines of some random keypoints are nearly singular.
    animator = build_animator(load_config(str(source_of_model)).model).eval()
    source, driving = torch.rand(1, 3, 32, 32), torch.rand(3, 3, 32, 32)
    with torch.no_grad():
        repeated = animator(FramePair(source.expand(3, -1, -1, -1), driving)).animation
        once = animator.render(animator.encode(source), animator.detect(driving))
    torch.testing.assert_close(once.prediction, repeated.prediction)
    assert once.source_keypoints.value.shape == repeated.source_keypoints.value.shape


@either_family
def test_every_layer_computes_channels_last(source_of_model: Path) -> None:
    """A tensor or gradient in another layout makes a layer up to 20 times slower."""
    config = load_config(str(source_of_model), ["priority_cut.mix_prob=1"])
    state = new_state(config, CPU)
    wrong: list[str] = []

    def check(name: str, tensors: tuple[Tensor | None, ...]) -> None:
        for tensor in tensors:
            if tensor is not None and tensor.ndim == 4 and not _channels_last(tensor):
                wrong.append(name)

    def check_both_ways(name: str, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        check(name, (*inputs, output))
        if output.requires_grad:
            output.register_hook(lambda gradient: check(f"gradient of {name}", (gradient,)))

    layers = 0
    for network in state.networks():
        for name, layer in network.named_modules():
            if isinstance(layer, nn.BatchNorm2d | nn.InstanceNorm2d):
                layers += 1
                layer.register_forward_hook(
                    lambda _, inputs, output, name=name: check_both_ways(name, inputs, output)
                )
    assert layers > 10
    train(config, steps=1, state=state)
    assert wrong == []


def _channels_last(tensor: Tensor) -> bool:
    return tensor.stride(1) == 1 or tensor.shape[1] == 1


@either_family
def test_autocast_leaves_coordinates_in_float32(source_of_model: Path) -> None:
    config = load_config(str(source_of_model))
    animator = build_animator(config.model)
    pair = FramePair(*torch.rand(2, 2, 3, 32, 32))
    with autocast("bfloat16", CPU):
        animation = animator(pair).animation
        exact = animator.dense_motion(
            pair.source, animation.source_keypoints, animation.driving_keypoints
        )
    formats = {
        tensor.dtype
        for tensor in (
            animation.prediction,
            *animation.source_keypoints,
            *animation.driving_keypoints,
            *tree_leaves(exact),
        )
        if tensor is not None
    }
    assert formats == {torch.float32}


def train(config: Config, *, steps: int, state: TrainState | None = None) -> list[dict[str, float]]:
    """Losses of some steps on the same four smooth frames."""
    state = state or new_state(config, CPU)
    perceptual = build_perceptual(config)
    state.animator.train()
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(8, 3, 4, 4, generator=generator)
    source, driving = F.interpolate(coarse, size=32, mode="bicubic").clamp(0, 1).chunk(2)
    losses = []
    for step in range(steps):
        randomness = draw_randomness(config, step, Worker(0, 1, CPU))
        parts = micro_batches(FramePair(source, driving), randomness, 1)
        networks = state.animator, state.discriminator
        outcome = training_step(state, *networks, perceptual, parts, config)
        losses.append({name: v.item() for name, v in outcome.losses.items()})
    return losses


@either_family
def test_bfloat16_losses_match_float32_within_its_noise(source_of_model: Path) -> None:
    """Compares the first step; `benchmarks/step.py noise` compares 200."""
    config = str(source_of_model)
    first = {
        precision: train(load_config(config, [f"train.precision={precision}"]), steps=1)[0]
        for precision in ("float32", "bfloat16")
    }
    for name, exact in first["float32"].items():
        assert first["bfloat16"][name] == pytest.approx(exact, rel=0.05, abs=0.01), name


def test_auto_precision_follows_the_hardware() -> None:
    assert resolve_precision("float32", CPU) == "float32"
    expected = "bfloat16" if has_bfloat16(CPU) else "float32"
    assert resolve_precision("auto", CPU) == expected
    config = load_config(str(TINY), ["train.precision=auto"])
    assert agree_on_precision(config, Worker(0, 1, CPU)).train.precision == expected


def test_activation_checkpointing_changes_no_loss() -> None:
    words = ["train.activation_checkpointing=true"]
    assert train(load_config(str(TINY), words), steps=2) == train(load_config(str(TINY)), steps=2)
