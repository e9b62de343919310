"""Networks, losses and transforms reproduce the numbers of the public First Order Motion.

A golden file holds weights, inputs and outputs of that implementation. Besides the one in
tests/data, every file of that family in the folder that PRIORITYCUT_GOLDEN names is reproduced.
"""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from prioritycut_ray import losses
from prioritycut_ray.config import Config
from prioritycut_ray.equivariance import ThinPlateSpline, transform_frame, transform_points
from prioritycut_ray.importers.first_order import (
    animator_config,
    discriminator_config,
    load_weights,
    read_reference,
)
from prioritycut_ray.models.animator import Animation, FramePair
from prioritycut_ray.models.blocks import AntiAliasDownsample, warp
from prioritycut_ray.models.discriminators import Discriminator, DiscriminatorOutput
from prioritycut_ray.models.first_order.animator import FirstOrderAnimator
from prioritycut_ray.models.first_order.dense_motion import DenseMotion
from prioritycut_ray.models.keypoints import Keypoints, relative_keypoints
from prioritycut_ray.networks import build_animator, build_discriminator
from tests.golden import golden_files

TOLERANCE = {"eval": 1e-5, "train": 1e-4}
"""Limits of ‖ours − reference‖ / ‖reference‖ in float32; other groups use that of eval."""

INPUTS = (
    "weights/",
    "input/",
    "equivariance/theta",
    "equivariance/control_params",
    "equivariance/kp_value",
    "equivariance/kp_jacobian",
    "animate/source.",
    "animate/driving.",
    "animate/driving0.",
)
"""Inputs in a file; everything else is output of the reference. Loading checks the weights."""

OF_A_MODE = (
    *(f"kp_{frame}.value" for frame in ("source", "driving")),
    *("mask", "occlusion_map", "deformation", "deformed", "prediction"),
    *("disc_real_map", "disc_fake_map", "disc_real_feature_0"),
    *("loss.generator_gan", "loss.discriminator_gan", "loss.feature_matching_unweighted"),
)
ALWAYS = (
    *(f"{mode}/{name}" for mode in ("eval", "train") for name in OF_A_MODE),
    *("equivariance/frame", "equivariance/warped_kp_value", "equivariance/loss.value_unweighted"),
    *("animate/adapt_False.value", "animate/adapt_True.value"),
)
"""Outputs that every file must contain."""


class Golden(NamedTuple):
    tensors: dict[str, Tensor]
    animator: FirstOrderAnimator
    discriminator: Discriminator

    def keypoints(self, name: str) -> Keypoints:
        """``name.value``, and ``name.jacobian`` if the reference estimates it."""
        value = self.tensors[f"{name}value"]
        identity = torch.eye(2).expand(*value.shape, 2)
        return Keypoints(value, self.tensors.get(f"{name}jacobian", identity))


def load(file: Path, mode: str) -> Golden:
    """The file's tensors, and fresh networks of ours with its weights, in a mode."""
    model = read_reference(file)
    # Not validated as a run, whose frames must be multiples of 32 pixels wide.
    config = Config.model_construct(
        model=animator_config(model.config), discriminator=discriminator_config(model.config)
    )
    animator, discriminator = build_animator(config.model), build_discriminator(config)
    load_weights(model, animator, discriminator, str(file))
    with safe_open(file, framework="pt") as opened:
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    training = mode == "train"
    return Golden(tensors, animator.train(training), discriminator.train(training))


def reproduce(file: Path) -> Iterator[tuple[str, Tensor]]:
    """Everything that a golden file may contain, computed by us from its inputs."""
    for mode in ("eval", "train"):
        golden = load(file, mode)
        pair = FramePair(golden.tensors["input/source"], golden.tensors["input/driving"])
        animation, motion = animate(golden.animator, pair)
        yield from under(f"{mode}/", animation_tensors(pair, animation, motion))
        yield from under(f"{mode}/", discriminator_tensors(file, mode, pair.driving, animation))
    golden = load(file, "eval")
    yield from under("equivariance/", equivariance_tensors(golden))
    for adapt in (False, True):
        source, driving, initial = (
            golden.keypoints(f"animate/{name}.") for name in ("source", "driving", "driving0")
        )
        moved = relative_keypoints(source, driving, initial, adapt_scale=adapt)
        yield from under(f"animate/adapt_{adapt}.", moved._asdict())
    for name in golden.tensors:
        group, _, scale = name.partition("/")
        if group == "pyramid":
            yield name, AntiAliasDownsample(float(scale))(golden.tensors["input/source"])


def under(prefix: str, tensors: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    return ((f"{prefix}{name}", tensor) for name, tensor in tensors.items())


def animate(animator: FirstOrderAnimator, pair: FramePair) -> tuple[Animation, DenseMotion]:
    """The animation of a pair, and the dense motion that led to it."""
    motions: list[DenseMotion] = []
    with animator.dense_motion.register_forward_hook(lambda *call: motions.append(call[-1])):
        animation = animator(pair).animation
    [motion] = motions
    return animation, motion


def animation_tensors(
    pair: FramePair, animation: Animation, motion: DenseMotion
) -> dict[str, Tensor]:
    return {
        "prediction": animation.prediction,
        "deformed": warp(pair.source, motion.deformation),
        **motion._asdict(),
        **dict(under("kp_source.", animation.source_keypoints._asdict())),
        **dict(under("kp_driving.", animation.driving_keypoints._asdict())),
    }


def discriminator_tensors(
    file: Path, mode: str, driving: Tensor, animation: Animation
) -> dict[str, Tensor]:
    """The discriminator's outputs.

    Spectral norms in training mode take an iteration in every call, and a golden file does not say
    whether the reference called it for real or fake first. One of the two orders must give all
    outputs.
    """
    answers = []
    for order in (("fake", "real"), ("real", "fake")):
        golden = load(file, mode)
        images = {"real": driving, "fake": animation.prediction}
        keypoints = animation.driving_keypoints.value
        said = {name: golden.discriminator(images[name], keypoints) for name in order}
        answers.append(output_tensors(said["real"], said["fake"]))
    theirs = {name: golden.tensors[f"{mode}/{name}"] for name in ("disc_real_map", "disc_fake_map")}
    return min(answers, key=lambda ours: max(distance(ours[n], theirs[n]) for n in theirs))


def output_tensors(real: DiscriminatorOutput, fake: DiscriminatorOutput) -> dict[str, Tensor]:
    features = {
        f"disc_{name}_feature_{i}": feature
        for name, output in (("real", real), ("fake", fake))
        for i, feature in enumerate(output.features)
    }
    return features | {
        "disc_real_map": real.logits,
        "disc_fake_map": fake.logits,
        "loss.generator_gan": losses.generator_adversarial(fake),
        "loss.discriminator_gan": losses.discriminator_adversarial(real, fake),
        "loss.feature_matching_unweighted": losses.feature_distance(fake.features, real.features),
    }


def equivariance_tensors(golden: Golden) -> dict[str, Tensor]:
    given = golden.tensors
    transform = ThinPlateSpline(
        given["equivariance/theta"], given["equivariance/control_params"].squeeze(1)
    )
    driving = golden.animator.detector(given["input/driving"])
    transformed = golden.keypoints("equivariance/kp_")
    return {
        "frame": transform_frame(transform, given["input/driving"]),
        "warped_kp_value": transform_points(transform, transformed.value),
        "loss.value_unweighted": losses.equivariance_value(driving, transformed, transform),
        "loss.jacobian_unweighted": losses.equivariance_jacobian(driving, transformed, transform),
    }


def distance(ours: Tensor, theirs: Tensor) -> float:
    """‖ours − theirs‖ / ‖theirs‖; a scalar loss is stored with one dimension."""
    ours = ours.view(theirs.shape) if ours.ndim == 0 else ours
    assert ours.shape == theirs.shape
    return float((ours - theirs).norm() / theirs.norm())


@pytest.fixture(scope="module", params=golden_files("first_order"), ids=lambda file: file.stem)
def distances(request: pytest.FixtureRequest) -> dict[str, float]:
    """Our distance from every output in a golden file; NaN if we have none."""
    with torch.no_grad():
        ours = dict(reproduce(request.param))
    theirs = load(request.param, "eval").tensors
    return {
        name: distance(ours[name], tensor) if name in ours else math.nan
        for name, tensor in theirs.items()
        if not name.startswith(INPUTS)
    }


def test_every_output_of_the_file_is_computed(distances: dict[str, float]) -> None:
    assert not [name for name, value in distances.items() if math.isnan(value)]
    assert not [name for name in ALWAYS if name not in distances]


@pytest.mark.parametrize("group", ["eval", "train", "equivariance", "animate", "pyramid"])
def test_parity(distances: dict[str, float], group: str) -> None:
    of_group = {n: value for n, value in distances.items() if n.startswith(f"{group}/")}
    worst = max(of_group, key=lambda name: of_group[name])
    print(f"{group}: worst {worst} {of_group[worst]:.1e}")  # noqa: T201
    limit = TOLERANCE.get(group, TOLERANCE["eval"])
    assert not {name: value for name, value in of_group.items() if not value <= limit}
