"""An evaluation as files: JSON, CSV, Markdown, pictures, and a self-contained HTML page."""

import csv
import io
from collections.abc import Iterable, Sequence
from pathlib import Path

from prioritycut_ray.evaluation.page import html
from prioritycut_ray.evaluation.records import Evaluation, FrameTable
from prioritycut_ray.evaluation.showcase import Showcases, png_bytes
from prioritycut_ray.evaluation.tables import detail_tables, summary_tables
from prioritycut_ray.metrics.aggregate import Tally, value_of
from prioritycut_ray.templates import render
from prioritycut_ray.visualize import stack


def write_report(
    folder: Path, evaluation: Evaluation, table: FrameTable, showcases: Showcases
) -> list[Path]:
    """Write all files of a report.

    Args:
        folder: created if it does not exist.
        evaluation: of one or more runs.
        table: the tallies behind it.
        showcases: of the best and worst clips of the first run.

    Returns:
        The files.
    """
    folder.mkdir(parents=True, exist_ok=True)
    files = {
        "evaluation.json": evaluation.model_dump_json(indent=1),
        "clips.csv": csv_text(_clip_rows(evaluation)),
        "frames.csv": csv_text(_frame_rows(evaluation, table)),
        "report.md": markdown(evaluation),
        "report.html": html(evaluation, table, showcases),
    }
    for name, text in files.items():
        (folder / name).write_text(text, encoding="utf-8")
    first = evaluation.runs[0].name
    columns = stack([by_run[first].columns for by_run in showcases.values()])
    (folder / "columns.png").write_bytes(png_bytes(columns))
    return [folder / name for name in (*files, "columns.png")]


def markdown(evaluation: Evaluation) -> str:
    """Return the tables and the protocol as Markdown."""
    tables = [*summary_tables(evaluation), *detail_tables(evaluation)]
    return render("report.md.j2", evaluation=evaluation, tables=tables)


def csv_text(rows: Iterable[Sequence[object]]) -> str:
    """Return a table as CSV."""
    text = io.StringIO(newline="")
    csv.writer(text).writerows(rows)
    return text.getvalue()


def _clip_rows(evaluation: Evaluation) -> Iterable[Sequence[object]]:
    keys = [metric.key for metric in evaluation.metrics]
    yield ["model", "protocol", "clip", "identity", "frames", *keys, *(f"{k}_frames" for k in keys)]
    for model in evaluation.models:
        for clip in model.clips:
            yield [
                *(model.name, model.protocol, clip.key, clip.identity, clip.frames),
                *(clip.values[key] for key in keys),
                *(clip.counted[key] for key in keys),
            ]


def _frame_rows(evaluation: Evaluation, table: FrameTable) -> Iterable[Sequence[object]]:
    keys = [metric.key for metric in evaluation.metrics]
    yield ["model", "clip", "frame", *keys]
    for model in evaluation.models:
        for clip, scores in table[model.name].items():
            for frame in range(len(scores["l1"].numerator)):
                yield [model.name, clip, frame, *(_at(key, scores[key], frame) for key in keys)]


def _at(key: str, tally: Tally, frame: int) -> float | None:
    return value_of(key, Tally(*(part[frame : frame + 1] for part in tally)))
