"""What a search leaves in its folder: a table, plots, one page, and the best configuration."""

import base64
from collections.abc import Sequence

from prioritycut_ray.config import Config
from prioritycut_ray.errors import UserError
from prioritycut_ray.evaluation.report import csv_text
from prioritycut_ray.metrics.aggregate import Metric
from prioritycut_ray.search.plots import draw_all
from prioritycut_ray.search.results import TrialResult, best_config, best_trial, table
from prioritycut_ray.search.space import SearchConfig
from prioritycut_ray.storage.folder import Folder
from prioritycut_ray.templates import render

BEST_CONFIG = "best.yaml"


def write_results(
    search: SearchConfig,
    base: Config,
    trials: Sequence[TrialResult],
    metric: Metric,
    folder: Folder,
) -> TrialResult:
    """Write ``trials.csv``, the plots, ``search.html`` and ``best.yaml``.

    Args:
        search: the search.
        base: the configuration that trials change.
        trials: the trials, in order.
        metric: the metric that the search optimizes.
        folder: the folder of the search.

    Returns:
        The best trial.

    Raises:
        UserError: no trial finished with a finite objective; everything but ``best.yaml`` is
            written.
    """
    header, rows = table(trials)
    folder.write("trials.csv", csv_text([header, *rows]).encode())
    plots = draw_all(trials, metric)
    for name, png in plots.items():
        folder.write(name, png)
    best = best_trial(trials, metric)
    page = render(
        "search.html.j2",
        search=search,
        metric=metric,
        best=best,
        header=header,
        rows=rows,
        pictures={name: base64.b64encode(png).decode() for name, png in plots.items()},
    )
    folder.write("search.html", page.encode())
    if best is None:
        raise UserError(
            f"{folder.url}: no trial finished with a finite objective; see "
            f"{folder.url}/trials.csv for the reasons, fix them, and search again under another "
            "name"
        )
    folder.write(BEST_CONFIG, best_config(search, base, best).encode())
    return best
