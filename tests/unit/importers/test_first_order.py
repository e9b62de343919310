"""Checkpoints of the public First Order Motion become runs; errors name what does not fit."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from prioritycut_ray.errors import UserError
from prioritycut_ray.importers.first_order import (
    ReferenceModel,
    import_checkpoint,
    load_weights,
    read_reference,
    run_config,
)
from prioritycut_ray.importers.published import FIRST_ORDER
from prioritycut_ray.models.animator import FramePair
from prioritycut_ray.models.blocks import gaussian_kernel
from prioritycut_ray.models.discriminators import PatchDiscriminator
from prioritycut_ray.networks import build_animator, build_discriminator
from prioritycut_ray.runs.locate import find_checkpoint
from prioritycut_ray.training.checkpoint import load_animator, load_checkpoint
from prioritycut_ray.training.state import new_state
from tests.places import DATA

GOLDEN = DATA / "dev_a.safetensors"
CPU = torch.device("cpu")

Published = dict[str, Any]


@pytest.fixture
def published() -> Published:
    """The golden weights in the layout of a published checkpoint."""
    entries: Published = {"epoch": 3, "optimizer_generator": {"state": {}, "param_groups": []}}
    for key, tensor in load_file(GOLDEN).items():
        if key.startswith("weights/"):
            network, _, name = key.removeprefix("weights/").partition(".")
            entries.setdefault(network, {})[name] = tensor
    return entries


def write(entries: object, folder: Path) -> Path:
    file = folder / "model.pth.tar"
    torch.save(entries, file)
    return file


def rewrite_golden(
    folder: Path,
    change_config: Callable[[dict[str, Any]], object] = lambda _: None,
    change_weights: Callable[[dict[str, Tensor]], object] = lambda _: None,
) -> Path:
    """The golden file with another config and other weights, made for frames of 64 pixels."""
    with safe_open(GOLDEN, framework="pt") as opened:
        metadata = opened.metadata()
    config, tensors = json.loads(metadata["config"]), load_file(GOLDEN)
    change_config(config)
    change_weights(tensors)
    file = folder / "changed.safetensors"
    save_file(tensors, file, {"config": json.dumps(config), "size": "64"})
    return file


def build(model: ReferenceModel) -> tuple[torch.nn.Module, PatchDiscriminator]:
    config = run_config(model._replace(size=64), Path("run"))
    animator, discriminator = build_animator(config.model), build_discriminator(config)
    assert isinstance(discriminator, PatchDiscriminator)
    load_weights(model, animator, discriminator, "test")
    return animator, discriminator


# What an import makes


def test_imported_run_predicts_what_the_reference_predicts(tmp_path: Path) -> None:
    report = import_checkpoint(rewrite_golden(tmp_path), tmp_path / "run")
    assert report.checkpoint == tmp_path / "run" / "step_0000000"
    animator, config = load_animator(find_checkpoint(tmp_path / "run"), CPU)
    golden = load_file(GOLDEN)
    with torch.no_grad():
        animation = animator(FramePair(golden["input/source"], golden["input/driving"])).animation
    torch.testing.assert_close(animation.prediction, golden["eval/prediction"])
    assert config == report.config
    assert (config.name, config.storage) == ("run", str(tmp_path))
    assert config.data.size == 64
    assert config.discriminator.kind == "patch"
    assert config.priority_cut is None


def test_imported_run_continues_training_from_its_weights(tmp_path: Path) -> None:
    report = import_checkpoint(rewrite_golden(tmp_path), tmp_path / "run")
    state = new_state(report.config, CPU)
    load_checkpoint(state, report.checkpoint)
    golden = load_file(GOLDEN)
    prefix = "weights/discriminator.discs.1."
    for name, tensor in state.discriminator.state_dict().items():
        assert torch.equal(tensor, golden[prefix + name])
    averaged = dict(state.ema.module.named_parameters())
    for name, parameter in state.animator.named_parameters():
        assert torch.equal(parameter, averaged[name])
    assert (state.step, state.samples) == (0, 0)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_published_layout_gives_the_same_weights_as_the_golden_file(
    published: Published, tmp_path: Path, zipped: bool
) -> None:
    file = tmp_path / "model.pth.tar"
    torch.save(published, file, _use_new_zipfile_serialization=zipped)
    for ours, golden in zip(
        build(read_reference(file)), build(read_reference(GOLDEN)), strict=True
    ):
        for name, tensor in golden.state_dict().items():
            assert torch.equal(ours.state_dict()[name], tensor), name


def test_sizes_are_inferred_from_the_shapes(published: Published, tmp_path: Path) -> None:
    inferred = read_reference(write(published, tmp_path))
    declared = read_reference(GOLDEN).config
    assert inferred.config == declared
    assert inferred.size == 256
    (note,) = inferred.notes
    assert "256" in note
    assert "0.1" in note


def weights_of(model: ReferenceModel) -> dict[str, Tensor]:
    animator, discriminator = build(model)
    return animator.state_dict() | discriminator.state_dict()


def test_the_prefix_of_data_parallel_is_removed(published: Published, tmp_path: Path) -> None:
    plain = weights_of(read_reference(write(published, tmp_path)))
    for network in FIRST_ORDER.networks:
        published[network] = {f"module.{key}": value for key, value in published[network].items()}
    model = read_reference(write(published, tmp_path))
    assert sum("module." in note for note in model.notes) == 3
    assert all(torch.equal(tensor, plain[name]) for name, tensor in weights_of(model).items())


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_of_another_precision_are_converted(
    published: Published, tmp_path: Path, kind: torch.dtype
) -> None:
    plain = weights_of(read_reference(write(published, tmp_path)))
    for network in FIRST_ORDER.networks:
        for key, value in published[network].items():
            if value.is_floating_point():
                published[network][key] = value.to(kind)
    model = read_reference(write(published, tmp_path))
    assert any(str(kind).removeprefix("torch.") in note for note in model.notes)
    for name, tensor in weights_of(model).items():
        assert tensor.dtype == plain[name].dtype
        assert torch.allclose(tensor.float(), plain[name].float(), rtol=1e-2, atol=1e-2), name


def test_numbers_of_numpy_beside_the_weights_are_read(published: Published, tmp_path: Path) -> None:
    published["epoch"] = np.int64(3)
    group = {"lr": np.float64(1e-4), "amsgrad": np.bool_(False), "betas": (np.float32(0.5), 0.999)}
    published["optimizer_generator"] = {"state": {}, "param_groups": [group]}
    read_reference(write(published, tmp_path))


def test_a_generator_and_a_detector_are_enough_to_animate(
    published: Published, tmp_path: Path
) -> None:
    whole = import_checkpoint(write(published, tmp_path), tmp_path / "whole")
    del published["discriminator"]
    report = import_checkpoint(write(published, tmp_path), tmp_path / "bare")
    assert any("no discriminator" in note for note in report.notes)
    weights = (load_file(r.checkpoint / "animator.safetensors") for r in (whole, report))
    for first, second in zip(*(w.values() for w in weights), strict=True):
        assert torch.equal(first, second)


def test_report_names_what_was_assumed_and_omitted(published: Published, tmp_path: Path) -> None:
    report = import_checkpoint(write(published, tmp_path), tmp_path / "run")
    assert len(report.notes) == 2
    assert "optimisers" in report.notes[-1]
    assert report.config.data.size == 256


def test_published_256_model_fits(tmp_path: Path) -> None:
    """Every name and shape of vox-adv-256, without its 240 MB of numbers."""
    shapes = json.loads((DATA / "vox_adv_256_shapes.json").read_text())
    published = {
        network: {name: torch.zeros(()).expand(shape) for name, shape in tensors.items()}
        for network, tensors in shapes.items()
    }
    kernel = gaussian_kernel(0.25)
    downs = torch.outer(kernel, kernel).repeat(3, 1, 1, 1)
    published["kp_detector"]["down.weight"] = downs
    published["generator"]["dense_motion_network.down.weight"] = downs
    model = read_reference(write(published | {"epoch": 1}, tmp_path))
    config = run_config(model, Path("vox"))
    detector, motion, generator = (
        config.model.detector,
        config.model.dense_motion,
        config.model.generator,
    )
    assert config.model.num_keypoints == 10
    assert (detector.block_expansion, detector.max_features, detector.num_blocks) == (32, 1024, 5)
    assert (motion.block_expansion, motion.max_features, motion.num_blocks) == (64, 1024, 5)
    assert (generator.block_expansion, generator.num_down_blocks) == (64, 2)
    assert generator.num_bottleneck_blocks == 6
    assert {detector.scale_factor, motion.scale_factor} == {0.25}
    assert not detector.single_jacobian_map
    assert config.discriminator.use_keypoints
    assert not config.discriminator.patch_spectral_norm
    assert config.discriminator.patch_block_expansion == 32
    with torch.device("meta"):
        animator, discriminator = build_animator(config.model), build_discriminator(config)
    shapes_only = {
        key: tensor if key.endswith("down.weight") else tensor.to("meta")
        for key, tensor in model.weights.items()
    }
    load_weights(model._replace(weights=shapes_only), animator, discriminator, "vox")


# Variants of the architecture


def test_single_jacobian_map_is_detected(published: Published, tmp_path: Path) -> None:
    detector = published["kp_detector"]
    for name in ("jacobian.weight", "jacobian.bias"):
        detector[name] = detector[name][:4].clone()
    model = read_reference(write(published, tmp_path))
    assert model.config.kp_detector_params.single_jacobian_map
    build(model)


def test_detector_without_jacobians_gives_the_identity(
    published: Published, tmp_path: Path
) -> None:
    detector = published["kp_detector"]
    del detector["jacobian.weight"], detector["jacobian.bias"]
    model = read_reference(write(published, tmp_path))
    assert "identity" in model.notes[-1]
    animator, _ = build(model)
    jacobian = animator.eval().detector(torch.rand(1, 3, 40, 40)).jacobian
    torch.testing.assert_close(jacobian, torch.eye(2).expand_as(jacobian))


def test_network_without_downsampling_is_reported(published: Published, tmp_path: Path) -> None:
    del published["kp_detector"]["down.weight"]
    del published["generator"]["dense_motion_network.down.weight"]
    model = read_reference(write(published, tmp_path))
    assert "scale_factor 1" in model.notes[-1]
    build(model)


def test_one_missing_kernel_is_a_missing_key(published: Published, tmp_path: Path) -> None:
    del published["kp_detector"]["down.weight"]
    with pytest.raises(UserError, match=r"1 keys differ: missing kp_detector\.down\.weight$"):
        import_checkpoint(write(published, tmp_path), tmp_path / "run")


def test_discriminator_without_keypoints_is_detected(published: Published, tmp_path: Path) -> None:
    first = published["discriminator"]["discs.1.down_blocks.0.conv.weight"]
    published["discriminator"]["discs.1.down_blocks.0.conv.weight"] = first[:, :3].clone()
    model = read_reference(write(published, tmp_path))
    assert not model.config.discriminator_params.use_kp
    build(model)


def normalise_spectrally(published: Published) -> None:
    """Spectral norms as PyTorch's older implementation stores them, converged."""
    weights = published["discriminator"]
    for key in [key for key in weights if key.endswith("conv.weight")]:
        weight = weights.pop(key)
        u, _, v = torch.linalg.svd(weight.flatten(1), full_matrices=False)
        weights |= {f"{key}_orig": weight, f"{key}_u": u[:, 0].clone(), f"{key}_v": v[0].clone()}


def test_spectral_norms_divide_by_the_largest_singular_value(
    published: Published, tmp_path: Path
) -> None:
    plain = build(read_reference(write(published, tmp_path)))[1].eval()
    normalise_spectrally(published)
    model = read_reference(write(published, tmp_path))
    assert model.config.discriminator_params.sn
    normalised = build(model)[1].eval()
    image, keypoints = torch.rand(1, 3, 40, 40), torch.zeros(1, 5, 2)
    conv = plain.down_blocks[0].conv
    with torch.no_grad():
        conv.weight /= torch.linalg.matrix_norm(conv.weight.flatten(1), ord=2)
        expected = plain(image, keypoints).features[0]
        torch.testing.assert_close(normalised(image, keypoints).features[0], expected)


def test_spectral_norms_of_old_pytorch_keep_their_weight(
    published: Published, tmp_path: Path
) -> None:
    """Before PyTorch 1.1, the normalised weight and u were stored, but not v."""
    normalise_spectrally(published)
    today = build(read_reference(write(published, tmp_path)))[1].eval()
    weights = published["discriminator"]
    for key in [key for key in weights if key.endswith("_v")]:
        v, name = weights.pop(key), key.removesuffix("_v")
        matrix = weights[f"{name}_orig"].flatten(1)
        weights[name] = weights[f"{name}_orig"] / (weights[f"{name}_u"] @ matrix @ v)
    old = build(read_reference(write(published, tmp_path)))[1].eval()
    image, keypoints = torch.rand(1, 3, 40, 40), torch.zeros(1, 5, 2)
    with torch.no_grad():
        torch.testing.assert_close(old(image, keypoints), today(image, keypoints))


# What does not fit is named


SIZE_GIVING = (
    "kp_detector.kp.weight",
    "kp_detector.predictor.decoder.up_blocks.1.conv.weight",
    "generator.first.conv.weight",
    "generator.dense_motion_network.hourglass.decoder.up_blocks.1.conv.weight",
    "discriminator.discs.1.down_blocks.0.conv.weight",
)
ORDINARY = (
    "kp_detector.jacobian.bias",
    "kp_detector.jacobian.weight",
    "generator.final.bias",
    "generator.bottleneck.r1.norm2.running_var",
    "generator.dense_motion_network.occlusion.weight",
    "discriminator.discs.1.down_blocks.1.norm.weight",
    "discriminator.discs.1.conv.weight",
)


@pytest.mark.parametrize("key", [*SIZE_GIVING, *ORDINARY])
def test_missing_key_is_named(published: Published, tmp_path: Path, key: str) -> None:
    network, _, name = key.partition(".")
    del published[network][name]
    with pytest.raises(UserError, match=f"missing {re.escape(key)}"):
        build(read_reference(write(published, tmp_path)))


def test_one_error_names_all_wrong_keys(published: Published, tmp_path: Path) -> None:
    generator = published["generator"]
    del generator["final.bias"]
    generator["extra"] = torch.zeros(1)
    generator["final.weight"] = torch.zeros(4, 4, 7, 7)
    with pytest.raises(UserError) as raised:
        import_checkpoint(write(published, tmp_path), tmp_path / "run")
    message = str(raised.value)
    assert "3 keys differ" in message
    assert "missing generator.final.bias" in message
    assert "unknown generator.extra" in message
    assert "misshapen generator.final.weight [4, 4, 7, 7] (not [3, 4, 7, 7])" in message
    assert "\n" not in message
    assert not (tmp_path / "run").exists()


def test_many_wrong_keys_are_counted(published: Published, tmp_path: Path) -> None:
    published["generator"] |= {f"extra{i}": torch.zeros(1) for i in range(25)}
    with pytest.raises(UserError, match=r"25 keys differ: .*extra9 and 15 more$") as raised:
        import_checkpoint(write(published, tmp_path), tmp_path / "run")
    assert str(raised.value).count("unknown") == 10


def test_another_anti_alias_kernel_is_rejected(published: Published, tmp_path: Path) -> None:
    published["kp_detector"]["down.weight"] *= 1.01
    with pytest.raises(UserError, match=r"kp_detector\.down\.weight is not the Gaussian"):
        import_checkpoint(write(published, tmp_path), tmp_path / "run")


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda entries: entries.pop("kp_detector"), "missing kp_detector"),
        (lambda entries: entries.pop("generator"), "missing generator"),
        (lambda entries: entries.update(bogus=1), "unknown bogus"),
        (lambda entries: entries["generator"].update(rate=0.1), "unknown generator.rate"),
    ],
)
def test_entries_of_another_layout_are_named(
    published: Published, tmp_path: Path, change: Callable[[Published], object], expected: str
) -> None:
    change(published)
    with pytest.raises(UserError, match=f"1 keys differ: {expected}$"):
        read_reference(write(published, tmp_path))


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path("evil"),))


def test_code_in_a_pickle_does_not_run(
    published: Published, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="would run code"):
        read_reference(write(published | {"epoch": Evil()}, tmp_path))
    assert not Path("evil").exists()


@pytest.mark.parametrize("suffix", [".pth.tar", ".safetensors"])
def test_other_files_are_rejected_on_one_line(tmp_path: Path, suffix: str) -> None:
    file = tmp_path / f"notes{suffix}"
    with pytest.raises(UserError, match="no such file"):
        read_reference(file)
    file.write_text("no checkpoint\n")
    with pytest.raises(UserError) as raised:
        read_reference(file)
    assert str(file) in str(raised.value)
    assert "\n" not in str(raised.value)
    with pytest.raises(UserError, match="contains a list"):
        read_reference(write([1, 2], tmp_path))


def test_a_run_is_not_overwritten(tmp_path: Path) -> None:
    import_checkpoint(rewrite_golden(tmp_path), tmp_path)
    with pytest.raises(UserError, match="already holds a run"):
        import_checkpoint(rewrite_golden(tmp_path), tmp_path)


def test_unsupported_frame_size_is_rejected(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"data\.size=40"):
        import_checkpoint(GOLDEN, tmp_path / "run")


def test_unsupported_config_is_rejected(tmp_path: Path) -> None:
    def two_scales(config: dict[str, Any]) -> None:
        config["discriminator_params"]["scales"] = [1, 0.5]

    with pytest.raises(UserError, match=r"discriminator_params\.scales"):
        read_reference(rewrite_golden(tmp_path, two_scales))


def test_unknown_option_of_a_config_is_rejected(tmp_path: Path) -> None:
    def rename(config: dict[str, Any]) -> None:
        config["kp_detector_params"]["warmth"] = 1

    with pytest.raises(UserError, match=r"kp_detector_params\.warmth"):
        read_reference(rewrite_golden(tmp_path, rename))


def test_config_that_contradicts_the_weights_is_rejected(tmp_path: Path) -> None:
    def full_size(config: dict[str, Any]) -> None:
        del config["kp_detector_params"]["scale_factor"]  # the reference's own default is 1

    with pytest.raises(UserError, match=r"unknown kp_detector\.down\.weight$"):
        import_checkpoint(rewrite_golden(tmp_path, full_size), tmp_path / "run")


def test_config_without_jacobians_rejects_jacobian_weights(tmp_path: Path) -> None:
    def no_jacobian(config: dict[str, Any]) -> None:
        config["common_params"]["estimate_jacobian"] = False

    def drop(tensors: dict[str, Tensor]) -> None:
        for name in ("weight", "bias"):
            del tensors[f"weights/kp_detector.jacobian.{name}"]

    build(read_reference(rewrite_golden(tmp_path, no_jacobian, drop)))
    with pytest.raises(UserError, match=r"2 keys differ: unknown kp_detector\.jacobian\.bias"):
        build(read_reference(rewrite_golden(tmp_path, no_jacobian)))
