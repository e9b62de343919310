"""``prioritycut evaluate``."""

from collections.abc import Sequence
from pathlib import Path

from rich import table
from rich.console import Console
from rich.markup import escape

from prioritycut_ray.evaluation.records import Evaluation
from prioritycut_ray.evaluation.tables import Table, summary_tables
from prioritycut_ray.launch.evaluate import evaluate, report_folder


def evaluate_and_print(
    run: str | Path,
    data: str,
    *,
    compare: Sequence[str | Path] = (),
    split: str = "test",
    workers: int | None = None,
    lpips: str = "proxy",
    faces: bool = False,
    transfer: bool = False,
    out: Path | None = None,
    console: Console,
) -> None:
    """Evaluate runs, and print the means, the warnings and the folder of the report.

    The arguments are those of :func:`prioritycut_ray.evaluate`, and the console to print to.
    """
    evaluation = evaluate(
        run,
        data,
        compare=compare,
        split=split,
        workers=workers,
        lpips=lpips,
        faces=faces,
        transfer=transfer,
        out=out,
    )
    print_summary(evaluation, console)
    console.print(
        f"Report: {report_folder(run, out, 'evaluation', split)}/report.html", markup=False
    )


def print_summary(evaluation: Evaluation, console: Console) -> None:
    """Print skipped clips, warnings, means and differences."""
    for key, reason in evaluation.skipped.items():
        console.print(f"skipped: {key}: {reason}", markup=False)
    for warning in evaluation.warnings:
        console.print(f"warning: {warning}", markup=False)
    for summary in summary_tables(evaluation):
        console.print(for_terminal(summary))


def for_terminal(summary: Table) -> table.Table:
    """Return a table of text as rich shows it."""
    shown = table.Table(title=summary.title)
    for number, name in enumerate(summary.header):
        shown.add_column(escape(name), justify="left" if number == 0 else "right")
    for row in summary.rows:
        shown.add_row(*map(escape, row))
    return shown
