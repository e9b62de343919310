"""``prioritycut models``."""

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from prioritycut_ray.errors import UserError
from prioritycut_ray.retraining.gate import Verdict
from prioritycut_ray.retraining.job import DONE, JOB, VERDICT
from prioritycut_ray.retraining.registry import (
    RUN,
    adopt,
    names_of,
    promote,
    read_current,
    rollback,
)
from prioritycut_ray.runs.locate import has_checkpoint
from prioritycut_ray.storage.folder import Folder
from prioritycut_ray.storage.lease import leased
from prioritycut_ray.storage.paths import resolved

LEASE_SECONDS = 60.0


def list_models(url: str, console: Console) -> None:
    """Print every model and candidate, and which one is current."""
    models = Folder(resolved(url))
    current = read_current(models)
    promoted = {entry.model: entry for entry in current.history} if current else {}
    table = Table("model", "state", "promoted", "why", title=models.url)
    for name in names_of(models):
        entry = promoted.get(name)
        state = (
            "current"
            if current and name == current.model
            else _state(models, name, name in promoted)
        )
        if not models.exists(f"{name}/{RUN}"):
            state += ", weights removed"
        when = f"{entry.at:%Y-%m-%d %H:%M}" if entry else ""
        reason = entry.reason if entry else _refusal(models, name)
        table.add_row(*map(escape, (name, state, when, reason)))
    console.print(table)


def _state(models: Folder, name: str, was_current: bool) -> str:
    if was_current:
        return "former"
    if not models.exists(f"{name}/{JOB}"):
        return "adopted"
    return "refused" if models.exists(f"{name}/{DONE}") else "unfinished"


def _refusal(models: Folder, name: str) -> str:
    path = f"{name}/{VERDICT}"
    if not models.exists(path):
        return ""
    return Verdict.model_validate_json(models.read(path)).reason


def promote_model(url: str, model: str, name: str | None, console: Console) -> None:
    """Make a model current by hand, or a training run the first model.

    Args:
        url: folder of the models.
        model: name of one of them, or folder of a training run.
        name: for a training run that becomes a model; its own name unless given.
        console: where the result is told.

    Raises:
        UserError: there is no such model or run.
    """
    models = Folder(resolved(url))
    with leased(models, LEASE_SECONDS) as lease:
        if model not in names_of(models):
            run = resolved(model)
            if not has_checkpoint(run):
                raise UserError(
                    f"{model}: neither one of the models in {models.url} nor the folder of a run"
                )
            model = name or run.rstrip("/").rsplit("/", 1)[-1]
            adopt(models, lease, run, model)
        promote(models, lease, model, "by hand")
    console.print(f"{models.url}: {model} is current", markup=False)


def roll_back(url: str, console: Console) -> None:
    """Make the model current again that was so before this one.

    Raises:
        UserError: there is none.
    """
    models = Folder(resolved(url))
    with leased(models, LEASE_SECONDS) as lease:
        former, current = rollback(models, lease)
    console.print(f"{models.url}: {current} is current, as before {former}", markup=False)
