"""``init=MODEL``: a new run that starts from the weights of another model, as its step 0."""

import hashlib
import re
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from prioritycut_ray.config import Config
from prioritycut_ray.errors import UserError
from prioritycut_ray.inference.pretrained import WEIGHTS_NAME, locate_model, read_model_config
from prioritycut_ray.runs.checkpoints import steps, write_checkpoint
from prioritycut_ray.runs.compatibility import NETWORK_KEYS, changed_keys
from prioritycut_ray.runs.locate import BEST, Origin, RunProgress, read_progress
from prioritycut_ray.storage.claims import Claim
from prioritycut_ray.storage.tensors import read_weights
from prioritycut_ray.training.checkpoint import take_snapshot, write_snapshot
from prioritycut_ray.training.state import new_state

_LISTED = 6
_UP_BLOCK = re.compile(r"((?:^|.*\.)up_blocks)\.(\d+)\.")


class Model(NamedTuple):
    """A model that a run can start from.

    Attributes:
        config: the configuration that it was trained with.
        animator: file with its averaged weights.
        discriminator: file with the weights of its discriminator, if it is stored.
        progress: how far it was trained; None for an exported model.
    """

    config: Config
    animator: Path
    discriminator: Path | None
    progress: RunProgress | None


def write_initial_weights(config: Config, claim: Claim, on_warning: Callable[[str], None]) -> None:
    """Write step 0 of a run with the weights of the model ``init``, unless the run has begun.

    Both the animator and its moving average start from the model's averaged weights. Every tensor
    of the same name and shape is taken; the others start from random values, and are listed in a
    warning and in the checkpoint. Optimizers start from scratch.

    Args:
        config: the run's configuration.
        claim: the claim of this command.
        on_warning: called with the list of tensors that do not fit.

    Raises:
        UserError: there is no such model, it is damaged, or nothing of its animator fits.
    """
    if config.init is None or steps(claim.folder):
        return
    model = read_model(config.init)
    state = new_state(config, torch.device("cpu"))
    networks: dict[str, tuple[nn.Module | None, Path | None]] = {
        "animator": (state.animator, model.animator),
        "discriminator": (state.discriminator, model.discriminator),
    }
    fresh: dict[str, list[str]] = {}
    for name, (network, file) in networks.items():
        if network is not None:
            fresh[name] = take_weights(network, read_weights(file) if file else {})
    if len(fresh["animator"]) == len(state.animator.state_dict()):
        raise UserError(
            f"init={config.init}: no tensor of its animator fits; set the keys of model to those "
            f"of its configuration: {_differences(model.config, config)}"
        )
    state.ema.module.load_state_dict(state.animator.state_dict())
    names = tuple(f"{network}.{name}" for network, found in fresh.items() for name in found)
    state.origin = Origin(
        model=short_name(config.init),
        sha256=hashlib.sha256(model.animator.read_bytes()).hexdigest(),
        step=model.progress.step if model.progress else None,
        samples=model.progress.samples if model.progress else None,
        fresh=names,
    )
    if names:
        on_warning(
            f"init={config.init}: {len(names)} tensors do not fit and start from random values "
            f"({_summary(names)}); different here: {_differences(model.config, config)}"
        )
    snapshot = take_snapshot(state, config, data="")
    write_checkpoint(claim, 0, lambda directory: write_snapshot(snapshot, directory))


def read_model(place: str) -> Model:
    """Find the files of a model.

    Args:
        place: a run, a checkpoint, ``RUN/best``, an export, or a model on the Hugging Face Hub.

    Raises:
        UserError: there is no such model, or it is damaged.
    """
    folder = locate_model(place)
    config = read_model_config(folder)
    if (folder / WEIGHTS_NAME).is_file():
        return Model(config, folder / WEIGHTS_NAME, None, None)
    discriminator = folder / "discriminator.safetensors"
    return Model(
        config,
        folder / "animator_ema.safetensors",
        discriminator if discriminator.is_file() else None,
        read_progress(folder),
    )


def take_weights(network: nn.Module, weights: Mapping[str, Tensor]) -> list[str]:
    """Load every tensor that fits into a network.

    Returns:
        Names of the network's tensors that were not in ``weights``, or had another shape.
    """
    own = network.state_dict()
    given = dict(zip(_from_the_end(weights), weights.values(), strict=True))
    names = dict(zip(own, _from_the_end(own), strict=True))
    fitting = {
        name: given[key]
        for name, key in names.items()
        if key in given and given[key].shape == own[name].shape
    }
    network.load_state_dict(own | fitting)
    return [name for name in own if name not in fitting]


def _from_the_end(names: Mapping[str, Tensor]) -> list[str]:
    """Number decoder blocks from the last: that one works at frame size, whatever their number."""
    counts: Counter[str] = Counter()
    for name in names:
        if found := _UP_BLOCK.match(name):
            counts[found[1]] = max(counts[found[1]], int(found[2]) + 1)

    def renamed(found: re.Match[str]) -> str:
        return f"{found[1]}.{int(found[2]) - counts[found[1]]}."

    return [_UP_BLOCK.sub(renamed, name, count=1) for name in names]


def short_name(place: str) -> str:
    """Name a model without the folders that it is in, which may be private."""
    if not place.startswith("/") and "://" not in place:
        return place  # on the Hub
    *_, run, name = ("", *place.rstrip("/").split("/"))
    return f"{run}/{name}" if name == BEST or name.startswith("step_") else name


def _summary(names: tuple[str, ...]) -> str:
    """Count tensors by block."""
    blocks = Counter(".".join(name.split(".")[:4][:-1]) for name in names)
    listed = [f"{block}: {count}" for block, count in blocks.most_common(_LISTED)]
    more = len(blocks) - len(listed)
    return ", ".join(listed) + (f" and {more} more blocks" if more else "")


def _differences(theirs: Config, ours: Config) -> str:
    changed = changed_keys(theirs.model_dump(mode="json"), ours.model_dump(mode="json"))
    return ", ".join(key for key in changed if key.startswith(NETWORK_KEYS)) or "nothing"
