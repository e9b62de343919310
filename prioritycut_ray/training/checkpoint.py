"""Save a training state to a directory, and load it; independent of Ray.

A checkpoint directory holds ``animator.safetensors``, ``animator_ema.safetensors`` (its moving
average, used for animation) and, unless the run has no discriminator,
``discriminator.safetensors``, readable without this project;
``optimizers.pt``, ``config.yaml`` (resolved), ``progress.json`` (step, samples, seed, fingerprint
of the data), and, written last, ``manifest.json`` with the SHA-256 of every other file. A directory
without a matching manifest is not a checkpoint.

There is no generator state to save: random numbers are functions of seed, step and sample. Between
steps, the batch statistics to restore after a skipped update are those of the networks.
"""

import shutil
import uuid
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim import Adam

from prioritycut_ray.config import Config, dump_config
from prioritycut_ray.errors import NotFiniteError, UserError, describe
from prioritycut_ray.models.animator import Animator
from prioritycut_ray.networks import build_animator
from prioritycut_ray.runs.attempts import claim_run
from prioritycut_ray.runs.checkpoints import steps, write_checkpoint
from prioritycut_ray.runs.locate import RunProgress, local_copy, read_config, read_progress
from prioritycut_ray.runs.manifest import MANIFEST, seal, verify
from prioritycut_ray.storage.folder import Folder
from prioritycut_ray.storage.tensors import not_finite, read_tensors, read_weights
from prioritycut_ray.training.state import TrainState


class Snapshot(NamedTuple):
    """A copy of a training state in CPU memory, to be written while training continues."""

    weights: dict[str, dict[str, Tensor]]
    optimizers: dict[str, Any]
    config: Config
    progress: RunProgress


def take_snapshot(state: TrainState, config: Config, data: str) -> Snapshot:
    """Copy everything that a checkpoint holds.

    Args:
        state: state to copy.
        config: the resolved configuration.
        data: fingerprint of the data set; empty if there is none.
    """
    weights = {name: module.state_dict() for name, module in _modules(state).items()}
    optimizers = {name: optimizer.state_dict() for name, optimizer in _optimizers(state).items()}
    progress = RunProgress(
        step=state.step,
        samples=state.samples,
        skipped=state.skipped,
        skipped_in_a_row=dict(state.skipped_in_a_row),
        averaged=state.ema.updates,
        seed=config.train.seed,
        data=data,
        origin=state.origin,
    )
    return Snapshot(_copied(weights), _copied(optimizers), config, progress)


def write_snapshot(snapshot: Snapshot, directory: Path) -> None:
    """Write the files of a checkpoint into a directory, except the manifest.

    Raises:
        NotFiniteError: a weight is NaN or infinite; nothing is written.
        OSError: a file cannot be written, for instance because the disk is full.
    """
    for name, tensors in snapshot.weights.items():
        if wrong := not_finite(tensors):
            raise NotFiniteError(
                f"at step {snapshot.progress.step} these weights of the {name} are NaN or "
                f"infinite: {wrong}; no checkpoint was written; lower optim.lr or set "
                "optim.max_grad_norm, and train again under another name=..."
            )
    for name, tensors in snapshot.weights.items():
        plain = {key: tensor.contiguous() for key, tensor in tensors.items()}
        save_file(plain, directory / f"{name}.safetensors")
    torch.save(snapshot.optimizers, directory / "optimizers.pt")
    (directory / "config.yaml").write_text(dump_config(snapshot.config))
    (directory / "progress.json").write_text(snapshot.progress.model_dump_json(indent=1))


def save_checkpoint(state: TrainState, config: Config, directory: Path) -> None:
    """Write a checkpoint into an empty directory, the manifest last.

    Raises:
        OSError: a file cannot be written, for instance because the disk is full.
    """
    directory.mkdir(parents=True, exist_ok=True)
    write_snapshot(take_snapshot(state, config, data=""), directory)
    seal(directory)


def fork_checkpoint(source: Path, config: Config, run: str) -> None:
    """Start a run with another configuration from a checkpoint of the same networks.

    Networks, averages, optimisers and counters are copied; the data may differ. A run that has a
    checkpoint of that step is left unchanged.

    Args:
        source: directory of the checkpoint.
        config: configuration of the new run.
        run: folder of the new run, a path or any fsspec URL.

    Raises:
        UserError: the checkpoint is damaged, or holds weights that are NaN or infinite.
    """
    check_weights(source)
    folder, progress = Folder(run), read_progress(source)
    if progress.step in steps(folder):
        return

    def write(directory: Path) -> None:
        shutil.copytree(
            source, directory, ignore=shutil.ignore_patterns(MANIFEST), dirs_exist_ok=True
        )
        (directory / "config.yaml").write_text(dump_config(config))
        begun = progress.model_copy(update={"data": ""})
        (directory / "progress.json").write_text(begun.model_dump_json(indent=1))

    write_checkpoint(claim_run(folder, uuid.uuid4().hex, first=True), progress.step, write)


def check_weights(directory: Path) -> None:
    """Check that a checkpoint is intact and its weights are finite.

    Raises:
        UserError: it is damaged, or holds weights that are NaN or infinite.
    """
    verify(directory)
    for path in sorted(directory.glob("*.safetensors")):
        read_weights(path)


def load_checkpoint(state: TrainState, directory: Path) -> None:
    """Restore networks, optimisers and progress in place.

    Raises:
        UserError: the checkpoint is damaged, or belongs to another model.
    """
    verify(directory)
    has_critic = (directory / "discriminator.safetensors").exists()
    if has_critic != (state.discriminator is not None):
        raise UserError(
            f"{directory}: was saved {'with' if has_critic else 'without'} a discriminator; set "
            f"discriminator.kind to that of its config.yaml, or train under another name=..."
        )
    for name, module in _modules(state).items():
        load_module(module, directory / f"{name}.safetensors")
    stored = read_tensors(directory / "optimizers.pt")
    for name, optimizer in _optimizers(state).items():
        _load_optimizer(optimizer, stored[name])
    progress = read_progress(directory)
    state.step, state.samples = progress.step, progress.samples
    state.skipped, state.skipped_in_a_row = progress.skipped, dict(progress.skipped_in_a_row)
    state.ema.updates, state.origin = progress.averaged, progress.origin
    for network in state.networks():
        state.remember_buffers(network)


def load_animator(checkpoint: str | Path, device: torch.device) -> tuple[Animator, Config]:
    """Return the averaged animator of a checkpoint in evaluation mode, and its configuration.

    Args:
        checkpoint: path or URL of a directory.
        device: device of the animator.

    Raises:
        UserError: the checkpoint is damaged.
    """
    directory = local_copy(checkpoint)
    verify(directory)
    config = read_config(directory)
    animator = build_animator(config.model)
    load_module(animator, directory / "animator_ema.safetensors")
    return animator.to(device).eval(), config


def _modules(state: TrainState) -> dict[str, nn.Module]:
    """Return the networks by the names of their files."""
    modules: dict[str, nn.Module] = {"animator": state.animator, "animator_ema": state.ema.module}
    return modules | ({"discriminator": state.discriminator} if state.discriminator else {})


def _optimizers(state: TrainState) -> dict[str, Adam]:
    optimizers = {"animator": state.animator_optimizer}
    discriminator = state.discriminator_optimizer
    return optimizers | ({"discriminator": discriminator} if discriminator else {})


def _copied(tree: Any) -> Any:
    """Copy a tree of dictionaries, lists and tuples, with every tensor on the CPU."""
    if isinstance(tree, Tensor):
        return tree.detach().to("cpu", copy=True)
    if isinstance(tree, dict):
        return {key: _copied(value) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return type(tree)(_copied(value) for value in tree)
    return tree


def _load_optimizer(optimizer: Adam, stored: dict[str, Any]) -> None:
    """Restore an optimizer's moments, in the memory layout that fused kernels expect.

    Its options are those of the configuration, which a fork or an imported run may have changed.
    """
    optimizer.load_state_dict(stored | {"param_groups": optimizer.state_dict()["param_groups"]})
    for parameter, moments in optimizer.state.items():
        for name in ("exp_avg", "exp_avg_sq"):
            moments[name] = torch.empty_like(parameter).copy_(moments[name])


def load_module(module: nn.Module, path: Path) -> None:
    """Read a module's weights from a file of tensors.

    Raises:
        UserError: the file is damaged or belongs to another model, or a weight is NaN or infinite.
    """
    try:
        module.load_state_dict(read_weights(path))
    except RuntimeError as error:
        raise UserError(
            f"{path}: the weights do not match the model in the config: {describe(error)}"
        ) from error
