"""``prioritycut retrain``: the numbered steps, each told, each done once."""

from pathlib import Path

from rich.console import Console

from prioritycut_ray.config import load_section
from prioritycut_ray.retraining.job import (
    NothingNew,
    find_job,
)
from prioritycut_ray.retraining.notices import (
    RetrainReport,
    write_metrics,
)
from prioritycut_ray.retraining.pipeline import make_candidate
from prioritycut_ray.retraining.settings import RetrainSettings
from prioritycut_ray.storage.folder import Folder
from prioritycut_ray.storage.lease import leased
from prioritycut_ray.storage.paths import resolved


def retrain(file: str | Path, overrides: list[str], console: Console) -> RetrainReport | None:
    """Retrain the current model if there are new clips, and promote the result if it is no worse.

    Killed anywhere and run again, it ends with the same result.

    Args:
        file: YAML file of :class:`RetrainSettings`.
        overrides: changes to it.
        console: where the steps are told.

    Returns:
        The report; None if there was nothing new.

    Raises:
        LeaseHeld: another retraining is at work.
        UserError: something does not fit.
    """
    settings = load_section(RetrainSettings, str(file), overrides)
    places = {key: resolved(getattr(settings, key)) for key in ("models", "data")}
    if settings.metrics_file:
        places["metrics_file"] = resolved(settings.metrics_file)
    settings = settings.model_copy(update=places)
    models = Folder(settings.models)
    console.print(f"[1/6] lock of {models.url}", markup=False)
    with leased(models, settings.lease_seconds) as lease:
        console.print(f"[2/6] new clips in {settings.data}?", markup=False)
        found = find_job(models, settings, lease)
        if isinstance(found, NothingNew):
            console.print(f"nothing new: {found.reason}", markup=False)
            if settings.metrics_file:
                write_metrics(settings.metrics_file, None)
            return None
        return make_candidate(models, found, lease, console)
