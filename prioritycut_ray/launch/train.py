"""Training with a progress bar: ``prioritycut train``, and a part of other commands."""

from collections.abc import Mapping

from prioritycut_ray.config import Config, with_absolute_paths
from prioritycut_ray.progress import ProgressBar, training_note


def train(config: Config) -> str:
    """Train a model, or resume the run of the same name.

    Args:
        config: the run's configuration. With ``train.workers=0`` it trains in this process, without
            Ray: for a debugger, a profiler or a notebook. The weights are those of one worker.

    Returns:
        Path or URL of the run's folder.

    Raises:
        UserError: the data, the configuration or an older run of this name does not fit, or the run
            ended early.
    """
    # Imported here: each of them takes seconds, and the first one must not import Ray.
    if config.train.workers == 0:
        from prioritycut_ray.launch.in_process import train_in_process as launch
    else:
        from prioritycut_ray.launch.driver import launch
    known: dict[str, float] = {}
    with ProgressBar("training", config.train.samples) as bar:

        def show(metrics: Mapping[str, float]) -> None:
            known.update(metrics)
            if "samples" in known:
                bar.update(known["samples"], training_note(known))

        return launch(
            with_absolute_paths(config), show, lambda warning: bar.print(f"warning: {warning}")
        )
