"""``prioritycut models``."""

import webbrowser
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from prioritycut_ray.commands.evaluate import for_terminal, print_summary
from prioritycut_ray.errors import UserError
from prioritycut_ray.evaluation.measures import Measures
from prioritycut_ray.launch.evaluate import task_mapper
from prioritycut_ray.retraining.diff import write_diff
from prioritycut_ray.retraining.job import newest_job
from prioritycut_ray.retraining.listing import list_entries
from prioritycut_ray.retraining.registry import (
    adopt,
    model_names,
    pin,
    promote,
    rollback,
    run_folder,
)
from prioritycut_ray.retraining.slices import IDENTITY
from prioritycut_ray.runs.locate import has_checkpoint, run_of_best
from prioritycut_ray.storage.folder import Folder
from prioritycut_ray.storage.lease import leased
from prioritycut_ray.storage.paths import resolved

LEASE_SECONDS = 60.0


def list_models(url: str, console: Console) -> None:
    """Print all models and candidates, and which one is current."""
    models = Folder(resolved(url))
    table = Table("model", "state", "promoted", "reason", title=models.url)
    for entry in list_entries(models):
        state = entry.state + " (anchor)" * entry.is_anchor
        state += "" if entry.has_weights else ", weights removed"
        promoted = f"{entry.promoted:%Y-%m-%d %H:%M}" if entry.promoted else ""
        table.add_row(*map(escape, (entry.name, state, promoted, entry.reason)))
    console.print(table)


def promote_model(url: str, model: str, name: str | None, console: Console) -> None:
    """Make a model current by hand, or add a training run as a model and make it current.

    Args:
        url: the models folder.
        model: name of a model, the folder of a training run, or ``RUN/best``.
        name: name of the model that a training run becomes; by default the run's own.
        console: where to print the result.

    Raises:
        UserError: there is no such model or run.
    """
    models = Folder(resolved(url))
    with leased(models, LEASE_SECONDS) as lease:
        if model not in model_names(models):
            place = resolved(model)
            run = run_of_best(place) or place
            if not has_checkpoint(run):
                raise UserError(
                    f"{model}: is neither a model in {models.url} nor the folder of a run; "
                    "`prioritycut models list` shows the models"
                )
            model = name or run.rstrip("/").rsplit("/", 1)[-1]
            adopt(models, lease, place, model)
        promote(models, lease, model, "by hand")
    console.print(f"{models.url}: {model} is current", markup=False)


def pin_model(url: str, model: str | None, console: Console) -> None:
    """Make a model the anchor.

    Args:
        url: the models folder.
        model: its name; the current model by default.
        console: where to print the result.

    Raises:
        UserError: there is no such model.
    """
    models = Folder(resolved(url))
    if model is not None and model not in model_names(models):
        raise UserError(
            f"{model}: is not a model in {models.url}; `prioritycut models list` shows the models"
        )
    with leased(models, LEASE_SECONDS) as lease:
        pinned = pin(models, lease, model)
    console.print(
        f"{models.url}: {pinned} is the anchor; candidates may be worse than it by one tolerance",
        markup=False,
    )


def diff_models(
    url: str,
    pair: tuple[str, str],
    *,
    data: str | None,
    split: str | None,
    slices: Sequence[str],
    out: Path,
    workers: int | None,
    show: bool,
    console: Console,
) -> None:
    """Compare two models on held-out clips: print the means and slices, and open the page.

    Args:
        url: the models folder.
        pair: names of models, or runs.
        data: folder of shards; by default that of the newest retraining.
        split: of the data set; by default the holdout of the newest retraining.
        slices: keys that slices are made from; by default those of the newest retraining.
        out: folder of the page.
        workers: number of Ray tasks at a time; 0 compares in this process.
        show: whether to open the page in a browser, if the console is a terminal.
        console: where to print.

    Raises:
        UserError: there is no such model, or the data set is not known.
    """
    models = Folder(resolved(url))
    names = model_names(models)
    runs = [run_folder(models, name) if name in names else resolved(name) for name in pair]
    for name, run in zip(pair, runs, strict=True):
        if name not in names and not has_checkpoint(run_of_best(run) or run):
            raise UserError(
                f"{name}: is neither a model in {models.url} nor the folder of a run; "
                "`prioritycut models list` shows the models"
            )
    job = newest_job(models)
    if job is None and (data is None or split is None):
        raise UserError(
            f"{models.url}: there was no retraining whose data set could be used; name one with "
            "--data and --split"
        )
    settings = job.settings if job else None
    page, evaluation, table = write_diff(
        (runs[0], runs[1]),
        resolved(data) if data is not None else settings.data if settings else "",
        split or (settings.holdout if settings else ""),
        slices or [*(settings.gate.slices if settings else ())] or [IDENTITY],
        out,
        Measures(settings.lpips, settings.faces, settings.transfer) if settings else Measures(),
        task_mapper(workers),
    )
    print_summary(evaluation, console)
    console.print(for_terminal(table))
    console.print(f"Side by side: {page}", markup=False)
    if show and console.is_terminal:
        webbrowser.open(page.absolute().as_uri())


def roll_back(url: str, console: Console) -> None:
    """Roll back to the previously promoted model, and pin it.

    Raises:
        UserError: there is no earlier model.
    """
    models = Folder(resolved(url))
    with leased(models, LEASE_SECONDS) as lease:
        former, current = rollback(models, lease)
    console.print(
        f"{models.url}: rolled back from {former} to {current}, which is now the anchor too",
        markup=False,
    )
