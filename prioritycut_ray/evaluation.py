"""Video reconstruction on held-out clips, beside the naive baseline (method §5).

Every clip is rebuilt from its first frame and scored by :func:`score_clip`, a pure function of its
arguments: scored in any process, in any order, a clip has the same scores to the last bit, and so
has everything that is computed from them.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from importlib.metadata import version
from statistics import fmean
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn

from prioritycut_ray.checkpoint import load_animator, local_copy, locate_checkpoint, read_config
from prioritycut_ray.data.shards import Clip, ClipIndex, clips_of, read_clip, read_index
from prioritycut_ray.data.video import decoder_version, read_all
from prioritycut_ray.errors import UserError
from prioritycut_ray.inference import default_device, reconstruct
from prioritycut_ray.metrics.aggregate import (
    Estimate,
    FrameScores,
    Metric,
    concatenate,
    difference_over_clips,
    difference_over_frames,
    every_frame,
    mean_over_clips,
    mean_over_frames,
    spoiled,
    value_of,
)
from prioritycut_ray.metrics.identity import identity_metric, identity_scores
from prioritycut_ray.metrics.landmarks import (
    Face,
    FaceFinder,
    check_installed,
    landmark_metrics,
    landmark_scores,
)
from prioritycut_ray.metrics.perceptual import (
    PROXY,
    perceptual_distance,
    perceptual_metric,
)
from prioritycut_ray.metrics.reconstruction import reconstruction_scores
from prioritycut_ray.models.animator import Animator
from prioritycut_ray.precision import float32_products
from prioritycut_ray.visualize import to_uint8

BASELINE = "copy source"
"""Predicts the first frame for every frame of a clip."""
FEW_IDENTITIES = 10
"""Below it the bootstrap has too little to resample, and the report says so."""

FrameTable = dict[str, dict[str, FrameScores]]
"""The tallies behind an evaluation: by the name of the model, then by the key of the clip."""
Mapper = Callable[[Callable[[Any], Any], Sequence[Any]], Iterable[Any]]
"""``map``, or one that uses other processes; results in the order of the tasks."""


class Measures(NamedTuple):
    """What is measured beside L1, PSNR and SSIM.

    Attributes:
        perceptual: see :func:`prioritycut_ray.metrics.perceptual.perceptual_metric`.
        faces: also AKD, MKR and AED, by the extra ``faces``.
    """

    perceptual: str = PROXY
    faces: bool = False


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


class Protocol(BaseModel):
    """All that a number depends on but the model; two numbers compare if their hashes are equal.

    Attributes:
        task: what was asked of the model.
        data: fingerprint of the data set.
        split: of the data set.
        size: side of the frames in pixels.
        frames: which frames of a clip were scored.
        decode_path: how they were decoded.
        metrics: definition and extractor of each metric.
    """

    model_config = ConfigDict(frozen=True)

    task: str = "rebuild every frame of a clip from its first frame"
    data: str
    split: str
    size: int
    frames: str = "all, the first included"
    decode_path: str
    metrics: dict[str, str]

    def hash(self) -> str:
        """Twelve digits of the SHA-256 of the whole."""
        text = json.dumps(self.model_dump(mode="json"), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:12]


class ClipScores(BaseModel):
    """The scores of one model on one clip.

    Attributes:
        key: of the clip.
        identity: who or what is shown.
        frames: how many it has.
        values: by metric; None where it is defined on no frame.
        counted: by metric, how many frames it is defined on.
    """

    model_config = ConfigDict(ser_json_inf_nan="strings")

    key: str
    identity: str
    frames: int
    values: dict[str, float | None]
    counted: dict[str, int]


class IdentityScores(BaseModel):
    """The scores of one model on all clips of one identity; values are means over its clips."""

    model_config = ConfigDict(ser_json_inf_nan="strings")

    identity: str
    clips: int
    frames: int
    values: dict[str, float | None]


class ModelScores(BaseModel):
    """The scores of one model, or of the baseline.

    Attributes:
        name: for tables.
        checkpoint: what was evaluated; empty for the baseline.
        protocol: hash of its protocol.
        mean_over_clips: by metric, the mean of the clips' values.
        mean_over_frames: by metric, over all frames together, as First Order Motion reports it.
        identities: by identity, in alphabetical order.
        clips: in the order of the data set's index.
    """

    name: str
    checkpoint: str
    protocol: str
    mean_over_clips: dict[str, Estimate]
    mean_over_frames: dict[str, Estimate]
    identities: list[IdentityScores]
    clips: list[ClipScores]


class Difference(BaseModel):
    """Model − reference on the same clips and frames, with intervals of the difference itself."""

    model: str
    reference: str
    mean_over_clips: dict[str, Estimate]
    mean_over_frames: dict[str, Estimate]


class Evaluation(BaseModel):
    """Video reconstruction over a split, for one or more runs.

    Attributes:
        split: of the data set.
        metrics: what was measured, in the order of tables.
        protocols: by hash.
        models: the baseline and the runs of each protocol.
        differences: of each run to its baseline, and to the first run where protocols agree.
        skipped: clips that could not be decoded, with the reason.
        warnings: what a reader of the numbers must know, one line each.
    """

    split: str
    metrics: tuple[Metric, ...]
    protocols: dict[str, Protocol]
    models: list[ModelScores]
    differences: list[Difference]
    skipped: dict[str, str]
    warnings: list[str]

    def run(self, name: str) -> ModelScores:
        """The scores of a model by its name."""
        return next(model for model in self.models if model.name == name)


def metrics_of(measures: Measures) -> tuple[Metric, ...]:
    """The metrics that are measured, in the order of tables.

    Raises:
        UserError: the extra ``faces`` is asked for and not installed, or a file does not fit.
    """
    ssim = f"torchmetrics {version('torchmetrics')}, Gaussian window 11, σ 1.5, data range 1"
    basic = (
        Metric(
            key="l1",
            label="L1",
            definition="mean absolute difference of RGB values in [0, 1]",
            decimals=4,
        ),
        Metric(
            key="psnr",
            label="PSNR dB",
            definition="from the mean squared error over all pixels, at most 100",
            decimals=2,
            higher_is_better=True,
        ),
        Metric(key="ssim", label="SSIM", definition=ssim, decimals=4, higher_is_better=True),
        perceptual_metric(measures.perceptual),
    )
    if not measures.faces:
        return basic
    check_installed()
    return (*basic, *landmark_metrics(), identity_metric())


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
        differences=_differences(list(checkpoints), protocol_of, clips, table),
        skipped=skipped,
        warnings=[*_warnings(protocols, skipped, clips), *_not_finite(table)],
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


def summarise(
    name: str,
    checkpoint: str,
    protocol: str,
    clips: Sequence[Clip],
    scores: dict[str, FrameScores],
) -> ModelScores:
    """Means and rows of one model; clips without scores are left out."""
    scored = [clip for clip in clips if clip.key in scores]
    identities = [clip.identity for clip in scored]
    keys = list(next(iter(scores.values())))
    tallies = {key: [scores[clip.key][key] for clip in scored] for key in keys}
    rows = [
        ClipScores(
            key=clip.key,
            identity=clip.identity,
            frames=clip.frames,
            values={key: value_of(key, tally) for key, tally in scores[clip.key].items()},
            counted={key: int(t.denominator.sum()) for key, t in scores[clip.key].items()},
        )
        for clip in scored
    ]
    return ModelScores(
        name=name,
        checkpoint=checkpoint,
        protocol=protocol,
        mean_over_clips={k: mean_over_clips(k, t, identities) for k, t in tallies.items()},
        mean_over_frames={k: mean_over_frames(k, t, identities) for k, t in tallies.items()},
        identities=[_identity(who, rows, keys) for who in sorted(set(identities))],
        clips=rows,
    )


def _identity(identity: str, rows: Sequence[ClipScores], keys: Sequence[str]) -> IdentityScores:
    own = [row for row in rows if row.identity == identity]
    values: dict[str, float | None] = {}
    for key in keys:
        known = [value for row in own if (value := row.values[key]) is not None]
        values[key] = fmean(known) if known else None
    return IdentityScores(
        identity=identity, clips=len(own), frames=sum(row.frames for row in own), values=values
    )


def _differences(
    runs: Sequence[str],
    protocol_of: dict[str, str],
    clips: Sequence[Clip],
    table: FrameTable,
) -> list[Difference]:
    """Every run against its baseline, then against the first run; never across protocols."""
    baselines = [name for name in table if name not in runs]
    pairs = [(run, base) for base in baselines for run in runs]
    pairs += [(run, runs[0]) for run in runs[1:]]
    return [
        _difference(model, reference, clips, table)
        for model, reference in pairs
        if protocol_of[model] == protocol_of[reference]
    ]


def _difference(model: str, reference: str, clips: Sequence[Clip], table: FrameTable) -> Difference:
    shared = [c for c in clips if c.key in table[model] and c.key in table[reference]]
    identities = [clip.identity for clip in shared]
    keys = list(table[model][shared[0].key])
    pairs = {
        key: [(table[model][c.key][key], table[reference][c.key][key]) for c in shared]
        for key in keys
    }
    return Difference(
        model=model,
        reference=reference,
        mean_over_clips={k: difference_over_clips(k, p, identities) for k, p in pairs.items()},
        mean_over_frames={k: difference_over_frames(k, p, identities) for k, p in pairs.items()},
    )


def _not_finite(table: FrameTable) -> list[str]:
    """A warning for each model whose predictions are not all finite numbers."""
    frames = {
        name: sum(int((~np.isfinite(clip["l1"].numerator)).sum()) for clip in clips.values())
        for name, clips in table.items()
    }
    return [
        f"{name}: the predictions of {count} frames are NaN or infinite; the training diverged, so "
        "evaluate an earlier checkpoint or train again with a lower optim.lr"
        for name, count in frames.items()
        if count
    ]


def _warnings(
    protocols: dict[str, Protocol], skipped: dict[str, str], clips: Sequence[Clip]
) -> list[str]:
    warnings = []
    if len(protocols) > 1:
        warnings.append(
            f"the runs were measured under {len(protocols)} protocols "
            f"({', '.join(f'{h}: {p.size}²' for h, p in protocols.items())}): numbers of different "
            "protocols are not comparable, and no difference is taken between them"
        )
    if skipped:
        warnings.append(
            f"{len(skipped)} of {len(clips)} clips could not be decoded and count in no mean"
        )
    if len({clip.identity for clip in clips}) < 10:
        warnings.append(
            f"the intervals rest on {len({clip.identity for clip in clips})} identities: they are "
            "rough below about ten"
        )
    return warnings
