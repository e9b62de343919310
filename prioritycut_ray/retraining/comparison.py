"""The paired comparison of a candidate and the current model on the same held-out clips."""

from collections.abc import Sequence

from pydantic import BaseModel

from prioritycut_ray.data.index import ClipIndex, clips_of, were_seen
from prioritycut_ray.data.shards import Clip
from prioritycut_ray.errors import UserError
from prioritycut_ray.evaluation.evaluate import evaluate_runs, short_names
from prioritycut_ray.evaluation.measures import Measures
from prioritycut_ray.evaluation.records import FrameTable
from prioritycut_ray.evaluation.scoring import Mapper
from prioritycut_ray.evaluation.summary import summarise
from prioritycut_ray.metrics.aggregate import Estimate, Metric, difference_over_clips
from prioritycut_ray.progress import ProgressBar
from prioritycut_ray.retraining.gate import ALL
from prioritycut_ray.retraining.settings import RetrainSettings

FIXED = "fixed"
"""Held-out clips that were in the current model's data set."""
NEW = "new"
"""Held-out clips that were added since."""


class Comparison(BaseModel):
    """The comparison that the gate decides on; all means are over clips.

    Attributes:
        metrics: the measured metrics.
        clips: number of clips by holdout.
        candidate: the candidate's scores by holdout and metric.
        current: the current model's scores by holdout and metric.
        differences: candidate − current, by holdout and metric.
        skipped: clips that could not be decoded, with the reason.
        warnings: what a reader of the numbers must know.
    """

    metrics: tuple[Metric, ...]
    clips: dict[str, int]
    candidate: dict[str, dict[str, Estimate]]
    current: dict[str, dict[str, Estimate]]
    differences: dict[str, dict[str, Estimate]]
    skipped: dict[str, str]
    warnings: list[str]


def compare(
    current: str,
    candidate: str,
    settings: RetrainSettings,
    index: ClipIndex,
    seen: ClipIndex,
    mapper: Mapper,
) -> Comparison:
    """Evaluate both models on the same clips.

    Args:
        current: path or URL of the current model's checkpoint.
        candidate: path or URL of the candidate's checkpoint.
        settings: the settings of the retraining.
        index: index of the data set that the job has pinned.
        seen: index of the data set that the current model was trained on.
        mapper: see :func:`evaluate_runs`.

    Raises:
        UserError: the fixed holdout is empty.
    """
    runs = [current, candidate]
    with ProgressBar("comparing", 1.0) as bar:
        evaluation, table = evaluate_runs(
            runs,
            settings.data,
            split=settings.holdout,
            measures=Measures(settings.lpips, settings.faces),
            mapper=mapper,
            on_clip=lambda done, total, key: bar.update(done / total, f"{done}/{total} {key}"),
            index=index,
        )
    holdout = clips_of(index, settings.holdout)
    pairs = [
        (clip, is_old)
        for clip, is_old in zip(holdout, were_seen(holdout, seen).tolist(), strict=True)
        if clip.key not in evaluation.skipped
    ]
    clips = [clip for clip, _ in pairs]
    fixed = [clip for clip, is_old in pairs if is_old]
    if not fixed:
        raise UserError(
            f"{settings.data}: split {settings.holdout!r} has none of the clips that the current "
            "model was evaluated on; hold out the same clips as before"
        )
    new = [clip for clip, is_old in pairs if not is_old]
    holdouts = {FIXED: fixed, ALL: clips} | ({NEW: new} if new else {})
    of_current, of_candidate = short_names(runs)
    return Comparison(
        metrics=evaluation.metrics,
        clips={name: len(own) for name, own in holdouts.items()},
        candidate={name: _means(of_candidate, own, table) for name, own in holdouts.items()},
        current={name: _means(of_current, own, table) for name, own in holdouts.items()},
        differences={
            name: _differences(of_candidate, of_current, own, table)
            for name, own in holdouts.items()
        },
        skipped=evaluation.skipped,
        warnings=evaluation.warnings,
    )


def _means(model: str, clips: Sequence[Clip], table: FrameTable) -> dict[str, Estimate]:
    scores = {clip.key: table[model][clip.key] for clip in clips}
    return summarise(model, "", "", clips, scores).mean_over_clips


def _differences(
    model: str, reference: str, clips: Sequence[Clip], table: FrameTable
) -> dict[str, Estimate]:
    identities = [clip.identity for clip in clips]
    keys = list(table[model][clips[0].key])
    return {
        key: difference_over_clips(
            key,
            [(table[model][c.key][key], table[reference][c.key][key]) for c in clips],
            identities,
        )
        for key in keys
    }
