"""Video reconstruction on held-out clips, beside the naive baseline (method §5).

Every clip is rebuilt from its first frame and scored by :func:`score_clip`, a pure function of its
arguments: scored in any process, in any order, a clip has the same scores to the last bit, and so
has everything that is computed from them.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from prioritycut_ray.data.shards import Clip, ClipIndex, clips_of, read_clip, read_index
from prioritycut_ray.errors import UserError
from prioritycut_ray.evaluation.records import (
    BASELINE,
    Evaluation,
    FrameTable,
    Measures,
    Protocol,
    metrics_of,
)
from prioritycut_ray.evaluation.summary import (
    differences,
    not_finite_warnings,
    summarise,
    summary_warnings,
)
from prioritycut_ray.inference.animate import default_device, reconstruct
from prioritycut_ray.metrics.aggregate import (
    FrameScores,
    concatenate,
    every_frame,
    spoiled,
)
from prioritycut_ray.metrics.identity import identity_scores
from prioritycut_ray.metrics.landmarks import (
    Face,
    FaceFinder,
    landmark_scores,
)
from prioritycut_ray.metrics.perceptual import (
    perceptual_distance,
    perceptual_metric,
)
from prioritycut_ray.metrics.reconstruction import reconstruction_scores
from prioritycut_ray.models.animator import Animator
from prioritycut_ray.precision import float32_products
from prioritycut_ray.runs.locate import local_copy, locate_checkpoint, read_config
from prioritycut_ray.training.checkpoint import load_animator
from prioritycut_ray.video.decoding import decoder_version, read_all
from prioritycut_ray.visualize import to_uint8

Mapper = Callable[[Callable[[Any], Any], Sequence[Any]], Iterable[Any]]
"""``map``, or one that uses other processes; results in the order of the tasks."""


class ClipTask(NamedTuple):
    """All that is needed to score one clip, anywhere.

    Attributes:
        data: folder of shards, an absolute path or an fsspec URL.
        clip: which clip.
        size: side of the frames in pixels.
        checkpoints: of the models that rebuild it, all of this size.
        measures: what is measured.
    """

    data: str
    clip: Clip
    size: int
    checkpoints: tuple[str, ...]
    measures: Measures


class ScoredClip(NamedTuple):
    """The scores of one clip.

    Attributes:
        scores: of the baseline, then of each model; empty if the clip could not be decoded.
        problem: why it could not; empty if it could.
    """

    scores: list[FrameScores]
    problem: str = ""


def evaluate_runs(
    runs: Sequence[str],
    data: str,
    *,
    split: str,
    measures: Measures,
    mapper: Mapper,
    on_clip: Callable[[int, int, str], None],
    index: ClipIndex | None = None,
) -> tuple[Evaluation, FrameTable]:
    """Rebuild every clip of a split from its first frame by every run, and score it.

    Args:
        runs: runs or checkpoints of runs, absolute paths or fsspec URLs; differences are taken to
            the first.
        data: folder of shards, an absolute path or an fsspec URL.
        split: of the data set.
        measures: what is measured.
        mapper: ``map``, or one that uses other processes.
        on_clip: called after each clip with how many are done, of how many, and its key.
        index: says which clips there are, if it is not that of the data set.

    Raises:
        UserError: no usable checkpoint, no such data or split, or no clip could be decoded.
    """
    checkpoints = dict(zip(names_of(runs), map(locate_checkpoint, runs), strict=True))
    index = index or read_index(data)
    clips = clips_of(index, split)
    metrics = metrics_of(measures)
    groups: dict[int, list[str]] = {}
    for name, path in checkpoints.items():
        groups.setdefault(read_config(local_copy(path)).data.size, []).append(name)
    tasks = [
        ClipTask(data, clip, size, tuple(checkpoints[name] for name in names), measures)
        for size, names in groups.items()
        for clip in clips
    ]
    results: list[ScoredClip] = []
    for task, result in zip(tasks, mapper(score_clip, tasks), strict=True):
        results.append(result)
        on_clip(len(results), len(tasks), task.clip.key)
    skipped = {t.clip.key: r.problem for t, r in zip(tasks, results, strict=True) if r.problem}
    if len(skipped) == len(clips):
        raise UserError(f"{data}: no clip of split {split!r} could be decoded: {skipped}")
    table: FrameTable = {}
    protocols: dict[str, Protocol] = {}
    protocol_of: dict[str, str] = {}
    for size, names in groups.items():
        protocol = Protocol(
            data=index.fingerprint,
            split=split,
            size=size,
            decode_path=(f"h264 shards, {decoder_version()}, resized to {size} when decoded"),
            metrics={metric.key: metric.definition for metric in metrics},
        )
        protocols[protocol.hash()] = protocol
        baseline = BASELINE if len(groups) == 1 else f"{BASELINE} {size}²"
        for place, name in enumerate([baseline, *names]):
            protocol_of[name] = protocol.hash()
            table[name] = {
                task.clip.key: result.scores[place]
                for task, result in zip(tasks, results, strict=True)
                if task.size == size and task.clip.key not in skipped
            }
    evaluation = Evaluation(
        split=split,
        metrics=metrics,
        protocols=protocols,
        models=[
            summarise(name, checkpoints.get(name, ""), protocol_of[name], clips, scores)
            for name, scores in table.items()
        ],
        differences=differences(list(checkpoints), protocol_of, clips, table),
        skipped=skipped,
        warnings=[*summary_warnings(protocols, skipped, clips), *not_finite_warnings(table)],
    )
    return evaluation, table


def names_of(runs: Sequence[str]) -> list[str]:
    """The last parts of the runs' paths, as many as tell them apart."""
    if len(set(runs)) < len(runs):
        raise UserError("the same run is given twice: drop one of them")
    words = [tuple(run.rstrip("/").split("/")) for run in runs]
    parts = 1
    while len({word[-parts:] for word in words}) < len(runs):
        parts += 1
    return ["/".join(word[-parts:]) for word in words]


def score_clip(task: ClipTask) -> ScoredClip:
    """Rebuild one clip by every model of a task, and score it beside the baseline."""
    try:
        frames = read_all(read_clip(task.data, task.clip), task.size)
    except UserError as error:
        return ScoredClip([], str(error))
    with one_thread():
        return ScoredClip(score_frames(frames, task.checkpoints, task.measures))


@contextmanager
def one_thread() -> Iterator[None]:
    """Sums in torch depend on how many threads share them; one gives the same bits anywhere."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@float32_products(convolutions="ieee")
@torch.inference_mode()
def score_frames(
    frames: NDArray[np.uint8], checkpoints: Sequence[str], measures: Measures
) -> list[FrameScores]:
    """Scores of the baseline, then of each checkpoint.

    Args:
        frames: of one clip, `[T, S, S, 3]`.
        checkpoints: of models of that size.
        measures: what is measured.
    """
    device = default_device()
    distance, key = _distance(measures.perceptual, device)
    finder = _finder() if measures.faces else None
    true_faces = [finder.find(frame) for frame in frames] if finder else []
    baseline: list[FrameScores] = []
    models: list[FrameScores] = []
    for place, checkpoint in enumerate(checkpoints):
        parts: list[FrameScores] = []
        faces: list[Face | None] = []
        finite: list[Tensor] = []
        for rebuilt in reconstruct(_animator(checkpoint, device), frames):
            driving, prediction = rebuilt.pair.driving, rebuilt.animation.prediction
            parts.append(_similarity(prediction, driving, distance, key))
            finite.append(prediction.isfinite().flatten(1).all(dim=1).cpu())
            if place == 0:
                baseline.append(_similarity(rebuilt.pair.source, driving, distance, key))
            if finder:
                images = to_uint8(prediction).permute(0, 2, 3, 1).numpy()
                faces += [finder.find(image) for image in images]
        scores = concatenate(parts) | _face_scores(true_faces, faces)
        models.append(spoiled(scores, torch.cat(finite).numpy()))
    copied = true_faces[:1] * len(true_faces)
    return [concatenate(baseline) | _face_scores(true_faces, copied), *models]


def _similarity(predicted: Tensor, true: Tensor, distance: nn.Module, key: str) -> FrameScores:
    return reconstruction_scores(predicted, true) | {key: every_frame(distance(predicted, true))}


def _face_scores(true: Sequence[Face | None], predicted: Sequence[Face | None]) -> FrameScores:
    if not true:
        return {}
    return landmark_scores(true, predicted) | identity_scores(true, predicted)


# What a process needs for clip after clip is loaded once.


@lru_cache(maxsize=8)
def _animator(checkpoint: str, device: torch.device) -> Animator:
    return load_animator(checkpoint, device)[0]


@lru_cache(maxsize=1)
def _distance(choice: str, device: torch.device) -> tuple[nn.Module, str]:
    return perceptual_distance(choice).to(device), perceptual_metric(choice).key


@lru_cache(maxsize=1)
def _finder() -> FaceFinder:
    return FaceFinder()


# ---------------------------------------------------------------------------------------------
# Summaries
# ---------------------------------------------------------------------------------------------
