"""Import weights of the public First Order Motion implementation (method §1, §3).

Reads its published checkpoints (a pickled dict of state dicts), and safetensors files that hold
``weights/…`` under the same names and the reference's configuration. Our modules use its names, so
a conversion only renames; whatever is dropped or filled in is reported.
"""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
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
    LossConfig,
    parse_config,
)
from prioritycut_ray.errors import UserError, describe
from prioritycut_ray.models.animator import Animator
from prioritycut_ray.models.blocks import gaussian_kernel
from prioritycut_ray.models.discriminators import Discriminator
from prioritycut_ray.runs.checkpoints import STEP_FORMAT
from prioritycut_ray.runs.locate import has_checkpoint
from prioritycut_ray.storage.tensors import not_finite, read_tensors
from prioritycut_ray.training.checkpoint import save_checkpoint
from prioritycut_ray.training.state import new_state
from prioritycut_ray.validation import describe_problems

NETWORKS = ("generator", "kp_detector", "discriminator")
REQUIRED = NETWORKS[:2]
"""What animation needs; only training needs a discriminator."""
PUBLISHED_SIZE = 256
PUBLISHED_TEMPERATURE = 0.1
_LISTED = 10
"""Number of wrong keys that an error message names; the others are counted."""

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
        weights: tensors by ``network.name``, where the network is one of :data:`NETWORKS`.
        config: configuration in the file, or inferred from the shapes of the weights.
        size: side of the frames in pixels.
        notes: assumptions about what the file does not contain, in sentences.
    """

    weights: dict[str, Tensor]
    config: ReferenceConfig
    size: int
    notes: tuple[str, ...]


class ImportReport(NamedTuple):
    """The result of an import.

    Attributes:
        checkpoint: directory of the new checkpoint, in the run's folder.
        config: configuration of the run.
        notes: what was assumed or omitted, in sentences.
    """

    checkpoint: Path
    config: Config
    notes: tuple[str, ...]


def import_checkpoint(file: Path, out: Path) -> ImportReport:
    """Turn a checkpoint of First Order Motion into a run that can animate, evaluate and train.

    Args:
        file: a published checkpoint, or a safetensors file for :func:`read_reference`.
        out: folder of the run; the checkpoint becomes its step 0.

    Raises:
        UserError: the file is not such a checkpoint, its keys do not match, or ``out`` is a run.
    """
    if has_checkpoint(out):
        raise UserError(f"{out}: this folder already holds a run; give a new one")
    model = read_reference(file)
    config = run_config(model, out)
    state = new_state(config, torch.device("cpu"))
    load_weights(model, state.animator, state.discriminator, str(file))
    state.ema.module.load_state_dict(state.animator.state_dict())
    directory = out / STEP_FORMAT.format(0)
    save_checkpoint(state, config, directory)
    fresh = "the optimisers start from scratch: Adam's moments are not imported"
    return ImportReport(directory, config, (*model.notes, fresh))


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
    weights, notes = _as_today(weights)
    return ReferenceModel(weights, config, size, notes)


def _read_pickle(file: Path) -> ReferenceModel:
    entries = read_tensors(file)
    _check_keys(
        str(file),
        missing=[name for name in REQUIRED if not isinstance(entries.get(name), Mapping)],
        unknown=[
            str(name)
            for name in entries
            if name not in (*NETWORKS, "epoch") and not str(name).startswith("optimizer_")
        ],
    )
    weights = {
        f"{network}.{name}": value
        for network in NETWORKS
        for name, value in (entries.get(network) or {}).items()
    }
    _check_keys(
        str(file), unknown=[key for key, value in weights.items() if not isinstance(value, Tensor)]
    )
    weights, changes = _as_today(weights)
    config, notes = _infer_config(weights, str(file))
    return ReferenceModel(weights, config, PUBLISHED_SIZE, (*notes, *changes))


def _as_today(weights: dict[str, Tensor]) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """Convert names and precision of the weights to those that are loaded.

    Returns:
        The weights, and notes on what was changed.
    """
    notes = []
    for network in NETWORKS:
        own = [key for key in weights if key.startswith(f"{network}.")]
        prefix = f"{network}.module."
        if own and all(key.startswith(prefix) for key in own):
            notes.append(f"removed the prefix module. of DataParallel from the {network}")
            weights = {
                f"{network}.{key.removeprefix(prefix)}" if key in own else key: value
                for key, value in weights.items()
            }
        if not own and network not in REQUIRED:
            notes.append(
                f"the file has no {network}: it gets random weights, which matters only if you "
                "continue training"
            )
    kinds = {value.dtype for value in weights.values() if value.is_floating_point()}
    if others := sorted(str(kind).removeprefix("torch.") for kind in kinds - {torch.float32}):
        notes.append(f"converted weights in {' and '.join(others)} to float32")
    weights = {
        key: value.float() if value.is_floating_point() else value for key, value in weights.items()
    }
    return _complete_spectral_norms(weights), tuple(notes)


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


def _infer_config(
    weights: Mapping[str, Tensor], source: str
) -> tuple[ReferenceConfig, tuple[str, ...]]:
    """Infer the sizes of the networks from the shapes of their weights.

    Returns:
        The configuration, and notes on what was assumed.
    """
    notes = [
        f"the file does not contain the frame size and the detector's temperature: assuming the "
        f"published values {PUBLISHED_SIZE} and {PUBLISHED_TEMPERATURE}"
    ]
    keypoints = _channels(weights, "kp_detector.kp.weight", source)
    jacobian = weights.get("kp_detector.jacobian.weight")
    estimates = any(key.startswith("kp_detector.jacobian.") for key in weights)
    scales = {
        network: _infer_scale(weights.get(f"{network}.down.weight"))
        for network in ("kp_detector", "generator.dense_motion_network")
    }
    if set(scales.values()) == {None}:
        notes.append("neither network has a down.weight: assuming scale_factor 1")
    # If only one network lacks a down.weight, the scale of the other makes it a missing key.
    known = next((scale for scale in scales.values() if scale is not None), 1.0)
    config = {
        "common_params": {"num_kp": keypoints, "estimate_jacobian": estimates},
        "kp_detector_params": {
            **_infer_hourglass(weights, "kp_detector.predictor", source),
            "scale_factor": scales["kp_detector"] or known,
            "temperature": PUBLISHED_TEMPERATURE,
            "single_jacobian_map": jacobian is not None and len(jacobian) != 4 * keypoints,
        },
        "generator_params": {
            "block_expansion": _channels(weights, "generator.first.conv.weight", source),
            "max_features": _widest(weights, "generator.down_blocks."),
            "num_down_blocks": _count(weights, "generator.down_blocks."),
            "num_bottleneck_blocks": _count(weights, "generator.bottleneck.r"),
            "estimate_occlusion_map": True,
            "dense_motion_params": {
                **_infer_hourglass(weights, "generator.dense_motion_network.hourglass", source),
                "scale_factor": scales["generator.dense_motion_network"] or known,
            },
        },
        "discriminator_params": _infer_discriminator(weights, keypoints, source),
    }
    if not estimates:
        notes.append("the detector estimates no jacobians: using the identity")
    return ReferenceConfig.model_validate(config), tuple(notes)


def _infer_hourglass(weights: Mapping[str, Tensor], prefix: str, source: str) -> dict[str, int]:
    count = _count(weights, f"{prefix}.encoder.down_blocks.")
    last = f"{prefix}.decoder.up_blocks.{count - 1}.conv.weight"
    return {
        "block_expansion": _channels(weights, last, source),
        "max_features": _widest(weights, f"{prefix}.encoder.down_blocks."),
        "num_blocks": count,
    }


def _infer_discriminator(
    weights: Mapping[str, Tensor], keypoints: int, source: str
) -> dict[str, Any]:
    prefix = "discriminator.discs.1.down_blocks."
    if not any(key.startswith("discriminator.") for key in weights):
        return {}
    sn = f"{prefix}0.conv.weight_orig" in weights
    first = f"{prefix}0.conv.{'weight_orig' if sn else 'weight'}"
    channels = _channels(weights, first, source)
    return {
        "block_expansion": -(-channels // 2),
        "max_features": _widest(weights, prefix),
        "num_blocks": _count(weights, prefix),
        "sn": sn,
        "use_kp": weights[first].shape[1] == 3 + keypoints,
    }


def _infer_scale(kernel: Tensor | None) -> float | None:
    """Return the scale s of an anti-alias kernel: N = 2·round(4σ) + 1 taps, σ = (1/s − 1)/2."""
    return 4 / (kernel.shape[-1] + 3) if kernel is not None and kernel.ndim == 4 else None


def _channels(weights: Mapping[str, Tensor], key: str, source: str) -> int:
    """Return the number of output channels of the convolution ``key``."""
    if key not in weights or weights[key].ndim != 4:
        _check_keys(source, missing=[key])
    return len(weights[key])


def _count(weights: Iterable[str], prefix: str) -> int:
    """Count the different numbers that follow a prefix."""
    return len({key[len(prefix) :].split(".")[0] for key in weights if key.startswith(prefix)})


def _widest(weights: Mapping[str, Tensor], prefix: str) -> int:
    """Return the most output channels below a prefix; as max_features, it gives these layers."""
    biases = [
        bias.numel()
        for key, bias in weights.items()
        if key.startswith(prefix) and key.endswith(".conv.bias")
    ]
    return max(biases, default=1)


def run_config(model: ReferenceModel, out: Path) -> Config:
    """Return our configuration for a model of the reference, as a run in the folder ``out``.

    Raises:
        UserError: the sizes do not fit together, or ``out`` is not a valid name of a run.
    """
    # VGG-19 halves four times: at the published scale 1/8, nothing is left of a small frame.
    scales = [s for s in LossConfig().perceptual.scales if model.size * s >= 16]
    tree = {
        "name": out.absolute().name,
        "storage": str(out.absolute().parent),
        "data": {"size": model.size},
        "model": animator_config(model.config).model_dump(),
        "discriminator": discriminator_config(model.config).model_dump(),
        "priority_cut": None,
        "loss": {"perceptual": {"scales": scales}},
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

    Anti-alias kernels are constants: they are compared with ours, then omitted. If the reference
    estimates no jacobians, the detector keeps its fresh jacobian layer, which gives the identity
    (method §1). Batch counts, which are not used, may be missing.

    Raises:
        UserError: keys are missing or unknown, or have wrong shapes, NaN or infinite values; names
            ``source`` and the keys.
    """
    networks: list[tuple[nn.Module, Callable[[str], str]]] = [(animator, _animator_key)]
    if discriminator and any(key.startswith("discriminator.") for key in model.weights):
        networks.append((discriminator, _discriminator_key))
    expected = {
        rename(name): tensor
        for module, rename in networks
        for name, tensor in module.state_dict().items()
    }
    if not model.config.common_params.estimate_jacobian:
        del expected["kp_detector.jacobian.weight"], expected["kp_detector.jacobian.bias"]
    kernels = _kernels(model.config)
    _check_weights(model.weights, expected | kernels, source)
    if wrong := not_finite(model.weights):
        raise UserError(
            f"{source}: these weights are NaN or infinite: {wrong}; download the file again or use "
            "another one"
        )
    for key, kernel in kernels.items():
        # To the accuracy of half precision.
        if not torch.allclose(model.weights[key], kernel, rtol=4e-3, atol=1e-6):
            raise UserError(f"{source}: {key} is not the Gaussian of its scale_factor")
    for module, rename in networks:
        own = module.state_dict()
        module.load_state_dict(
            {name: model.weights.get(rename(name), tensor) for name, tensor in own.items()}
        )


def _animator_key(name: str) -> str:
    """Return the reference's key for a tensor of our animator."""
    network, _, rest = name.partition(".")
    prefixes = {"detector": "kp_detector", "dense_motion": "generator.dense_motion_network"}
    return f"{prefixes.get(network, network)}.{rest}"


def _discriminator_key(name: str) -> str:
    """Return the reference's key for a tensor of our discriminator, which works at scale 1."""
    return f"discriminator.discs.1.{name}"


def _kernels(config: ReferenceConfig) -> dict[str, Tensor]:
    """Return the anti-alias kernels that the reference stores as buffers, by its keys."""
    scales = {
        "kp_detector": config.kp_detector_params.scale_factor,
        "generator.dense_motion_network": config.generator_params.dense_motion_params.scale_factor,
    }
    kernels = {name: gaussian_kernel(scale) for name, scale in scales.items() if scale != 1}
    return {
        f"{name}.down.weight": torch.outer(kernel, kernel).expand(3, 1, -1, -1)
        for name, kernel in kernels.items()
    }


def _check_weights(
    weights: Mapping[str, Tensor], expected: Mapping[str, Tensor], source: str
) -> None:
    """Compare keys and shapes.

    Raises:
        UserError: they differ; names the keys.
    """
    optional = ".num_batches_tracked"
    _check_keys(
        source,
        missing=[key for key in expected if key not in weights and not key.endswith(optional)],
        unknown=[key for key in weights if key not in expected],
        misshapen=[
            f"{key} {list(weights[key].shape)} (not {list(tensor.shape)})"
            for key, tensor in expected.items()
            if key in weights and weights[key].shape != tensor.shape
        ],
    )


def _check_keys(
    source: str,
    *,
    missing: Sequence[str] = (),
    unknown: Sequence[str] = (),
    misshapen: Sequence[str] = (),
) -> None:
    """Reject keys that do not match.

    Raises:
        UserError: there are any; names the first ones and counts all.
    """
    problems = [
        f"{kind} {key}"
        for kind, keys in (("missing", missing), ("unknown", unknown), ("misshapen", misshapen))
        for key in keys
    ]
    if problems:
        more = f" and {len(problems) - _LISTED} more" if len(problems) > _LISTED else ""
        raise UserError(
            f"{source}: is not a supported model of First Order Motion: {len(problems)} keys "
            f"differ: {', '.join(problems[:_LISTED])}{more}"
        )
