"""Evaluate runs on the held-out clips of a split (method §5)."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from prioritycut_ray.data.index import ClipIndex, clips_of, read_index
from prioritycut_ray.data.shards import Clip
from prioritycut_ray.errors import UserError
from prioritycut_ray.evaluation.measures import Measures, selected_metrics
from prioritycut_ray.evaluation.records import BASELINE, Evaluation, FrameTable, Protocol
from prioritycut_ray.evaluation.scoring import ClipTask, Mapper, ScoredClip, score_clip
from prioritycut_ray.evaluation.summary import (
    differences,
    not_finite_warnings,
    summarise,
    summary_warnings,
)
from prioritycut_ray.metrics.aggregate import Metric
from prioritycut_ray.metrics.transfer import unvalidated_warnings
from prioritycut_ray.runs.locate import local_copy, locate_checkpoint, read_config
from prioritycut_ray.video.random_access import decoder_version

OnClip = Callable[[int, int, str], None]
"""Called after each clip with the number of clips done, the total, and the clip's key."""


class SizeGroup(NamedTuple):
    """The runs of one frame size: they share the decoded clips, the baseline and the protocol.

    Attributes:
        protocol: of all scores of the group.
        baseline: name of the baseline.
        checkpoints: by the name of the run.
    """

    protocol: Protocol
    baseline: str
    checkpoints: dict[str, str]


def evaluate_runs(
    runs: Sequence[str],
    data: str,
    *,
    split: str,
    measures: Measures,
    mapper: Mapper,
    on_clip: OnClip,
    index: ClipIndex | None = None,
) -> tuple[Evaluation, FrameTable]:
    """Rebuild every clip of a split from its first frame by every run, and score it.

    Args:
        runs: runs or checkpoints, as absolute paths or fsspec URLs; differences are taken to the
            first.
        data: folder of shards, an absolute path or an fsspec URL.
        split: of the data set.
        measures: what to measure.
        mapper: ``map``, or one that uses other processes.
        on_clip: see :data:`OnClip`.
        index: lists the clips; the data set's own index by default.

    Raises:
        UserError: a run has no usable checkpoint, the data or split does not exist, or no clip
            could be decoded.
    """
    index = read_index(data) if index is None else index
    clips = clips_of(index, split)
    metrics = selected_metrics(measures)
    groups = _group_by_size(runs, split, index.fingerprint, metrics)
    sources = _other_identities(clips, split) if measures.transfer else {}
    tasks = [
        ClipTask(
            data,
            clip,
            group.protocol.size,
            tuple(group.checkpoints.values()),
            measures,
            sources.get(clip.identity),
        )
        for group in groups
        for clip in clips
    ]
    results = _score(tasks, mapper, on_clip)
    skipped = {t.clip.key: r.problem for t, r in zip(tasks, results, strict=True) if r.problem}
    if len(skipped) == len(clips):
        raise UserError(f"{data}: no clip of split {split!r} could be decoded: {skipped}")
    table = _frame_table(groups, tasks, results, skipped)
    return _evaluation(split, metrics, groups, clips, table, skipped), table


def short_names(runs: Sequence[str]) -> list[str]:
    """Return the last parts of the runs' paths, as many as make them distinct.

    Raises:
        UserError: the same run is given twice.
    """
    paths = [tuple(run.rstrip("/").split("/")) for run in runs]
    if len(set(paths)) < len(runs):
        raise UserError("the same run is given twice: drop one of them")
    parts = 1
    while len({path[-parts:] for path in paths}) < len(runs):
        parts += 1
    return ["/".join(path[-parts:]) for path in paths]


def _other_identities(clips: Sequence[Clip], split: str) -> dict[str, Clip]:
    """Return the first clip of the next identity, by identity, in the order of the index.

    Raises:
        UserError: all clips show one identity.
    """
    firsts: dict[str, Clip] = {}
    for clip in clips:
        firsts.setdefault(clip.identity, clip)
    if len(firsts) == 1:
        raise UserError(
            f"split {split!r} has one identity, and --transfer animates another one: drop "
            "--transfer, or choose a split of several identities"
        )
    others = [*firsts.values()][1:] + [*firsts.values()][:1]
    return dict(zip(firsts, others, strict=True))


def _group_by_size(
    runs: Sequence[str], split: str, fingerprint: str, metrics: Sequence[Metric]
) -> list[SizeGroup]:
    by_size: dict[int, dict[str, str]] = {}
    for name, run in zip(short_names(runs), runs, strict=True):
        checkpoint = locate_checkpoint(run)
        size = read_config(local_copy(checkpoint)).data.size
        by_size.setdefault(size, {})[name] = checkpoint
    return [
        SizeGroup(
            Protocol(
                data=fingerprint,
                split=split,
                size=size,
                decode_path=f"h264 shards, {decoder_version()}, resized to {size} when decoded",
                metrics={metric.key: metric.definition for metric in metrics},
            ),
            BASELINE if len(by_size) == 1 else f"{BASELINE} {size}²",
            checkpoints,
        )
        for size, checkpoints in by_size.items()
    ]


def _score(tasks: Sequence[ClipTask], mapper: Mapper, on_clip: OnClip) -> list[ScoredClip]:
    results: list[ScoredClip] = []
    for task, result in zip(tasks, mapper(score_clip, tasks), strict=True):
        results.append(result)
        on_clip(len(results), len(tasks), task.clip.key)
    return results


def _frame_table(
    groups: Sequence[SizeGroup],
    tasks: Sequence[ClipTask],
    results: Sequence[ScoredClip],
    skipped: dict[str, str],
) -> FrameTable:
    """Sort the scores by model and clip; a clip that was skipped is left out for all models."""
    table: FrameTable = {}
    for group in groups:
        for number, name in enumerate([group.baseline, *group.checkpoints]):
            table[name] = {
                task.clip.key: result.scores[number]
                for task, result in zip(tasks, results, strict=True)
                if task.size == group.protocol.size and task.clip.key not in skipped
            }
    return table


def _evaluation(
    split: str,
    metrics: tuple[Metric, ...],
    groups: Sequence[SizeGroup],
    clips: Sequence[Clip],
    table: FrameTable,
    skipped: dict[str, str],
) -> Evaluation:
    protocols = {group.protocol.hash(): group.protocol for group in groups}
    checkpoints = {name: path for group in groups for name, path in group.checkpoints.items()}
    protocol_of = {
        name: group.protocol.hash()
        for group in groups
        for name in (group.baseline, *group.checkpoints)
    }
    return Evaluation(
        split=split,
        metrics=metrics,
        protocols=protocols,
        models=[
            summarise(name, checkpoints.get(name, ""), protocol_of[name], clips, scores)
            for name, scores in table.items()
        ],
        differences=differences(list(checkpoints), protocol_of, clips, table),
        skipped=skipped,
        warnings=[
            *summary_warnings(protocols, skipped, clips),
            *not_finite_warnings(table),
            *unvalidated_warnings(metrics),
        ],
    )
