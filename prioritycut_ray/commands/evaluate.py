"""``prioritycut evaluate``."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from prioritycut_ray.data.shards import clips_of, read_index
from prioritycut_ray.errors import UserError
from prioritycut_ray.evaluation.records import Evaluation, Measures
from prioritycut_ray.evaluation.report import pick_clips, runs_of, tables, write_report
from prioritycut_ray.evaluation.scoring import Mapper, evaluate_runs
from prioritycut_ray.evaluation.showcase import Showcase, ShowcaseTask, show_clip
from prioritycut_ray.progress import ProgressBar
from prioritycut_ray.storage.paths import resolved


def evaluate(
    run: str | Path,
    data: str,
    *,
    compare: Sequence[str | Path] = (),
    split: str = "test",
    workers: int | None = None,
    measures: Measures | None = None,
    out: Path | None = None,
    console: Console,
) -> Evaluation:
    """Score runs on held-out clips and write the report.

    Args:
        run: folder or fsspec URL of a run, or of one of its checkpoints.
        data: folder of shards, or an fsspec URL.
        compare: further runs; differences are taken to the first.
        split: of the data set.
        workers: Ray tasks at once; as many as there is room for unless given, 0 = no Ray.
        measures: what is measured.
        out: folder of the results, ``RUN/evaluation/SPLIT`` unless given.
        console: where the summary goes.
    """
    if out is None and "://" in str(run):
        raise UserError(f"{run}: say with --out which folder the results of a remote run go to")
    data = resolved(data)  # Tasks run in folders of their own.
    runs = [resolved(str(place)) for place in (run, *compare)]
    mapper = _mapper(workers)
    with ProgressBar("evaluating", 1.0) as bar:
        evaluation, table = evaluate_runs(
            runs,
            data,
            split=split,
            measures=measures or Measures(),
            mapper=mapper,
            on_clip=lambda done, total, key: bar.update(done / total, f"{done}/{total} {key}"),
        )
    shown = _showcases(evaluation, data, mapper)
    folder = out or Path(run) / "evaluation" / split
    files = write_report(folder, evaluation, table, shown)
    for key, reason in evaluation.skipped.items():
        console.print(f"skipped: {key}: {reason}", markup=False)
    for warning in evaluation.warnings:
        console.print(f"warning: {warning}", markup=False)
    for shown_table in tables(evaluation)[:4]:
        if shown_table.rows:
            console.print(_terminal_table(shown_table.title, shown_table.header, shown_table.rows))
    names = ", ".join(file.name for file in files)
    console.print(f"Written: {folder}/ ({names})", markup=False)
    return evaluation


def _mapper(workers: int | None) -> Mapper:
    """The built-in ``map`` without workers, Ray tasks otherwise."""
    if workers == 0:
        return map
    return _on_ray if workers is None else partial(_on_ray, workers=workers)


def _on_ray(
    function: Callable[[Any], Any], items: Sequence[Any], workers: int | None = None
) -> Iterator[Any]:
    from prioritycut_ray.ray_cluster.tasks import map_tasks

    return map_tasks(function, items, workers=workers)


def _showcases(evaluation: Evaluation, data: str, mapper: Mapper) -> dict[str, dict[str, Showcase]]:
    """Draw the best and the worst clips of the first run, by every run."""
    runs = runs_of(evaluation)
    clips = {clip.key: clip for clip in clips_of(read_index(data), evaluation.split)}
    best, worst = pick_clips(runs[0])
    keys = [*best, *worst]
    tasks = [ShowcaseTask(data, clips[key], run.checkpoint) for key in keys for run in runs]
    drawn = iter(mapper(show_clip, tasks))
    return {key: {run.name: next(drawn) for run in runs} for key in keys}


def _terminal_table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    table = Table(title=title)
    for place, name in enumerate(header):
        table.add_column(escape(name), justify="left" if place == 0 else "right")
    for row in rows:
        table.add_row(*map(escape, row))
    return table
