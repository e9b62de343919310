"""The paired comparison of a candidate with the current model and the anchor, on the same clips."""

from collections.abc import Sequence
from typing import NamedTuple

from pydantic import BaseModel, ConfigDict

from prioritycut_ray.data.index import ClipIndex, clips_of, were_seen
from prioritycut_ray.data.shards import Clip
from prioritycut_ray.errors import UserError
from prioritycut_ray.evaluation.evaluate import evaluate_runs, short_names
from prioritycut_ray.evaluation.measures import Measures
from prioritycut_ray.evaluation.records import FrameTable
from prioritycut_ray.evaluation.scoring import Mapper
from prioritycut_ray.metrics.aggregate import (
    Estimate,
    Metric,
    difference_of_clip,
    difference_over_clips,
    mean_over_clips,
)
from prioritycut_ray.progress import ProgressBar
from prioritycut_ray.retraining.settings import RetrainSettings
from prioritycut_ray.retraining.slices import slice_values

FIXED = "fixed"
"""Held-out clips that were in the current model's data set."""
NEW = "new"
"""Held-out clips that were added since."""
ALL = "all"
"""All held-out clips: the fixed and the new holdout together."""


class ClipChange(BaseModel):
    """The paired differences of one held-out clip, by metric; None if no frame counts.

    Attributes:
        key: of the clip.
        identity: of the clip.
        holdout: :data:`FIXED` or :data:`NEW`.
        slices: the clip's value of each key in ``gate.slices``.
        since_current: candidate − current model.
        since_anchor: candidate − anchor.
    """

    model_config = ConfigDict(frozen=True, ser_json_inf_nan="strings")

    key: str
    identity: str
    holdout: str
    slices: dict[str, str]
    since_current: dict[str, float | None]
    since_anchor: dict[str, float | None]


class Comparison(BaseModel):
    """The comparison that the gate decides on; all means are over clips.

    Attributes:
        metrics: the measured metrics.
        clips: number of clips by holdout.
        candidate: the candidate's scores by holdout and metric.
        current: the current model's scores by holdout and metric.
        differences: candidate − current, by holdout and metric.
        anchor: path or URL of the anchor's checkpoint.
        since_anchor: candidate − anchor by metric, over all held-out clips.
        changes: the differences of each clip, from which the gate computes its bounds.
        skipped: clips that could not be decoded, with the reason.
        warnings: what a reader of the numbers must know.
    """

    metrics: tuple[Metric, ...]
    clips: dict[str, int]
    candidate: dict[str, dict[str, Estimate]]
    current: dict[str, dict[str, Estimate]]
    differences: dict[str, dict[str, Estimate]]
    anchor: str
    since_anchor: dict[str, Estimate]
    changes: list[ClipChange]
    skipped: dict[str, str]
    warnings: list[str]


class Models(NamedTuple):
    """The three models of a comparison: paths or URLs of checkpoints, or their names in a table."""

    current: str
    candidate: str
    anchor: str


def compare(
    models: Models,
    settings: RetrainSettings,
    index: ClipIndex,
    seen: ClipIndex,
    leaks: dict[str, str],
    mapper: Mapper,
) -> Comparison:
    """Evaluate the models on the same clips.

    Args:
        models: paths or URLs of their checkpoints; the anchor may be the current model.
        settings: the settings of the retraining.
        index: index of the data set that the job has pinned.
        seen: index of the data set that the current model was trained on.
        leaks: held-out clips to leave out, with the reason, by key.
        mapper: see :func:`evaluate_runs`.

    Raises:
        UserError: the fixed holdout is empty, or no clip has a key of ``gate.slices``.
    """
    runs = list(dict.fromkeys(models))
    with ProgressBar("comparing", 1.0) as bar:
        evaluation, table = evaluate_runs(
            runs,
            settings.data,
            split=settings.holdout,
            measures=Measures(settings.lpips, settings.faces, settings.transfer),
            mapper=mapper,
            on_clip=lambda done, total, key: bar.update(done / total, f"{done}/{total} {key}"),
            index=index,
        )
    skipped = evaluation.skipped | leaks
    every = clips_of(index, settings.holdout)
    pairs = [
        (clip, is_old)
        for clip, is_old in zip(every, were_seen(every, seen).tolist(), strict=True)
        if clip.key not in skipped
    ]
    clips, fixed = [clip for clip, _ in pairs], [is_old for _, is_old in pairs]
    if not any(fixed):
        raise UserError(
            f"{settings.data}: split {settings.holdout!r} has none of the clips that the current "
            f"model was evaluated on{', except leaks' if leaks else ''}; hold out the same clips "
            "as before, and none that training shows"
        )
    name_of = dict(zip(runs, short_names(runs), strict=True))
    comparison = compare_scores(
        Models(*(name_of[run] for run in models)),
        clips,
        fixed,
        slice_values(settings.data, clips, settings.gate.slices),
        table,
        evaluation.metrics,
    )
    return comparison.model_copy(
        update={
            "anchor": models.anchor,
            "skipped": skipped,
            "warnings": evaluation.warnings,
        }
    )


def compare_scores(
    models: Models,
    clips: Sequence[Clip],
    fixed: Sequence[bool],
    slices: Sequence[dict[str, str]],
    table: FrameTable,
    metrics: tuple[Metric, ...],
) -> Comparison:
    """Compare models whose scores are known.

    Args:
        models: their names in the table.
        clips: the held-out clips.
        fixed: whether each clip was in the current model's data set.
        slices: each clip's value of each key in ``gate.slices``.
        table: the scores of all models on all clips.
        metrics: the measured metrics.
    """
    holdout_of = [FIXED if is_fixed else NEW for is_fixed in fixed]
    holdouts = {FIXED: _of(FIXED, clips, holdout_of), ALL: clips}
    if new := _of(NEW, clips, holdout_of):
        holdouts[NEW] = new
    since_current = (models.candidate, models.current)
    since_anchor = (models.candidate, models.anchor)
    return Comparison(
        metrics=metrics,
        clips={name: len(own) for name, own in holdouts.items()},
        candidate={name: _means(models.candidate, own, table) for name, own in holdouts.items()},
        current={name: _means(models.current, own, table) for name, own in holdouts.items()},
        differences={
            name: _differences(since_current, own, table) for name, own in holdouts.items()
        },
        anchor=models.anchor,
        since_anchor=_differences(since_anchor, clips, table),
        changes=[
            ClipChange(
                key=clip.key,
                identity=clip.identity,
                holdout=holdout,
                slices=own,
                since_current=_change(since_current, clip, table),
                since_anchor=_change(since_anchor, clip, table),
            )
            for clip, holdout, own in zip(clips, holdout_of, slices, strict=True)
        ],
        skipped={},
        warnings=[],
    )


def _of(holdout: str, clips: Sequence[Clip], holdout_of: Sequence[str]) -> Sequence[Clip]:
    return [clip for clip, own in zip(clips, holdout_of, strict=True) if own == holdout]


def _means(model: str, clips: Sequence[Clip], table: FrameTable) -> dict[str, Estimate]:
    identities = [clip.identity for clip in clips]
    return {
        key: mean_over_clips(key, [table[model][clip.key][key] for clip in clips], identities)
        for key in table[model][clips[0].key]
    }


def _differences(
    pair: tuple[str, str], clips: Sequence[Clip], table: FrameTable
) -> dict[str, Estimate]:
    model, reference = pair
    identities = [clip.identity for clip in clips]
    return {
        key: difference_over_clips(
            key,
            [(table[model][c.key][key], table[reference][c.key][key]) for c in clips],
            identities,
        )
        for key in table[model][clips[0].key]
    }


def _change(pair: tuple[str, str], clip: Clip, table: FrameTable) -> dict[str, float | None]:
    model, reference = (table[name][clip.key] for name in pair)
    return {key: difference_of_clip(key, model[key], reference[key]) for key in model}
