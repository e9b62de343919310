"""``prioritycut tune``."""

import shlex
from pathlib import Path

from rich.console import Console

from prioritycut_ray.config import with_absolute_paths
from prioritycut_ray.search.driver import run_search
from prioritycut_ray.search.report import BEST_CONFIG, write_results
from prioritycut_ray.search.space import describe, load_base, load_search
from prioritycut_ray.storage.folder import Folder


def tune(
    file: str | Path, overrides: list[str], *, smoke: bool, resume: bool, console: Console
) -> str:
    """Run a search, write its results, and print the best trial.

    Args:
        file: the search's YAML file.
        overrides: changes to the base configuration.
        smoke: apply the file's ``smoke`` section.
        resume: resume the search of this name if it exists.
        console: where to print the summary.

    Returns:
        Path or URL of the search's folder.

    Raises:
        UserError: the search is invalid, or no trial finished.
    """
    search = load_search(file, smoke=smoke)
    base = with_absolute_paths(load_base(search, overrides))
    storage = Folder(base.model_copy(update={"name": search.name}).run)
    trials, metric = run_search(search, base, storage, resume=resume)
    for trial in trials:
        if trial.status == "failed":
            console.print(f"failed: trial {trial.key}: {trial.reason}", markup=False)
    best = write_results(search, base, trials, metric, storage)
    assert best.last is not None
    folder, value = storage.url, f"{best.last.value:.{metric.decimals}f}"
    console.print(
        f"Best:  {metric.label} {value}: {describe(best.parameters)}",
        f"Train: {shlex.join(['prioritycut', 'train', f'{folder}/{BEST_CONFIG}'])}",
        f"Look:  {folder}/search.html, trials.csv; "
        f"{shlex.join(['tensorboard', '--logdir', folder])}",
        sep="\n",
        markup=False,
    )
    return folder
