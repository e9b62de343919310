"""Evaluation with a progress bar, in Ray tasks: ``prioritycut evaluate``, and for programs."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from prioritycut_ray.errors import UserError
from prioritycut_ray.evaluation.evaluate import evaluate_runs
from prioritycut_ray.evaluation.measures import Measures
from prioritycut_ray.evaluation.records import Evaluation
from prioritycut_ray.evaluation.report import write_report
from prioritycut_ray.evaluation.scoring import Mapper
from prioritycut_ray.evaluation.showcase import draw_showcases
from prioritycut_ray.progress import ProgressBar
from prioritycut_ray.runs.locate import run_of_best
from prioritycut_ray.storage.paths import is_url, resolved


def evaluate(
    run: str | Path,
    data: str | Path,
    *,
    compare: Sequence[str | Path] = (),
    split: str = "test",
    workers: int | None = None,
    lpips: str = "proxy",
    faces: bool = False,
    transfer: bool = False,
    out: str | Path | None = None,
) -> Evaluation:
    """Score runs on held-out clips and write the report; see docs/evaluation.md.

    Every clip is rebuilt from its first frame.

    Args:
        run: a run, one of its checkpoints or ``RUN/best``, a folder or an fsspec URL.
        data: folder of shards, or an fsspec URL.
        compare: further runs; differences are taken to ``run``.
        split: of the data set.
        workers: number of Ray tasks at a time; by default as many as the cluster has room for. 0
            evaluates in this process, without Ray. The scores are the same for any number.
        lpips: ``proxy`` (EfficientNet-Lite0, not LPIPS), ``hub`` (LPIPS with torchvision's
            AlexNet), or a file of torchvision's AlexNet or VGG-16 weights.
        faces: also measure AKD, MKR and AED; needs the extra ``faces``.
        transfer: also animate the first frame of another identity with each clip's motion, and
            measure identity distance, pose transfer and flicker.
        out: folder of the report; ``RUN/evaluation/SPLIT`` by default.

    Returns:
        Means with intervals, paired differences, and the scores of each clip.

    Raises:
        UserError: a run has no usable checkpoint, the data or split does not exist, no clip could
            be decoded, or the report would be written to a URL.
    """
    folder = report_folder(run, out, "evaluation", split)
    data = resolved(str(data))  # Tasks run in folders of their own.
    runs = [resolved(str(place)) for place in (run, *compare)]
    mapper = task_mapper(workers)
    with ProgressBar("evaluating", 1.0) as bar:
        evaluation, table = evaluate_runs(
            runs,
            data,
            split=split,
            measures=Measures(lpips, faces, transfer),
            mapper=mapper,
            on_clip=lambda done, total, key: bar.update(done / total, f"{done}/{total} {key}"),
        )
    write_report(folder, evaluation, table, draw_showcases(evaluation, data, mapper))
    return evaluation


def report_folder(run: str | Path, out: str | Path | None, *names: str) -> Path:
    """Return the folder that a report on a run is written to: ``out``, or these names in the run.

    Raises:
        UserError: the folder is at a URL.
    """
    place = resolved(str(run if out is None else out))
    if out is None:
        place = run_of_best(place) or place
    if is_url(place):
        raise UserError(f"{place}: a report is written to a local folder; set --out to one")
    return Path(place) if out is not None else Path(place, *names)


def task_mapper(workers: int | None) -> Mapper:
    """Return the built-in ``map`` for 0 workers, or Ray tasks."""
    if workers == 0:
        return map
    from prioritycut_ray.ray_cluster.tasks import map_tasks  # ray is slow to import

    return partial(map_tasks, workers=workers)
