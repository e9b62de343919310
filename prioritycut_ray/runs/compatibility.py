"""Which values a resumed run may change."""

from prioritycut_ray.config import NETWORK_KEYS, Config, changed_keys
from prioritycut_ray.errors import UserError
from prioritycut_ray.runs.checkpoints import STEP_FORMAT
from prioritycut_ray.runs.locate import (
    find_checkpoint,
    read_config,
    read_progress,
)


def check_resumable(config: Config, data: str) -> None:
    """Refuse to continue a run under a configuration or on data that would change its result.

    A run that was imported and has not trained yet may be trained in any way that fits it.

    Args:
        config: resolved.
        data: fingerprint of the data set.

    Raises:
        UserError: naming the keys that differ.
    """
    directory, run = find_checkpoint(config.run), config.run
    trained_on = read_progress(directory).data
    if trained_on not in ("", data):
        raise UserError(
            f"{run}: the run was trained on other clips (fingerprint {trained_on[:12]}) than those "
            f"at data.url={config.data.url} (fingerprint {data[:12]}); give that data back to "
            "resume it, or another name=... to start afresh"
        )
    before = read_config(directory).model_dump(mode="json")
    changed = changed_keys(before, config.model_dump(mode="json"))
    if directory.name == STEP_FORMAT.format(0):
        changed = [key for key in changed if key.startswith(NETWORK_KEYS)]
    changed = [key for key in changed if not key.startswith(MAY_CHANGE)]
    if changed:
        raise UserError(
            f"{run}: the run exists with other values of {', '.join(changed)}; give those back to "
            "resume it, or another name=... to start afresh"
        )


MAY_CHANGE = (
    "storage",
    "data.url",
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
    "train.max_failures",
    "train.grace_seconds",
    "train.collective_timeout_s",
)
"""Begins of keys that a resumed run may change: its length, its rhythm, and where things are."""
