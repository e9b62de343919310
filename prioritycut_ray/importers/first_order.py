"""Import weights of the public First Order Motion implementation (method §1, §3).

Reads its published checkpoints, and safetensors files that hold ``weights/…`` under the same names
and the reference's configuration.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import safe_open
from torch import Tensor, nn

from prioritycut_ray.config import (
    Config,
    DenseMotionConfig,
    DetectorConfig,
    DiscriminatorConfig,
    FirstOrderConfig,
    GeneratorConfig,
    parse_config,
)
from prioritycut_ray.errors import UserError, describe
from prioritycut_ray.importers.published import (
    FIRST_ORDER,
    ImportReport,
    Shapes,
    as_today,
    check_family,
    check_new_run,
    load_networks,
    perceptual_scales,
    read_published,
    save_run,
)
from prioritycut_ray.models.animator import Animator
from prioritycut_ray.models.discriminators import Discriminator
from prioritycut_ray.storage.tensors import read_tensors
from prioritycut_ray.training.state import new_state
from prioritycut_ray.validation import describe_problems

PUBLISHED_SIZE = 256
PUBLISHED_TEMPERATURE = 0.1
_JACOBIAN = ("kp_detector.jacobian.weight", "kp_detector.jacobian.bias")

Exactly1 = Annotated[float, Field(ge=1, le=1)]
KeypointVariance = Annotated[float, Field(ge=0.01, le=0.01)]


class _Section(BaseModel):
    """A section of the reference's configuration, with the defaults of its constructors.

    Unknown keys, and values that our modules do not support, are errors.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")


class _Common(_Section):
    num_kp: int
    num_channels: Literal[3] = 3
    estimate_jacobian: bool = False


class _Hourglass(_Section):
    block_expansion: int
    max_features: int
    num_blocks: int
    scale_factor: float = 1.0


class _Detector(_Hourglass):
    temperature: float
    single_jacobian_map: bool = False
    pad: Literal[0] = 0


class _DenseMotion(_Hourglass):
    kp_variance: KeypointVariance = 0.01


class _Generator(_Section):
    block_expansion: int
    max_features: int
    num_down_blocks: int
    num_bottleneck_blocks: int
    estimate_occlusion_map: Literal[True]
    dense_motion_params: _DenseMotion


class _Discriminator(_Section):
    scales: tuple[Exactly1] = (1.0,)
    block_expansion: int = 64
    max_features: int = 512
    num_blocks: int = 4
    sn: bool = False
    use_kp: bool = False
    kp_variance: KeypointVariance = 0.01


class ReferenceConfig(BaseModel):
    """``model_params`` of the reference's configuration files; its other sections are ignored."""

    model_config = ConfigDict(frozen=True)

    common_params: _Common
    kp_detector_params: _Detector
    generator_params: _Generator
    discriminator_params: _Discriminator


class ReferenceModel(NamedTuple):
    """A trained model as the reference stores it.

    Attributes:
        weights: tensors by ``network.name``, for the networks of the layout.
        config: configuration in the file, or inferred from the shapes of the weights.
        size: side of the frames in pixels.
        notes: assumptions about what the file does not contain, in sentences.
    """

    weights: dict[str, Tensor]
    config: ReferenceConfig
    size: int
    notes: tuple[str, ...]


def import_checkpoint(file: Path, out: Path) -> ImportReport:
    """Turn a checkpoint of First Order Motion into a run that can animate, evaluate and train.

    Args:
        file: a published checkpoint, or a safetensors file for :func:`read_reference`.
        out: folder of the run; the checkpoint becomes its step 0.

    Raises:
        UserError: the file is not such a checkpoint, its keys do not match, or ``out`` is a run.
    """
    check_new_run(out)
    model = read_reference(file)
    config = run_config(model, out)
    state = new_state(config, torch.device("cpu"))
    load_weights(model, state.animator, state.discriminator, str(file))
    return save_run(state, config, out, model.notes)


def read_reference(file: Path) -> ReferenceModel:
    """Read a model of the reference, without running code of a pickle.

    Args:
        file: ``.safetensors`` with tensors ``weights/{network}.{name}`` and metadata ``config``
            (the reference's ``model_params`` as JSON) and ``size``; or a pickle of the published
            layout, a dict with ``generator``, ``kp_detector`` and optionally ``discriminator``,
            optimisers and epoch. Half precision and the ``module.`` prefix of DataParallel are
            converted.

    Raises:
        UserError: the file is neither.
    """
    return _read_safetensors(file) if file.suffix == ".safetensors" else _read_pickle(file)


def _read_safetensors(file: Path) -> ReferenceModel:
    tensors = read_tensors(file)
    check_family(tensors, file, FIRST_ORDER)
    weights = {
        key.removeprefix("weights/"): tensor
        for key, tensor in tensors.items()
        if key.startswith("weights/")
    }
    with safe_open(file, framework="pt") as opened:
        metadata = opened.metadata() or {}
    try:
        config = ReferenceConfig.model_validate(json.loads(metadata["config"]))
        size = int(metadata["size"])
    except ValidationError as error:
        raise UserError(
            f"{file}: the config of the model is not supported: "
            f"{describe_problems(error, ReferenceConfig)}"
        ) from error
    except (KeyError, ValueError) as error:
        raise UserError(
            f"{file}: a .safetensors file of First Order Motion must have the metadata config and "
            f"size ({describe(error)})"
        ) from error
    weights, notes = as_today(weights, FIRST_ORDER)
    return ReferenceModel(_complete_spectral_norms(weights), config, size, notes)


def _read_pickle(file: Path) -> ReferenceModel:
    weights, changes = read_published(file, FIRST_ORDER)
    weights = _complete_spectral_norms(weights)
    config, notes = _infer_config(Shapes(weights, FIRST_ORDER, str(file)))
    return ReferenceModel(weights, config, PUBLISHED_SIZE, (*notes, *changes))


def _complete_spectral_norms(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Convert spectral norms of PyTorch before 1.1 to the present layout.

    They stored the normalised weight W = W_orig/σ and u, but not v, which follows from
    u = W_orig v/σ.
    """
    weights = dict(weights)
    for key in [key for key in weights if key.endswith(".weight_orig")]:
        name = key.removesuffix("_orig")
        if name in weights and f"{name}_u" in weights and f"{name}_v" not in weights:
            matrix = weights[key].flatten(1)
            sigma = matrix.norm() / weights.pop(name).norm()
            weights[f"{name}_v"] = torch.linalg.pinv(matrix) @ weights[f"{name}_u"] * sigma
    return weights


def _infer_config(shapes: Shapes) -> tuple[ReferenceConfig, tuple[str, ...]]:
    """Infer the sizes of the networks from the shapes of their weights.

    Returns:
        The configuration, and notes on what was assumed.
    """
    notes = [
        f"the file does not contain the frame size and the detector's temperature: assuming the "
        f"published values {PUBLISHED_SIZE} and {PUBLISHED_TEMPERATURE}"
    ]
    weights = shapes.weights
    keypoints = shapes.channels("kp_detector.kp.weight")
    jacobian = weights.get("kp_detector.jacobian.weight")
    estimates = any(key.startswith("kp_detector.jacobian.") for key in weights)
    detector, motion = shapes.scale("kp_detector"), shapes.scale("generator.dense_motion_network")
    if detector is None and motion is None:
        notes.append("neither network has a down.weight: assuming scale_factor 1")
    config = {
        "common_params": {"num_kp": keypoints, "estimate_jacobian": estimates},
        "kp_detector_params": {
            **shapes.hourglass("kp_detector.predictor"),
            # If one network lacks a down.weight, the other's scale makes it a missing key.
            "scale_factor": detector or motion or 1.0,
            "temperature": PUBLISHED_TEMPERATURE,
            "single_jacobian_map": jacobian is not None and jacobian.shape[:1] != (4 * keypoints,),
        },
        "generator_params": {
            "block_expansion": shapes.channels("generator.first.conv.weight"),
            "max_features": shapes.widest("generator.down_blocks."),
            "num_down_blocks": shapes.count("generator.down_blocks."),
            "num_bottleneck_blocks": shapes.count("generator.bottleneck.r"),
            "estimate_occlusion_map": True,
            "dense_motion_params": {
                **shapes.hourglass("generator.dense_motion_network.hourglass"),
                "scale_factor": motion or detector or 1.0,
            },
        },
        "discriminator_params": _infer_discriminator(shapes, keypoints),
    }
    if not estimates:
        notes.append("the detector estimates no jacobians: using the identity")
    return ReferenceConfig.model_validate(config), tuple(notes)


def _infer_discriminator(shapes: Shapes, keypoints: int) -> dict[str, Any]:
    prefix = "discriminator.discs.1.down_blocks."
    if not any(key.startswith("discriminator.") for key in shapes.weights):
        return {}
    sn = f"{prefix}0.conv.weight_orig" in shapes.weights
    first = f"{prefix}0.conv.{'weight_orig' if sn else 'weight'}"
    return {
        "block_expansion": -(-shapes.channels(first) // 2),
        "max_features": shapes.widest(prefix),
        "num_blocks": shapes.count(prefix),
        "sn": sn,
        "use_kp": shapes.weights[first].shape[1] == 3 + keypoints,
    }


def run_config(model: ReferenceModel, out: Path) -> Config:
    """Return our configuration for a model of the reference, as a run in the folder ``out``.

    Raises:
        UserError: the sizes do not fit together, or ``out`` is not a valid name of a run.
    """
    tree = {
        "name": out.absolute().name,
        "storage": str(out.absolute().parent),
        "data": {"size": model.size},
        "model": animator_config(model.config).model_dump(),
        "discriminator": discriminator_config(model.config).model_dump(),
        "priority_cut": None,
        "loss": {"perceptual": {"scales": perceptual_scales(model.size)}},
    }
    return parse_config(tree, str(out))


def animator_config(reference: ReferenceConfig) -> FirstOrderConfig:
    """Return the sizes of detector, dense motion and generator."""
    detector, generator = reference.kp_detector_params, reference.generator_params
    motion = generator.dense_motion_params
    return FirstOrderConfig(
        num_keypoints=reference.common_params.num_kp,
        detector=DetectorConfig(**detector.model_dump(exclude={"pad"})),
        dense_motion=DenseMotionConfig(**motion.model_dump(exclude={"kp_variance"})),
        generator=GeneratorConfig(
            **generator.model_dump(exclude={"dense_motion_params", "estimate_occlusion_map"})
        ),
    )


def discriminator_config(reference: ReferenceConfig) -> DiscriminatorConfig:
    """Return the sizes of the patch discriminator."""
    options = reference.discriminator_params
    return DiscriminatorConfig(
        kind="patch",
        use_keypoints=options.use_kp,
        max_features=options.max_features,
        patch_block_expansion=options.block_expansion,
        patch_num_blocks=options.num_blocks,
        patch_spectral_norm=options.sn,
    )


def load_weights(
    model: ReferenceModel, animator: Animator, discriminator: Discriminator | None, source: str
) -> None:
    """Load a model of the reference into fresh networks of the same sizes.

    If the reference estimates no jacobians, the detector keeps its fresh jacobian layer, which
    gives the identity (method §1).

    Raises:
        UserError: keys are missing or unknown, or have wrong shapes, NaN or infinite values; names
            ``source`` and the keys.
    """
    networks: list[tuple[nn.Module, Callable[[str], str]]] = [(animator, _animator_key)]
    if discriminator and any(key.startswith("discriminator.") for key in model.weights):
        networks.append((discriminator, _discriminator_key))
    detector, generator = model.config.kp_detector_params, model.config.generator_params
    load_networks(
        Shapes(model.weights, FIRST_ORDER, source),
        networks,
        scales={
            "kp_detector": detector.scale_factor,
            "generator.dense_motion_network": generator.dense_motion_params.scale_factor,
        },
        fresh=() if model.config.common_params.estimate_jacobian else _JACOBIAN,
    )


def _animator_key(name: str) -> str:
    """Return the reference's key for a tensor of our animator."""
    network, _, rest = name.partition(".")
    prefixes = {"detector": "kp_detector", "dense_motion": "generator.dense_motion_network"}
    return f"{prefixes.get(network, network)}.{rest}"


def _discriminator_key(name: str) -> str:
    """Return the reference's key for a tensor of our discriminator, which works at scale 1."""
    return f"discriminator.discs.1.{name}"
