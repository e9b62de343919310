"""Which values a resumed run may change."""

from collections.abc import Mapping
from typing import Any

from prioritycut_ray.config import Config
from prioritycut_ray.errors import UserError
from prioritycut_ray.runs.checkpoints import STEP_FORMAT
from prioritycut_ray.runs.locate import find_checkpoint, read_config, read_progress

NETWORK_KEYS = ("model.", "discriminator.", "data.size")
"""Prefixes of the keys that determine the shapes of the weights."""

MAY_CHANGE = (
    "storage",
    "data.url",
    "data.validation_split",
    "data.loader_workers",
    "data.decoder",
    "data.cache_dir",
    "data.cache_gb",
    "train.samples",
    "train.workers",
    "train.cpus_per_worker",
    "train.use_gpu",
    "train.log_every",
    "train.image_every",
    "train.checkpoint_every",
    "train.keep_",
    "train.best_metric",
    "train.validate_",
    "train.patience",
    "train.max_failures",
    "train.grace_seconds",
    "train.collective_timeout_s",
)
"""Prefixes of the keys that a resumed run may change: its length, its intervals, its places."""


def check_resumable(config: Config, data: str) -> None:
    """Check that a run can continue with a configuration and data without changing its result.

    A run that was imported and has not been trained yet may be trained in any way that fits it.

    Args:
        config: the resolved configuration.
        data: fingerprint of the data set.

    Raises:
        UserError: if the data or the configuration differ; it names the keys.
    """
    directory, run = find_checkpoint(config.run), config.run
    trained_on = read_progress(directory).data
    if trained_on not in ("", data):
        if _version(trained_on) != _version(data):
            raise UserError(
                f"{run}: this run was trained by an older version, which drew samples in another "
                "order; resume it with that version, or set another name=... to start a new run"
            )
        raise UserError(
            f"{run}: this run was trained on other clips (fingerprint {trained_on[:12]}) than "
            f"those at data.url={config.data.url} (fingerprint {data[:12]}); restore that data to "
            "resume it, or set another name=... to start a new run"
        )
    before = read_config(directory).model_dump(mode="json")
    changed = changed_keys(before, config.model_dump(mode="json"))
    if directory.name == STEP_FORMAT.format(0):
        changed = [key for key in changed if key.startswith((*NETWORK_KEYS, "init"))]
    changed = [key for key in changed if not key.startswith(MAY_CHANGE)]
    if "model.family" in changed:  # It has other keys altogether.
        changed = [k for k in changed if k == "model.family" or not k.startswith("model.")]
    if changed:
        raise UserError(
            f"{run}: this run was started with different values of {', '.join(changed)}; restore "
            "them to resume it, or set another name=... to start a new run"
        )


def _version(fingerprint: str) -> str:
    """Return the version of a fingerprint; the first one was not marked."""
    return fingerprint.rpartition("-")[0]


def changed_keys(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Return the dotted keys that differ between two trees of ``model_dump(mode="json")``."""
    before, after = (flattened(dict(tree)) for tree in (old, new))
    keys = before | after
    return [key for key in keys if before.get(key) != after.get(key)]


def flattened(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Return the values of a tree of dictionaries by their dotted keys."""
    if not isinstance(tree, dict):
        return {prefix: tree}
    items = (flattened(value, f"{prefix}.{key}" if prefix else key) for key, value in tree.items())
    return {key: value for part in items for key, value in part.items()}
