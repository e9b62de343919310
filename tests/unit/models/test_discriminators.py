"""The patch and the U-Net discriminator (method §3)."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from prioritycut_ray.models.discriminators import (
    DiscriminatorOutput,
    PatchDiscriminator,
    UNetDiscriminator,
    unet_channels,
)

K = 3


def unet(size: int = 64, num_keypoints: int = K) -> UNetDiscriminator:
    torch.manual_seed(0)
    return UNetDiscriminator(
        size=size, num_keypoints=num_keypoints, base_channels=4, max_features=1024
    )


def patch(num_keypoints: int = K, *, spectral: bool = False, blocks: int = 3) -> PatchDiscriminator:
    torch.manual_seed(0)
    return PatchDiscriminator(
        num_keypoints=num_keypoints,
        block_expansion=4,
        max_features=12,
        num_blocks=blocks,
        spectral=spectral,
    )


def frames(size: int = 64, batch: int = 2) -> tuple[Tensor, Tensor]:
    """Random images and keypoints, the same in every call."""
    generator = torch.Generator().manual_seed(1)
    images = torch.rand(batch, 3, size, size, generator=generator)
    return images, torch.rand(batch, K, 2, generator=generator) * 2 - 1


def judge(network: nn.Module, size: int = 64, batch: int = 2) -> DiscriminatorOutput:
    output: DiscriminatorOutput = network(*frames(size, batch))
    return output


# U-Net


@pytest.mark.parametrize("size", [64, 128, 256])
def test_unet_classifies_images_and_pixels_at_any_power_of_two(size: int) -> None:
    output = judge(unet(size).eval(), size)
    assert output.logits.shape == (2,)
    assert output.pixel_logits is not None
    assert output.pixel_logits.shape == (2, 1, size, size)
    sides = [level.shape[-1] for level in output.features]
    assert sides == [size // 2**i for i in range(1, len(sides) + 1)]
    assert sides[-1] == 4


def test_unet_has_the_channels_of_unet_gan_at_256() -> None:
    assert unet_channels(256, 64, 1024) == [64, 128, 256, 512, 512, 1024]
    assert unet_channels(128, 64, 1024) == [64, 128, 256, 512, 1024]
    assert unet_channels(64, 64, 1024) == [64, 128, 256, 512]
    assert unet_channels(256, 64, 300) == [64, 128, 256, 300, 300, 300]


@pytest.mark.parametrize("size", [8, 48, 100])
def test_unet_rejects_other_sizes(size: int) -> None:
    with pytest.raises(ValueError, match="power of two"):
        unet(size)


def test_every_skip_connection_reaches_the_pixel_logits() -> None:
    """Cut the encoder after each level: the level then reaches the output only by its skip."""
    network = unet().eval()
    kept: list[Tensor] = []

    def keep(module: nn.Module, inputs: object, output: Tensor) -> Tensor:
        output.retain_grad()
        kept.append(output)
        return output

    for block in network.down_blocks:
        block.register_forward_pre_hook(lambda module, inputs: (inputs[0].detach(),))
        block.register_forward_hook(keep)
    output = judge(network)
    assert output.pixel_logits is not None
    output.pixel_logits.square().sum().backward()
    assert len(kept) == 4
    for features in kept:
        assert features.grad is not None
        assert (features.grad != 0).float().mean() > 0.5


def test_a_changed_pixel_changes_its_own_logit_most() -> None:
    """The bottleneck may miss such details; the skips do not."""
    network = unet().eval()
    image, keypoints = torch.full((1, 3, 64, 64), 0.5), torch.zeros(1, K, 2)
    changed = image.clone()
    changed[..., 40, 11] = 1.0
    with torch.no_grad():
        before, after = network(image, keypoints), network(changed, keypoints)
    difference = (after.pixel_logits - before.pixel_logits).abs()[0, 0]
    row, column = divmod(int(difference.argmax()), 64)
    assert abs(row - 40) <= 6
    assert abs(column - 11) <= 6


def test_global_logit_comes_from_the_bottleneck() -> None:
    network = unet().eval()
    output = judge(network)
    pooled = output.features[-1].relu().sum((2, 3))
    torch.testing.assert_close(output.logits, network.head(pooled)[:, 0])


def convolutions(network: nn.Module) -> list[nn.Module]:
    return [m for m in network.modules() if isinstance(m, nn.Conv2d | nn.Linear)]


def test_unet_is_spectrally_normalised_everywhere_and_has_no_batch_norm() -> None:
    network = unet()
    layers = convolutions(network)
    assert len(layers) == 3 * (4 + 4) + 2
    assert all(is_parametrized(layer, "weight") for layer in layers)
    assert not [m for m in network.modules() if isinstance(m, nn.modules.batchnorm._NormBase)]


@pytest.mark.parametrize("network", [unet(), patch(spectral=True)], ids=["unet", "patch"])
def test_spectral_norms_converge_to_one(network: nn.Module) -> None:
    network.train()
    with torch.no_grad():
        for _ in range(30):
            judge(network)
        network.eval()
        judge(network)
    norms = [torch.linalg.matrix_norm(m.weight.flatten(1), ord=2) for m in convolutions(network)]
    assert all(0.9 < norm < 1.1 for norm in norms)


@pytest.mark.parametrize("network", [unet(), patch(), patch(spectral=True)])
def test_samples_are_independent(network: nn.Module) -> None:
    images, keypoints = frames()
    both, alone = network.eval()(images, keypoints), network(images[1:], keypoints[1:])
    torch.testing.assert_close(alone, both.rows(slice(1, 2)))


@pytest.mark.parametrize("build", [unet, patch])
def test_keypoints_condition_the_output_only_if_configured(
    build: Callable[..., nn.Module],
) -> None:
    images = torch.rand(1, 3, 64, 64)
    left, right = torch.full((1, K, 2), -0.5), torch.full((1, K, 2), 0.5)
    conditioned = build(num_keypoints=K).eval()
    assert not torch.equal(conditioned(images, left).logits, conditioned(images, right).logits)
    free = build(num_keypoints=0).eval()
    assert torch.equal(free(images, left).logits, free(images, right).logits)


# Patch


def test_patch_discriminator_has_the_references_shapes() -> None:
    """4x4 convolutions without padding; all blocks except the last halve the size."""
    output = judge(patch())
    assert output.pixel_logits is None
    assert [tuple(level.shape[1:]) for level in output.features] == [
        (8, 30, 30),  # (64 − 3) / 2
        (12, 13, 13),  # (30 − 3) / 2
        (12, 10, 10),  # 13 − 3
    ]
    assert output.logits.shape == (2, 1, 10, 10)


def test_patch_discriminator_has_instance_norms_except_in_the_first_block() -> None:
    norms = [
        [m for m in b.modules() if isinstance(m, nn.InstanceNorm2d)] for b in patch().down_blocks
    ]
    assert [len(found) for found in norms] == [0, 1, 1]
    assert all(norm.affine and not norm.track_running_stats for found in norms for norm in found)


def test_patch_discriminator_gives_an_image_the_same_gradients_alone_and_in_a_batch() -> None:
    """torch's instance norm has wrong gradients for one image whose gradient is channels last."""
    network = patch().to(memory_format=torch.channels_last)
    images, keypoints = frames()
    images = images.to(memory_format=torch.channels_last).requires_grad_()
    inputs = (images, *network.parameters())
    in_batch, alone = (
        torch.autograd.grad(network(images[:batch], keypoints[:batch]).logits[0].sum(), inputs)
        for batch in (2, 1)
    )
    for found, expected in zip(alone, in_batch, strict=True):
        torch.testing.assert_close(found, expected)


def test_patch_discriminator_stores_spectral_norms_under_the_references_names() -> None:
    names = set(patch(spectral=True).state_dict())
    for layer in ("down_blocks.0.conv", "down_blocks.2.conv", "conv"):
        assert {
            f"{layer}.{name}" for name in ("weight_orig", "weight_u", "weight_v", "bias")
        } <= names
    assert not [name for name in patch().state_dict() if "weight_" in name]


def test_patch_spectral_norm_iterates_in_the_references_order() -> None:
    """In training: v from u, then u from v, then σ = uᵀ W v; the newer one computes u first."""
    network = patch(spectral=True, blocks=1).train()
    conv = network.down_blocks[0].conv
    matrix, u = conv.weight_orig.detach().flatten(1), conv.weight_u.clone()
    judge(network)
    v = nn.functional.normalize(matrix.T @ u, dim=0)
    u = nn.functional.normalize(matrix @ v, dim=0)
    expected = conv.weight_orig / (u @ matrix @ v)
    torch.testing.assert_close(conv.weight, expected)


def test_rows_slices_all_outputs_along_the_batch() -> None:
    output = judge(unet().eval(), batch=3)
    part = output.rows(slice(1, 3))
    assert output.pixel_logits is not None
    assert part.pixel_logits is not None
    assert torch.equal(part.logits, output.logits[1:3])
    assert torch.equal(part.pixel_logits, output.pixel_logits[1:3])
    for level, whole in zip(part.features, output.features, strict=True):
        assert torch.equal(level, whole[1:3])
