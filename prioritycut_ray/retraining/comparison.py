"""Candidate against current model on the same held-out clips, paired, with intervals."""

from collections.abc import Sequence
from itertools import compress

from pydantic import BaseModel

from prioritycut_ray.data.shards import Clip, ClipIndex, clips_of, were_seen
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
"""Held-out clips that the current model's data set had already."""
NEW = "new"
"""Held-out clips that came since."""


class Comparison(BaseModel):
    """What the gate judges by; all means are over clips.

    Attributes:
        metrics: what the numbers mean.
        clips: how many, by holdout.
        candidate: scores by holdout and metric.
        current: the same of the current model.
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
    """Evaluate both on the same clips.

    Args:
        current: path or URL of the current model's checkpoint.
        candidate: of the candidate's.
        settings: of the retraining.
        index: of the data set as the job has pinned it.
        seen: of the data set when the current model was made.
        mapper: see :func:`evaluate_runs`.

    Raises:
        UserError: no clip is left of the fixed holdout.
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
    clips = [c for c in clips_of(index, settings.holdout) if c.key not in evaluation.skipped]
    fixed = [*compress(clips, were_seen(clips, seen))]
    if not fixed:
        raise UserError(
            f"{settings.data}: no clip of split {settings.holdout!r} is one that the current model "
            "was judged on; hold out the same clips as before"
        )
    new = [clip for clip in clips if clip not in fixed]
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
