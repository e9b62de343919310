"""``models diff``: two models on the same held-out clips, side by side and by slices."""

import base64
import io
import math
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from prioritycut_ray.data.index import clips_of, read_index
from prioritycut_ray.data.shards import Clip, read_clip
from prioritycut_ray.evaluation.evaluate import evaluate_runs, short_names
from prioritycut_ray.evaluation.measures import Measures
from prioritycut_ray.evaluation.records import Evaluation
from prioritycut_ray.evaluation.scoring import Mapper
from prioritycut_ray.evaluation.tables import Table, metric_label, number_text, summary_tables
from prioritycut_ray.inference.animate import default_device, reconstruct
from prioritycut_ray.metrics.aggregate import Metric, difference_of_clip
from prioritycut_ray.precision import float32_products
from prioritycut_ray.progress import ProgressBar
from prioritycut_ray.retraining.slices import slice_values
from prioritycut_ray.retraining.worsening import worsening
from prioritycut_ray.storage.atomic import write_atomically
from prioritycut_ray.templates import render
from prioritycut_ray.training.checkpoint import load_animator
from prioritycut_ray.video.encoding import write_video
from prioritycut_ray.video.random_access import read_all
from prioritycut_ray.visualize import tiles

SHOWN = 4
"""Clips to show on which the second model is worst, and on which it is best."""
MOST_FRAMES = 250
PAGE = "diff.html"
NOTABLE = 0.05
"""A slice with a smaller p-value, shared by all slices, is marked."""


class PairTask(NamedTuple):
    """A clip that two models of the same frame size rebuild."""

    data: str
    clip: Clip
    checkpoints: tuple[str, str]


class ShownClip(NamedTuple):
    """A clip on the page.

    Attributes:
        clip: which.
        change: second − first model, L1.
        video: data URI of driving · first · second.
    """

    clip: Clip
    change: str
    video: str


def write_diff(
    runs: tuple[str, str],
    data: str,
    split: str,
    slices: Collection[str],
    folder: Path,
    measures: Measures,
    mapper: Mapper,
) -> tuple[Path, Evaluation, Table]:
    """Compare two models on a split, and write the page.

    Args:
        runs: runs or checkpoints, as absolute paths or fsspec URLs.
        data: folder of shards, an absolute path or an fsspec URL.
        split: of the data set.
        slices: what slices are made from: ``identity``, or keys of the clips' JSON.
        folder: of the page; created if it does not exist.
        measures: what to measure.
        mapper: ``map``, or one that uses other processes.

    Returns:
        The page, the evaluation, and the table of the slices.

    Raises:
        UserError: a run has no usable checkpoint, the data or split does not exist, no clip could
            be decoded, or no clip has a key of the slices.
    """
    with ProgressBar("comparing", 1.0) as bar:
        evaluation, table = evaluate_runs(
            runs,
            data,
            split=split,
            measures=measures,
            mapper=mapper,
            on_clip=lambda done, total, key: bar.update(done / total, f"{done}/{total} {key}"),
        )
    first, second = short_names(runs)
    clips = [c for c in clips_of(read_index(data), split) if c.key not in evaluation.skipped]
    changes = [
        {
            metric.key: difference_of_clip(
                metric.key,
                table[second][clip.key][metric.key],
                table[first][clip.key][metric.key],
            )
            for metric in evaluation.metrics
        }
        for clip in clips
    ]
    of_slices = slice_table(clips, changes, evaluation.metrics, slice_values(data, clips, slices))
    l1 = evaluation.metrics[0]
    ranked = sorted(range(len(clips)), key=lambda n: _or_zero(changes[n][l1.key]))
    count = min(SHOWN, (len(ranked) + 1) // 2)
    best, worst = ranked[:count], ranked[::-1][: min(count, len(ranked) - count)]
    checkpoints = [evaluation.model(name).checkpoint for name in (first, second)]
    tasks = [PairTask(data, clips[n], (checkpoints[0], checkpoints[1])) for n in (*worst, *best)]
    shown = [
        ShownClip(clips[n], number_text(l1, changes[n][l1.key]), _data_uri(video))
        for n, video in zip((*worst, *best), mapper(pair_video, tasks), strict=True)
    ]
    page = render(
        "diff.html.j2",
        first=first,
        second=second,
        evaluation=evaluation,
        tables=[*summary_tables(evaluation), of_slices],
        sections=[
            (f"Clips on which {second} is worst", shown[: len(worst)]),
            (f"Clips on which {second} is best", shown[len(worst) :]),
        ],
        most_frames=MOST_FRAMES,
    )
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / PAGE, page.encode())
    return folder / PAGE, evaluation, of_slices


def slice_table(
    clips: Sequence[Clip],
    changes: Sequence[dict[str, float | None]],
    metrics: Sequence[Metric],
    values: Sequence[dict[str, str]],
) -> Table:
    """Return the mean change of every slice; ``*`` marks those that chance does not explain.

    Args:
        clips: the clips.
        changes: of each clip, by metric.
        metrics: the measured metrics.
        values: the slices of each clip.
    """
    keys = [(key, value) for key in values[0] for value in sorted({own[key] for own in values})]
    rows = []
    for key, value in keys:
        own = [n for n, of_clip in enumerate(values) if of_clip[key] == value]
        identities = {clips[n].identity for n in own}
        units = [clips[n].key if len(identities) == 1 else clips[n].identity for n in own]
        cells = [
            _change_text(metric, [changes[n][metric.key] for n in own], units, len(keys))
            for metric in metrics
        ]
        rows.append([f"{key}={value}", str(len(own)), str(len(identities)), *cells])
    labels = [metric_label(metric) for metric in metrics]
    return Table(
        "Slices, second − first, mean over clips (* chance does not explain it)",
        ["slice", "clips", "identities", *labels],
        rows,
    )


def _change_text(
    metric: Metric, changes: Sequence[float | None], units: Sequence[str], slices: int
) -> str:
    known = [(v, unit) for v, unit in zip(changes, units, strict=True) if v is not None]
    found = worsening([v for v, _ in known], [unit for _, unit in known])
    if found is None:
        return number_text(metric, None)
    up = found.p_value()
    notable = min(up, 1 - up) * 2 * slices <= NOTABLE and found.identities > 1
    return number_text(metric, found.value) + " *" * notable


def pair_video(task: PairTask) -> bytes:
    """Rebuild a clip by both models: an mp4 of driving · first · second."""
    device = default_device()
    (first, config), (second, _) = (load_animator(c, device) for c in task.checkpoints)
    frames = read_all(read_clip(task.data, task.clip), config.data.size)[:MOST_FRAMES]

    def rows() -> Iterator[NDArray[np.uint8]]:
        for one, other in zip(reconstruct(first, frames), reconstruct(second, frames), strict=True):
            pictures = [one.pair.driving, one.animation.prediction, other.animation.prediction]
            yield from tiles(pictures).numpy()

    video = io.BytesIO()
    with float32_products(convolutions="ieee"), torch.inference_mode():
        write_video(video, rows(), task.clip.fps, crf=23)
    return video.getvalue()


def _or_zero(value: float | None) -> float:
    return value if value is not None and math.isfinite(value) else 0.0


def _data_uri(video: bytes) -> str:
    return f"data:video/mp4;base64,{base64.b64encode(video).decode()}"
