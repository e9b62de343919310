"""``prioritycut train``."""

from prioritycut_ray.config import Config
from prioritycut_ray.launch import launch
from prioritycut_ray.paths import resolved
from prioritycut_ray.progress import ProgressBar, training_note


def train(config: Config) -> str:
    """Train, or resume the run of this name; gives the run's folder."""
    with ProgressBar("training", config.train.samples) as bar:
        return launch(
            with_absolute_paths(config),
            lambda metrics: bar.update(metrics["samples"], training_note(metrics)),
            lambda warning: bar.print(f"warning: {warning}"),
        )


def with_absolute_paths(config: Config) -> Config:
    """Workers run in folders of their own: relative paths are taken from where the user stands."""
    perceptual = config.loss.perceptual
    weights = perceptual.weights
    if weights not in ("pretrained", "efficientnet_lite0", "random"):
        weights = resolved(weights)
    return config.model_copy(
        update={
            "storage": resolved(config.storage),
            "data": config.data.model_copy(
                update={
                    "url": resolved(config.data.url),
                    "cache_dir": config.data.cache_dir and resolved(config.data.cache_dir),
                }
            ),
            "loss": config.loss.model_copy(
                update={"perceptual": perceptual.model_copy(update={"weights": weights})}
            ),
        }
    )
