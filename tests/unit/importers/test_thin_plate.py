"""Checkpoints of the public Thin-Plate Spline Motion Model become runs; errors name keys."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from prioritycut_ray.config import Config, ThinPlateConfig
from prioritycut_ray.data.puppets import render_clip
from prioritycut_ray.errors import UserError
from prioritycut_ray.importers import first_order
from prioritycut_ray.importers.published import THIN_PLATE
from prioritycut_ray.importers.thin_plate import (
    PublishedModel,
    import_checkpoint,
    load_weights,
    read_model,
    run_config,
)
from prioritycut_ray.models.blocks import gaussian_kernel
from prioritycut_ray.models.keypoints import Keypoints
from prioritycut_ray.models.thin_plate.resnet import BackgroundMotion, PointDetector
from prioritycut_ray.networks import build_animator
from prioritycut_ray.runs.locate import find_checkpoint
from prioritycut_ray.training.checkpoint import load_animator
from prioritycut_ray.video.encoding import write_video
from tests.clip_sets import write_set
from tests.conftest import Prioritycut, assert_one_line
from tests.golden import golden_files
from tests.places import DATA
from tests.unit.importers.test_first_order import write
from tests.unit.models.thin_plate.test_parity import Golden, by_formula, load
from tests.unit.test_reference_parity import distance

CPU = torch.device("cpu")

Published = dict[str, Any]

PREFIXES = {
    "detector": "kp_detector",
    "dense_motion": "dense_motion_network",
    "inpainting": "inpainting_network",
    "background": "bg_predictor",
}


def kernel(scale: float) -> Tensor:
    """The anti-alias kernel that a checkpoint holds."""
    line = gaussian_kernel(scale)
    return torch.outer(line, line).repeat(3, 1, 1, 1)


def published_golden(golden: Golden) -> Published:
    """The published layout of a golden file's networks."""
    entries: Published = {
        network: {
            name.removeprefix(f"weights/{network}."): tensor
            for name, tensor in golden.tensors.items()
            if name.startswith(f"weights/{network}.")
        }
        for network in ("dense_motion_network", "inpainting_network")
    }
    detector = PointDetector(golden.num_splines)
    by_formula(detector.fg_encoder, "fc")
    entries["kp_detector"] = detector.state_dict()
    if "background/source_to_driving" in golden.tensors:
        background = BackgroundMotion()
        by_formula(background.bg_encoder, "fc")
        background.bg_encoder.fc.bias.data += torch.tensor([1.0, 0, 0, 0, 1, 0])
        entries["bg_predictor"] = background.state_dict()
    return entries


def published_shapes(config: ThinPlateConfig) -> Published:
    """The published layout of a configuration's networks: its names and shapes, without numbers."""
    entries: Published = {"epoch": 100, "optimizer": {"state": {}, "param_groups": []}}
    with torch.device("meta"):
        animator = build_animator(config)
    for name, tensor in animator.state_dict().items():
        part, _, rest = name.partition(".")
        empty = torch.full((), 0.5, dtype=torch.float32).expand(tensor.shape)
        entries.setdefault(PREFIXES[part], {})[rest] = empty.to(tensor.dtype)
    scale = config.dense_motion.scale_factor
    if scale < 1:
        entries["dense_motion_network"]["down.weight"] = kernel(scale)
    return entries


def sized(**sizes: Any) -> ThinPlateConfig:
    """A small configuration."""
    motion = {"block_expansion": 4, "max_features": 16, "num_blocks": 3, "scale_factor": 0.25}
    return ThinPlateConfig(
        family="thin_plate",
        num_splines=sizes.get("num_splines", 2),
        dense_motion=motion | sizes.get("dense_motion", {}),
        inpainting={"block_expansion": 4, "max_features": 16} | sizes.get("inpainting", {}),
        background=sizes.get("background", True),
    )


@pytest.fixture
def published() -> Published:
    return published_shapes(sized())


def build(published: Published, folder: Path) -> PublishedModel:
    """Read a checkpoint, and load it into networks of its sizes, which take no memory."""
    model = read_model(write(published, folder))
    with torch.device("meta"):
        animator = build_animator(model.config)
    on_meta = {
        key: tensor if key.endswith("down.weight") else tensor.to("meta")
        for key, tensor in model.weights.items()
    }
    load_weights(model._replace(weights=on_meta), animator, "test")
    return model


# What an import makes


@pytest.mark.parametrize("file", golden_files("thin_plate"), ids=lambda file: file.stem)
def test_imported_run_gives_the_numbers_of_the_reference(file: Path, tmp_path: Path) -> None:
    golden = load(file)
    given = golden.tensors
    report = import_checkpoint(
        write(published_golden(golden), tmp_path), tmp_path / "run", size=golden.size
    )
    animator, config = load_animator(find_checkpoint(tmp_path / "run"), CPU)
    assert config == report.config
    source, driving = given["input/source"], given["input/driving"]
    keypoints = Keypoints(given["input/kp_source"]), Keypoints(given["input/kp_driving"])
    background = given.get("input/bg_param")
    with torch.no_grad():
        motion = animator.dense_motion(source, *keypoints, background)
        maps = animator.inpainting.encode(source)
        ours = {
            "detector/kp_source": animator.detect(source).value,
            "detector/kp_driving": animator.detect(driving).value,
            "plain/deformation": motion.deformation,
            "plain/prediction": animator.inpainting.decode(source, maps, motion),
        }
        if background is not None:
            ours["background/source_to_driving"] = animator.background(source, driving)
    for name, tensor in ours.items():
        assert distance(tensor, given[name]) <= 1e-5, name


def test_published_256_model_fits(tmp_path: Path) -> None:
    """Every name and shape of vox-256, without its 350 MB of numbers."""
    shapes = json.loads((DATA / "tps_vox_256_shapes.json").read_text())
    published = {
        network: {name: torch.zeros(()).expand(shape) for name, shape in tensors.items()}
        for network, tensors in shapes.items()
    }
    published["dense_motion_network"]["down.weight"] = kernel(0.25)
    model = build(published | {"epoch": 99}, tmp_path)
    assert model.config == ThinPlateConfig(family="thin_plate")
    assert model.notes == ()


@pytest.mark.parametrize(
    "config",
    [
        sized(),
        sized(num_splines=5, background=False),
        sized(dense_motion={"scale_factor": 1, "num_blocks": 5}),
        sized(dense_motion={"scale_factor": 0.125, "block_expansion": 8}),
        sized(dense_motion={"scale_factor": 0.5, "num_blocks": 4, "max_features": 24}),
        sized(inpainting={"block_expansion": 6, "max_features": 20}),
    ],
)
def test_sizes_are_inferred_from_the_shapes(config: ThinPlateConfig, tmp_path: Path) -> None:
    assert build(published_shapes(config), tmp_path).config == config


def test_the_run_is_trained_as_published(tmp_path: Path) -> None:
    config = run_config(sized(), 384, tmp_path / "ted")
    assert (config.name, config.storage) == ("ted", str(tmp_path))
    assert config.data.size == 384
    assert config.discriminator.kind == "none"
    assert config.priority_cut is None
    assert (config.optim.weight_decay, config.optim.max_grad_norm) == (1e-4, 10)
    assert config.optim.grad_norm == "maximum"


def test_prefix_and_half_precision_are_converted(published: Published, tmp_path: Path) -> None:
    plain = read_model(write(published, tmp_path))
    for network in THIN_PLATE.networks:
        published[network] = {
            f"module.{key}": value.half() if value.is_floating_point() else value
            for key, value in published[network].items()
        }
    model = read_model(write(published, tmp_path))
    assert sum("module." in note for note in model.notes) == 4
    assert "float16" in model.notes[-1]
    assert model.config == plain.config
    assert model.weights.keys() == plain.weights.keys()
    for name, tensor in model.weights.items():
        torch.testing.assert_close(tensor, plain.weights[name], rtol=1e-3, atol=1e-3)


def test_the_avd_network_is_named_and_left(published: Published, tmp_path: Path) -> None:
    published |= {"avd_network": {"id.0.weight": torch.zeros(4)}, "optimizer_avd": {"state": {}}}
    (note,) = read_model(write(published, tmp_path)).notes
    assert note.startswith("omitted the avd_network")


@pytest.mark.parametrize("absent", [None, {}])
def test_without_a_background_network_there_is_none(
    published: Published, tmp_path: Path, absent: object
) -> None:
    published["bg_predictor"] = absent
    model = read_model(write(published, tmp_path))
    assert not model.config.background
    (note,) = model.notes
    assert "no bg_predictor" in note


def test_imported_run_animates_evaluates_and_is_trained_with_priority_cut(
    prioritycut: Prioritycut, tmp_path: Path
) -> None:
    golden = load(golden_files("thin_plate")[0])
    run = import_checkpoint(write(published_golden(golden), tmp_path), tmp_path / "run", size=32)
    data = write_set(str(tmp_path / "data"), clips=2)
    frames = render_clip(0, size=32, frames=3).frames
    write_video(tmp_path / "driving.mp4", frames, 12.0)
    Image.fromarray(frames[0]).save(tmp_path / "source.png")
    commands = [
        "animate run --source source.png --driving driving.mp4 --out out",
        f"evaluate run {data} --split train --workers 0 --out scores",
        f"train {run.checkpoint}/config.yaml name=cut init={tmp_path}/run data.url={data} "
        "discriminator.kind=unet priority_cut.mask=priority "
        "model.motion_dropout.start=0.5 model.motion_dropout.end_samples=2 "
        "train.samples=2 train.batch_size=2 train.workers=0 train.precision=float32 "
        "discriminator.unet_base_channels=4 discriminator.max_features=16 data.loader_workers=0 "
        "loss.perceptual.weights=efficientnet_lite0 loss.perceptual.scales=[1.0]",
    ]
    for command in commands:
        result = prioritycut(*command.split())
        assert result.returncode == 0, result.stderr
    assert len(list((tmp_path / "out").glob("*.png"))) == 3
    assert (tmp_path / "scores" / "report.html").exists()
    trained = find_checkpoint(tmp_path / "cut")
    assert trained.name == "step_0000001"
    assert (trained / "discriminator.safetensors").exists()
    before = load_file(run.checkpoint / "animator.safetensors")
    after = load_file(trained / "animator.safetensors")
    lr = run.config.optim.lr
    # Adam's first step moves a weight by the learning rate; batch counts and statistics move more.
    moved = {name: (after[name] - before[name]).abs().max() for name in after if "fc." in name}
    assert all(0 < change <= 1.01 * lr for change in moved.values()), moved


# What does not fit is named


@pytest.mark.parametrize(
    "key",
    [
        "kp_detector.fg_encoder.fc.weight",
        "kp_detector.fg_encoder.layer4.1.bn2.running_var",
        "bg_predictor.bg_encoder.fc.bias",
        "dense_motion_network.down.weight",
        "dense_motion_network.hourglass.decoder.up_blocks.2.conv.weight",
        "dense_motion_network.up.1.conv.weight",
        "dense_motion_network.occlusion.3.bias",
        "inpainting_network.first.conv.weight",
        "inpainting_network.resblock.5.norm2.bias",
    ],
)
def test_missing_key_is_named(published: Published, tmp_path: Path, key: str) -> None:
    network, _, name = key.partition(".")
    del published[network][name]
    with pytest.raises(UserError, match=f"1 keys differ: missing {re.escape(key)}$"):
        build(published, tmp_path)


def test_counts_of_batches_may_be_missing(published: Published, tmp_path: Path) -> None:
    del published["kp_detector"]["fg_encoder.bn1.num_batches_tracked"]
    build(published, tmp_path)


def test_one_error_names_all_wrong_keys(published: Published, tmp_path: Path) -> None:
    inpainting = published["inpainting_network"]
    del inpainting["final.bias"]
    inpainting["extra"] = torch.zeros(1)
    published["dense_motion_network"]["maps.bias"] = torch.zeros(7)
    with pytest.raises(UserError) as raised:
        import_checkpoint(write(published, tmp_path), tmp_path / "run", size=64)
    message = str(raised.value)
    assert "model of the Thin-Plate Spline Motion Model: 3 keys differ: " in message
    assert "missing inpainting_network.final.bias" in message
    assert "unknown inpainting_network.extra" in message
    assert "misshapen dense_motion_network.maps.bias [7] (not [3])" in message
    assert "\n" not in message
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda entries: entries.pop("kp_detector"), "missing kp_detector"),
        (lambda entries: entries.pop("inpainting_network"), "missing inpainting_network"),
        (lambda entries: entries.update(bogus=1), "unknown bogus"),
        (lambda entries: entries.update(bg_predictor=[1]), r"misshapen bg_predictor \(not a dict"),
        (
            lambda entries: entries["kp_detector"].update(
                {"fg_encoder.fc.weight": torch.zeros(())}
            ),
            r"misshapen kp_detector.fg_encoder.fc.weight \[\]",
        ),
    ],
)
def test_entries_of_another_layout_are_named(
    published: Published, tmp_path: Path, change: Callable[[Published], object], expected: str
) -> None:
    change(published)
    with pytest.raises(UserError, match=f"1 keys differ: {expected}"):
        read_model(write(published, tmp_path))


def test_nan_is_refused(published: Published, tmp_path: Path) -> None:
    published["inpainting_network"]["final.bias"] = torch.tensor([0.0, torch.nan, 0.0])
    with pytest.raises(UserError, match=r"NaN or infinite: inpainting_network\.final\.bias"):
        import_checkpoint(write(published, tmp_path), tmp_path / "run", size=64)
    assert not (tmp_path / "run").exists()


def test_another_anti_alias_kernel_is_rejected(published: Published, tmp_path: Path) -> None:
    published["dense_motion_network"]["down.weight"] *= 1.01
    with pytest.raises(UserError, match=r"dense_motion_network\.down\.weight is not the Gaussian"):
        build(published, tmp_path)


def test_a_checkpoint_of_the_other_family_is_recognised(
    published: Published, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=r"Thin-Plate Spline.*`prioritycut import-tpsmm`$"):
        first_order.read_reference(write(published, tmp_path))
    with pytest.raises(UserError, match=r"Thin-Plate Spline.*`prioritycut import-tpsmm`$"):
        first_order.read_reference(golden_files("thin_plate")[0])
    other = {"generator": {}, "kp_detector": {}, "discriminator": {}, "epoch": 1}
    with pytest.raises(UserError, match=r"First Order Motion.*`prioritycut import-fomm`$"):
        read_model(write(other, tmp_path))


# The command


def test_the_command_imports_and_says_how_to_train(
    prioritycut: Prioritycut, tmp_path: Path, published: Published
) -> None:
    file = write(published, tmp_path)
    result = prioritycut("import-tpsmm", str(file), "--out", "runs/ted", "--size", "384")
    assert result.returncode == 0, result.stderr
    assert "note: the file does not contain the frame size: assuming 384" in result.stdout
    assert "Train: prioritycut train runs/ted/step_0000000/config.yaml data.url=DATA" in (
        result.stdout
    )
    again = prioritycut("import-tpsmm", str(file), "--out", "runs/ted")
    assert_one_line(again, "runs/ted", "already holds a run")
    odd = prioritycut("import-tpsmm", str(file), "--out", "runs/odd", "--size", "100")
    assert_one_line(odd, "data.size", "32")
    swapped = prioritycut("import-fomm", str(file), "--out", "runs/odd")
    assert_one_line(swapped, str(file), "prioritycut import-tpsmm")
    assert not (tmp_path / "runs" / "odd").exists()


def test_an_imported_configuration_is_read_back(tmp_path: Path) -> None:
    config = run_config(sized(), 256, tmp_path / "run")
    assert Config.model_validate(config.model_dump(mode="json")) == config
