"""``prioritycut retrain``."""

from functools import partial
from pathlib import Path

from rich.console import Console

from prioritycut_ray.retraining.notifications import RetrainReport
from prioritycut_ray.retraining.pipeline import retrain as run_pipeline
from prioritycut_ray.retraining.settings import load_settings


def retrain(file: str | Path, overrides: list[str], console: Console) -> RetrainReport | None:
    """Retrain the current model, and print each step.

    Args:
        file: the YAML file of the settings.
        overrides: changes to them.
        console: where to print.

    Returns:
        The report, or None if there are no new clips.

    Raises:
        LeaseHeld: another retraining is running.
        UserError: see :func:`prioritycut_ray.retraining.pipeline.retrain`.
    """
    return run_pipeline(load_settings(file, overrides), partial(console.print, markup=False))
