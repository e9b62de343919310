"""``prioritycut tune``."""

import base64
import shlex
from pathlib import Path

from rich.console import Console

from prioritycut_ray.config import with_absolute_paths
from prioritycut_ray.errors import UserError
from prioritycut_ray.evaluation.report import csv_text
from prioritycut_ray.search.driver import run_search
from prioritycut_ray.search.plots import draw_all
from prioritycut_ray.search.results import best_config, best_trial, table
from prioritycut_ray.search.space import describe, load_base, load_search
from prioritycut_ray.storage.folder import Folder
from prioritycut_ray.templates import render


def tune(
    file: str | Path, overrides: list[str], *, smoke: bool, resume: bool, console: Console
) -> str:
    """Run a search, and write its table, its pictures and the best configuration.

    Args:
        file: the search's YAML file.
        overrides: changes to the base configuration.
        smoke: take the small size that the file names.
        resume: go on with the search of this name if there is one.
        console: where the summary goes.

    Returns:
        Path or URL of the search's folder.

    Raises:
        UserError: something does not fit, or every trial failed.
    """
    search = load_search(file, smoke=smoke)
    base = with_absolute_paths(load_base(search, overrides))
    storage = Folder(base.model_copy(update={"name": search.name}).run)
    folder = storage.url
    trials, metric = run_search(search, base, storage, resume=resume)
    header, rows = table(trials)
    storage.write("trials.csv", csv_text([header, *rows]).encode())
    pictures = draw_all(trials, metric)
    for name, png in pictures.items():
        storage.write(name, png)
    best = best_trial(trials, metric)
    page = render(
        "search.html.j2",
        search=search,
        metric=metric,
        best=best,
        header=header,
        rows=rows,
        pictures={name: base64.b64encode(png).decode() for name, png in pictures.items()},
    )
    storage.write("search.html", page.encode())
    for trial in trials:
        if trial.status == "failed":
            console.print(f"failed: trial {trial.key}: {trial.reason}", markup=False)
    if best is None or best.last is None:
        raise UserError(
            f"{folder}: no trial was trained to its end with a finite objective; see "
            f"{folder}/trials.csv for the reasons, fix them, and search again under another name"
        )
    storage.write("best.yaml", best_config(search, base, best).encode())
    console.print(
        f"Best:  {metric.label} {best.last.value:.{metric.decimals}f}: {describe(best.parameters)}",
        f"Train: {shlex.join(['prioritycut', 'train', f'{folder}/best.yaml'])}",
        f"Look:  {folder}/search.html, trials.csv; "
        f"{shlex.join(['tensorboard', '--logdir', folder])}",
        sep="\n",
        markup=False,
    )
    return folder
