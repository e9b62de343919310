"""Import weights of the public Thin-Plate Spline Motion Model implementation (method §7)."""

from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from prioritycut_ray.config import (
    Config,
    ThinPlateConfig,
    parse_config,
    parse_section,
)
from prioritycut_ray.importers.published import (
    THIN_PLATE,
    ImportReport,
    Shapes,
    check_new_run,
    load_networks,
    perceptual_scales,
    read_published,
    save_run,
)
from prioritycut_ray.models.animator import Animator
from prioritycut_ray.models.thin_plate.spline import POINTS
from prioritycut_ray.training.state import new_state

_NETWORKS = {
    "detector": "kp_detector",
    "dense_motion": "dense_motion_network",
    "inpainting": "inpainting_network",
    "background": "bg_predictor",
}
"""The reference's names of our networks."""
_PUBLISHED_TRAINING = {
    "discriminator": {"kind": "none"},
    "priority_cut": None,
    "optim": {"weight_decay": 1e-4, "max_grad_norm": 10, "grad_norm": "maximum"},
    "train": {"batch_size": 28},
}


class PublishedModel(NamedTuple):
    """A trained model as the reference stores it.

    Attributes:
        weights: tensors by ``network.name``.
        config: configuration, inferred from the shapes of the weights.
        notes: what was changed or omitted, in sentences.
    """

    weights: dict[str, Tensor]
    config: ThinPlateConfig
    notes: tuple[str, ...]


def import_checkpoint(file: Path, out: Path, *, size: int) -> ImportReport:
    """Turn a published checkpoint into a run that can animate, evaluate and train.

    Args:
        file: the checkpoint.
        out: folder of the run; the checkpoint becomes its step 0.
        size: side of the frames in pixels that the model was trained with.

    Raises:
        UserError: the file is not such a checkpoint, its keys do not match, or ``out`` is a run.
    """
    check_new_run(out)
    model = read_model(file)
    config = run_config(model.config, size, out)
    state = new_state(config, torch.device("cpu"))
    load_weights(model, state.animator, str(file))
    notes = (
        *model.notes,
        f"the file does not contain the frame size: assuming {size}",
        "the run has no discriminator, as the published model; to train with one, start a new run "
        f"from it with init={out}",
    )
    return save_run(state, config, out, notes)


def read_model(file: Path) -> PublishedModel:
    """Read a published checkpoint, without running code of the pickle.

    Args:
        file: a pickled dict with ``inpainting_network``, ``kp_detector``, ``dense_motion_network``
            and optionally ``bg_predictor``, ``avd_network``, optimisers and epoch. Half precision
            and the ``module.`` prefix of DataParallel are converted.

    Raises:
        UserError: the file is not such a checkpoint.
    """
    weights, notes = read_published(file, THIN_PLATE)
    return PublishedModel(weights, _infer_config(Shapes(weights, THIN_PLATE, str(file))), notes)


def _infer_config(shapes: Shapes) -> ThinPlateConfig:
    """Infer the sizes of the networks from the shapes of their weights."""
    motion = "dense_motion_network"
    numbers = shapes.channels("kp_detector.fg_encoder.fc.weight")
    # Every up block doubles the resolution: without a kernel, they tell the scale.
    scale = shapes.scale(motion) or 0.5 ** shapes.count(f"{motion}.up.")
    tree = {
        "family": "thin_plate",
        "num_splines": max(1, numbers // (2 * POINTS)),
        "resnet_channels": shapes.channels("kp_detector.fg_encoder.layer1.0.conv1.weight"),
        "dense_motion": {**shapes.hourglass(f"{motion}.hourglass"), "scale_factor": scale},
        "inpainting": {
            "block_expansion": shapes.channels("inpainting_network.first.conv.weight"),
            "max_features": shapes.widest("inpainting_network.down_blocks."),
        },
        "background": any(key.startswith("bg_predictor.") for key in shapes.weights),
    }
    return parse_section(ThinPlateConfig, tree, shapes.source)


def run_config(model: ThinPlateConfig, size: int, out: Path) -> Config:
    """Return the configuration of a run in the folder ``out``, with the published training.

    Raises:
        UserError: the sizes do not fit together, or ``out`` is not a valid name of a run.
    """
    tree = {
        "name": out.absolute().name,
        "storage": str(out.absolute().parent),
        "data": {"size": size},
        "model": model.model_dump(),
        "loss": {"perceptual": {"scales": perceptual_scales(size)}},
        **_PUBLISHED_TRAINING,
    }
    return parse_config(tree, str(out))


def load_weights(model: PublishedModel, animator: Animator, source: str) -> None:
    """Load a published model into a fresh animator of the same sizes.

    Raises:
        UserError: keys are missing or unknown, or have wrong shapes, NaN or infinite values; names
            ``source`` and the keys.
    """
    load_networks(
        Shapes(model.weights, THIN_PLATE, source),
        [(animator, _published_key)],
        scales={"dense_motion_network": model.config.dense_motion.scale_factor},
    )


def _published_key(name: str) -> str:
    """Return the reference's key for a tensor of our animator."""
    network, _, rest = name.partition(".")
    return f"{_NETWORKS[network]}.{rest}"
