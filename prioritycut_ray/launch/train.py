"""Training with a progress bar: ``prioritycut train``, and a part of other commands."""

from prioritycut_ray.config import Config, with_absolute_paths
from prioritycut_ray.launch.driver import launch
from prioritycut_ray.progress import ProgressBar, training_note


def train(config: Config) -> str:
    """Train, or resume the run of this name; gives the run's folder."""
    with ProgressBar("training", config.train.samples) as bar:
        return launch(
            with_absolute_paths(config),
            lambda metrics: bar.update(metrics["samples"], training_note(metrics)),
            lambda warning: bar.print(f"warning: {warning}"),
        )
