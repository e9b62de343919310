"""The thin-plate family reproduces the numbers of the public Thin-Plate Spline Motion Model.

A golden file holds weights, inputs and outputs of that implementation. Besides the one in
tests/data, every file of that family in the folder that PRIORITYCUT_GOLDEN names is reproduced.
"""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn

from prioritycut_ray import losses
from prioritycut_ray.equivariance import ThinPlateSpline, transform_frame, transform_points
from prioritycut_ray.models.keypoints import Keypoints, moved_keypoints, movement_scale
from prioritycut_ray.models.sampling import warp_by_each
from prioritycut_ray.models.thin_plate.dense_motion import (
    DenseMotion,
    DenseMotionNetwork,
    Dropout,
    all_motions,
    warp,
)
from prioritycut_ray.models.thin_plate.inpainting import InpaintingNetwork, warp_distance
from prioritycut_ray.models.thin_plate.resnet import (
    BackgroundMotion,
    PointDetector,
    background_distance,
)
from tests.golden import golden_files
from tests.unit.test_reference_parity import distance

INPUTS = (
    *("weights/", "input/", "animate/source", "animate/driving"),
    *("equivariance/kp", "equivariance/theta", "equivariance/control_params"),
)
ALWAYS = {
    *(
        f"{mode}/{name}"
        for mode in ("plain", "dropout")
        for name in (
            *("contribution_maps", "deformation", "deformed", "deformed_source", "prediction"),
            *(f"occlusion_map_{place}" for place in range(4)),
            *(f"warped_encoder_map_{place}" for place in range(4)),
            *(f"driving_encoder_map_{place}" for place in range(4)),
            "loss.warp_unweighted",
        )
    ),
    *("detector/kp_source", "detector/kp_driving", "spline/grid", "animate/relative"),
    *("equivariance/frame", "equivariance/warped_kp", "equivariance/loss.value_unweighted"),
    "plain/loss.l1_plus_warp",
}
"""Outputs that every file must contain."""


class Golden(NamedTuple):
    tensors: dict[str, Tensor]
    size: int
    num_splines: int
    dropout_rate: float
    dense_motion: DenseMotionNetwork
    inpainting: InpaintingNetwork


def load(file: Path) -> Golden:
    with safe_open(file, framework="pt") as opened:
        facts = opened.metadata()
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    motion = json.loads(facts["dense_motion"])
    paint = json.loads(facts["inpainting"])
    assert paint.pop("num_down_blocks") == 3
    splines = int(facts["num_tps"])
    dense_motion = DenseMotionNetwork(
        num_splines=splines, scale_factor=float(facts["scale_factor"]), **motion
    )
    inpainting = InpaintingNetwork(**paint)
    for name, network in (
        ("dense_motion_network", dense_motion),
        ("inpainting_network", inpainting),
    ):
        prefix = f"weights/{name}."
        own = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
        own.pop("down.weight", None)  # computed
        network.load_state_dict(own)
    rate = float(facts["dropout_p"])
    return Golden(tensors, int(facts["size"]), splines, rate, dense_motion, inpainting)


def by_formula(network: nn.Module, last: str) -> None:
    """Fill a ResNet with the numbers that the file's note describes."""
    state = network.state_dict()
    for place, name in enumerate(sorted(state)):
        tensor = state[name]
        k = torch.arange(tensor.numel(), dtype=torch.float64)
        s = torch.sin(0.731 * k + 1.7 * place).view(tensor.shape)
        if name.endswith("num_batches_tracked"):
            continue
        if name.endswith("running_var") or (tensor.ndim == 1 and name.endswith("weight")):
            value = 1 + 0.1 * s
        elif tensor.ndim == 1:
            value = 0.1 * s
        elif name == f"{last}.weight":
            value = 0.02 * s
        else:
            value = s * math.sqrt(2 / tensor[0].numel())
        tensor.copy_(value)
    network.eval()


def reproduce(file: Path) -> Iterator[tuple[str, Tensor]]:
    """Everything that a golden file may contain, computed by us from its inputs."""
    golden = load(file)
    given = golden.tensors
    detector = PointDetector(golden.num_splines)
    by_formula(detector.fg_encoder, "fc")
    for frame in ("source", "driving"):
        yield f"detector/kp_{frame}", detector(given[f"input/{frame}"]).value
    if "background/source_to_driving" in given:
        background = BackgroundMotion()
        by_formula(background.bg_encoder, "fc")
        background.bg_encoder.fc.bias.data += torch.tensor([1.0, 0, 0, 0, 1, 0])
        source, driving = given["input/source"], given["input/driving"]
        yield "background/driving_to_source", background(driving, source)
        yield "background/source_to_driving", background(source, driving)
        yield (
            "loss/bg_unweighted",
            background_distance(given["input/bg_param"], given["input/bg_param_reverse"]),
        )
    yield from motion_and_prediction(golden, "plain", None)
    uniform = given["input/dropout_uniform"]
    yield from motion_and_prediction(golden, "dropout", Dropout(uniform, golden.dropout_rate))
    transform = ThinPlateSpline(
        given["equivariance/theta"], given["equivariance/control_params"].squeeze(1), euclidean=True
    )
    transformed = Keypoints(given["equivariance/kp"])
    yield "equivariance/frame", transform_frame(transform, given["input/driving"])
    yield "equivariance/warped_kp", transform_points(transform, transformed.value)
    source = Keypoints(given["input/kp_source"])
    loss = losses.equivariance_value(transformed, source, transform)
    yield "equivariance/loss.value_unweighted", loss
    keypoints = [Keypoints(given[f"animate/{n}"]) for n in ("source", "driving", "driving0")]
    scale = movement_scale(keypoints[0], keypoints[2])
    yield "animate/relative", moved_keypoints(*keypoints, scale).value


def motion_and_prediction(
    golden: Golden, mode: str, dropout: Dropout | None
) -> Iterator[tuple[str, Tensor]]:
    given = golden.tensors
    source, driving = given["input/source"], given["input/driving"]
    keypoints = Keypoints(given["input/kp_source"]), Keypoints(given["input/kp_driving"])
    background = given.get("input/bg_param")
    motion = golden.dense_motion(source, *keypoints, background, dropout)
    maps = golden.inpainting.encode(source)
    driving_maps = golden.inpainting.encode(driving)
    prediction = golden.inpainting.decode(source, maps, motion)
    small = golden.dense_motion.down(source)
    motions = all_motions(*keypoints, background, *small.shape[2:])
    if mode == "plain":
        side = given["spline/grid"].shape[2]
        yield "spline/grid", all_motions(*keypoints, None, side, side)[:, 1:]
    yield f"{mode}/contribution_maps", motion.mask
    yield f"{mode}/deformation", motion.deformation
    yield f"{mode}/deformed", warp(source, motion.deformation)
    yield f"{mode}/deformed_source", warp_by_each(small, motions, align_corners=True)
    for place, occlusion in enumerate(motion.occlusion_maps):
        yield f"{mode}/occlusion_map_{place}", occlusion
        warped = warp(maps[place], motion.deformation) * occlusion
        yield f"{mode}/warped_encoder_map_{place}", warped
        of_driving = driving_maps[place] * occlusion
        yield f"{mode}/driving_encoder_map_{3 - place}", of_driving
    loss = warp_distance(maps, driving_maps, motion)
    yield f"{mode}/loss.warp_unweighted", loss
    yield f"{mode}/prediction", prediction
    if mode == "plain":
        yield "plain/loss.l1_plus_warp", (prediction - driving).abs().mean() + loss
        yield from gradients(golden, motion)


def gradients(golden: Golden, motion: DenseMotion) -> Iterator[tuple[str, Tensor]]:
    """Gradients of mean |D̂ − D| + warp loss, inpainting from the very values of the reference.

    From values that differ in the last bits, some ReLU lets its gradient through in one evaluation
    and not in the other: a difference of up to 1e-2 that says nothing.
    """
    given = golden.tensors
    source, driving = given["input/source"], given["input/driving"]
    same = DenseMotion(
        with_values(motion.deformation, given["plain/deformation"]),
        motion.mask,
        tuple(
            with_values(each, given[f"plain/occlusion_map_{place}"])
            for place, each in enumerate(motion.occlusion_maps)
        ),
    )
    maps, driving_maps = (golden.inpainting.encode(frame) for frame in (source, driving))
    prediction = golden.inpainting.decode(source, maps, same)
    ((prediction - driving).abs().mean() + warp_distance(maps, driving_maps, same)).backward()
    networks = nn.ModuleDict(
        {"dense_motion_network": golden.dense_motion, "inpainting_network": golden.inpainting}
    )
    for name, parameter in networks.named_parameters():
        if f"gradient/{name}" in given:
            assert parameter.grad is not None
            yield f"gradient/{name}", parameter.grad


def with_values(ours: Tensor, theirs: Tensor) -> Tensor:
    """Their values, with our gradient."""
    return theirs + (ours - ours.detach())


@pytest.fixture(scope="module", params=golden_files("thin_plate"), ids=lambda file: file.stem)
def distances(request: pytest.FixtureRequest) -> dict[str, float]:
    """Our distance from every output in a golden file; NaN if we have none."""
    ours = dict(reproduce(request.param))
    return {
        name: distance(ours[name].detach(), tensor) if name in ours else math.nan
        for name, tensor in load(request.param).tensors.items()
        if not name.startswith(INPUTS)
    }


def test_every_output_of_the_file_is_computed(distances: dict[str, float]) -> None:
    assert set(distances) >= ALWAYS
    assert not [name for name, value in distances.items() if math.isnan(value)]


def test_outputs_and_gradients_agree(distances: dict[str, float]) -> None:
    beyond = {
        name: value
        for name, value in distances.items()
        if not value <= (1e-4 if name.startswith("gradient/") else 1e-5)
    }
    assert not beyond
