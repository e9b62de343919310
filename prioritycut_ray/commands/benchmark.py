"""``prioritycut benchmark``."""

from pathlib import Path

from rich.console import Console

from prioritycut_ray.commands.evaluate import for_terminal
from prioritycut_ray.evaluation.puppets import TITLES
from prioritycut_ray.evaluation.tables import metric_table
from prioritycut_ray.launch.benchmark import COLUMNS_NAME, SCORES_NAME, benchmark_puppets


def benchmark_and_print(
    run: str,
    *,
    identities: int,
    frames: int,
    workers: int | None,
    out: Path | None,
    console: Console,
) -> None:
    """Score a model on synthetic puppets, and print a table for each task.

    The arguments are those of :func:`prioritycut_ray.launch.benchmark.benchmark_puppets`, and the
    console to print to.
    """
    benchmark, folder = benchmark_puppets(
        run, identities=identities, frames=frames, workers=workers, out=out
    )
    evaluations = benchmark.tasks.values()
    for warning in dict.fromkeys(line for each in evaluations for line in each.warnings):
        console.print(f"warning: {warning}", markup=False)
    for task, evaluation in benchmark.tasks.items():
        shares = benchmark.shares[task]
        console.print(
            for_terminal(metric_table(evaluation, TITLES[task])),
            f"{100 * shares['disoccluded']:.1f} % of the pixels are dis-occluded, "
            f"{100 * shares['rim']:.1f} % at their rim ({benchmark.rim} px wide)",
            "",
            sep="\n",
        )
    console.print(
        f"Scores:  {folder / SCORES_NAME}",
        f"Columns: {folder / COLUMNS_NAME}",
        sep="\n",
        markup=False,
    )
