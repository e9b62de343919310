"""A training state as a directory and back; knows no Ray.

A checkpoint directory holds ``animator.safetensors``, ``animator_ema.safetensors`` (its moving
average, which animates) and ``discriminator.safetensors``, readable without this project;
``optimizers.pt``, ``config.yaml`` (resolved), ``progress.json``, and,
written last, ``manifest.json`` with the SHA-256 of every other file. Without a manifest that fits,
a directory is no checkpoint.
"""

import hashlib
import json
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import save_file
from torch import nn

from prioritycut_ray.config import Config, dump_config, parse_config
from prioritycut_ray.errors import UserError
from prioritycut_ray.models.animator import Animator
from prioritycut_ray.state import TrainState, build_animator
from prioritycut_ray.tensor_files import read_tensors

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
PROGRESS = ("step", "samples", "skipped", "skipped_in_a_row")
"""Counters of the state that a checkpoint keeps."""
STEP_FORMAT = "step_{:07d}"


def save_checkpoint(state: TrainState, config: Config, directory: Path) -> None:
    """Write a checkpoint into an empty directory, the manifest last.

    Raises:
        OSError: the file system refused, for instance when it is full.
    """
    directory.mkdir(parents=True, exist_ok=True)
    save_file(_contiguous(state.animator), directory / "animator.safetensors")
    save_file(_contiguous(state.ema.module), directory / "animator_ema.safetensors")
    save_file(_contiguous(state.discriminator), directory / "discriminator.safetensors")
    optimizers = {
        "animator": state.animator_optimizer.state_dict(),
        "discriminator": state.discriminator_optimizer.state_dict(),
    }
    torch.save(optimizers, directory / "optimizers.pt")
    (directory / "config.yaml").write_text(dump_config(config))
    progress = {name: getattr(state, name) for name in PROGRESS}
    (directory / "progress.json").write_text(json.dumps(progress))
    files = sorted(path for path in directory.iterdir() if path.name != MANIFEST)
    manifest = {path.name: _sha256(path) for path in files}
    partial = directory / f".{MANIFEST}"
    partial.write_text(json.dumps(manifest, indent=1))
    for path in (*files, partial):
        _flush(path)
    os.replace(partial, directory / MANIFEST)


def load_checkpoint(state: TrainState, directory: Path) -> None:
    """Restore networks, optimisers and progress in place.

    Raises:
        UserError: the checkpoint is damaged, or is of another model.
    """
    verify_checkpoint(directory)
    load_module(state.animator, directory / "animator.safetensors")
    load_module(state.ema.module, directory / "animator_ema.safetensors")
    load_module(state.discriminator, directory / "discriminator.safetensors")
    optimizers = read_tensors(directory / "optimizers.pt")
    state.animator_optimizer.load_state_dict(optimizers["animator"])
    state.discriminator_optimizer.load_state_dict(optimizers["discriminator"])
    progress = json.loads((directory / "progress.json").read_text())
    for name in PROGRESS:
        setattr(state, name, progress[name])
    state.ema.n_averaged.fill_(state.step)
    state.remember_buffers(state.animator)
    state.remember_buffers(state.discriminator)


def load_animator(directory: Path, device: torch.device) -> tuple[Animator, Config]:
    """The averaged animator of a checkpoint in evaluation mode, and its configuration.

    Raises:
        UserError: the checkpoint is damaged.
    """
    verify_checkpoint(directory)
    config = read_config(directory)
    animator = build_animator(config.model)
    load_module(animator, directory / "animator_ema.safetensors")
    return animator.to(device).eval(), config


def read_config(directory: Path) -> Config:
    """The resolved configuration stored in a checkpoint."""
    path = directory / "config.yaml"
    tree: dict[str, Any] = yaml.safe_load(path.read_text())
    return parse_config(tree, str(path))


def find_checkpoint(run: Path) -> Path:
    """The newest good checkpoint of a run; damaged ones are passed over with a warning.

    Args:
        run: the folder of a run, or one of its checkpoints.

    Raises:
        UserError: there is none.
    """
    if not run.is_dir():
        raise UserError(f"{run}: no such run folder; `prioritycut train` makes one below runs/")
    candidates = [run] if (run / MANIFEST).exists() else list(_newest_first(run))
    damage = ""
    for directory in candidates:
        try:
            verify_checkpoint(directory)
        except UserError as error:
            logger.warning("%s; trying the one before it", error)
            damage = damage or f"; the newest is not: {error}"
        else:
            return directory
    raise UserError(
        f"{run}: no usable checkpoint among the {len(candidates)} here{damage}; give the folder "
        "of a run that has written at least one, see train.checkpoint_every"
    )


def has_checkpoint(run: Path) -> bool:
    """Whether a run has written any checkpoint, good or damaged."""
    return any(run.glob("step_*"))


def verify_checkpoint(directory: Path) -> None:
    """Compare every file with the manifest.

    Raises:
        UserError: naming the file that is missing or damaged.
    """
    try:
        manifest: dict[str, str] = json.loads((directory / MANIFEST).read_text())
        for name, expected in manifest.items():
            if _sha256(directory / name) != expected:
                raise UserError(f"{directory / name}: damaged checkpoint (checksum differs)")
    except (OSError, ValueError) as error:
        raise UserError(f"{directory}: no complete checkpoint ({error})") from error


def _newest_first(run: Path) -> Iterator[Path]:
    yield from sorted((p for p in run.glob("step_*") if p.is_dir()), reverse=True)


def _contiguous(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.contiguous() for name, tensor in module.state_dict().items()}


def load_module(module: nn.Module, path: Path) -> None:
    """Read a module's weights from a file of tensors.

    Raises:
        UserError: the file is damaged, or is of another model.
    """
    try:
        module.load_state_dict(read_tensors(path))
    except RuntimeError as error:
        reason = str(error).splitlines()
        raise UserError(
            f"{path}: the weights are of another model than the config describes: "
            f"{' '.join(line.strip() for line in reason[:3])}"
        ) from error


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _flush(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
