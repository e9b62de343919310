"""Score one clip: rebuild it from its first frame by every model, beside the naive baseline.

On request, each model also animates another identity with the motion of the clip.

:func:`score_clip` is a pure function of its arguments: scored in any process, in any order, a clip
has the same scores to the last bit, and so has everything that is computed from them.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor, nn

from prioritycut_ray.data.shards import Clip, read_clip
from prioritycut_ray.errors import UserError
from prioritycut_ray.evaluation.measures import Measures
from prioritycut_ray.inference.animate import default_device, reconstruct, to_tensor, transfer
from prioritycut_ray.metrics.aggregate import FrameScores, concatenate, every_frame, mask_not_finite
from prioritycut_ray.metrics.identity import identity_scores
from prioritycut_ray.metrics.landmarks import Face, FaceFinder, landmark_scores
from prioritycut_ray.metrics.perceptual import perceptual_distance, perceptual_metric
from prioritycut_ray.metrics.reconstruction import reconstruction_scores
from prioritycut_ray.metrics.transfer import pose_errors, transfer_scores
from prioritycut_ray.models.animator import Animator
from prioritycut_ray.models.perceptual import perceptual_features
from prioritycut_ray.precision import float32_products
from prioritycut_ray.runs.locate import local_copy
from prioritycut_ray.runs.manifest import MANIFEST
from prioritycut_ray.training.checkpoint import load_animator
from prioritycut_ray.video.random_access import read_all, read_frames
from prioritycut_ray.visualize import to_uint8

Mapper = Callable[[Callable[[Any], Any], Sequence[Any]], Iterable[Any]]
"""``map``, or one that uses other processes; results come in the order of the items."""


class ClipTask(NamedTuple):
    """Everything that is needed to score one clip, on any machine.

    Attributes:
        data: folder of shards, an absolute path or an fsspec URL.
        clip: which clip.
        size: side of the frames in pixels.
        checkpoints: of the models that rebuild the clip, all of this size.
        measures: what to measure.
        source: clip of another identity, whose first frame is animated; None unless
            ``measures.transfer``.
    """

    data: str
    clip: Clip
    size: int
    checkpoints: tuple[str, ...]
    measures: Measures
    source: Clip | None = None


class ScoredClip(NamedTuple):
    """The scores of one clip.

    Attributes:
        scores: of the baseline, then of each model; empty if the clip could not be decoded.
        problem: why it could not be decoded; empty if it could.
    """

    scores: list[FrameScores]
    problem: str = ""


class Extractors(NamedTuple):
    """The networks that the metrics use.

    Attributes:
        distance: perceptual distance of images in [0, 1].
        key: of the metric that the distance gives.
        finder: of faces; None if faces are not measured.
        features: of identities; None if no other identity is animated.
    """

    distance: nn.Module
    key: str
    finder: FaceFinder | None = None
    features: nn.Module | None = None


def load_extractors(measures: Measures, device: torch.device) -> Extractors:
    """Load the networks that the metrics need.

    Raises:
        UserError: weights cannot be loaded, or the extra ``faces`` is not installed.
    """
    distance = perceptual_distance(measures.perceptual).to(device)
    key = perceptual_metric(measures.perceptual).key
    finder = FaceFinder() if measures.faces else None
    features = perceptual_features("efficientnet_lite0").to(device) if measures.transfer else None
    return Extractors(distance, key, finder, features)


@lru_cache(maxsize=1)  # A process scores many clips and loads their networks once.
def cached_extractors(measures: Measures, device: torch.device) -> Extractors:
    """Load the networks of :func:`load_extractors`, or return those of the last call."""
    return load_extractors(measures, device)


def _cached_animator(checkpoint: str, device: torch.device) -> Animator:
    """Load a checkpoint again only if it was replaced by another one at the same path."""
    manifest = local_copy(checkpoint) / MANIFEST
    return _animator(checkpoint, device, manifest.stat().st_mtime_ns if manifest.exists() else 0)


@lru_cache(maxsize=8)
def _animator(checkpoint: str, device: torch.device, written: int) -> Animator:
    return load_animator(checkpoint, device)[0]


def score_clip(task: ClipTask) -> ScoredClip:
    """Rebuild one clip by every model of a task, and score it beside the baseline."""
    try:
        frames = read_all(read_clip(task.data, task.clip), task.size)
        source = _first_frame(task, task.source) if task.source else None
    except UserError as error:
        return ScoredClip([], str(error))
    device = default_device()
    animators = [_cached_animator(checkpoint, device) for checkpoint in task.checkpoints]
    extractors = cached_extractors(task.measures, device)
    with one_thread():
        scores = score_frames(frames, animators, extractors)
        if source is not None:
            moved = _score_transfer(source, frames, animators, extractors)
            scores = [a | b for a, b in zip(scores, moved, strict=True)]
        return ScoredClip(scores)


def _first_frame(task: ClipTask, clip: Clip) -> NDArray[np.uint8]:
    frame: NDArray[np.uint8] = read_frames(read_clip(task.data, clip), [0], task.size)[0]
    return frame


@contextmanager
def one_thread() -> Iterator[None]:
    """Run torch on one thread: sums depend on the number of threads, and one gives equal bits."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@float32_products(convolutions="ieee")
@torch.inference_mode()
def score_frames(
    frames: NDArray[np.uint8], animators: Sequence[Animator], extractors: Extractors
) -> list[FrameScores]:
    """Return the scores of the baseline, then of each animator.

    Args:
        frames: of one clip, `[T, S, S, 3]`.
        animators: of size S, in evaluation mode.
        extractors: on the animators' device.
    """
    finder = extractors.finder
    true_faces = [finder.find(frame) for frame in frames] if finder else []
    baseline: list[FrameScores] = []
    models: list[FrameScores] = []
    for number, animator in enumerate(animators):
        parts: list[FrameScores] = []
        faces: list[Face | None] = []
        finite: list[Tensor] = []
        for rebuilt in reconstruct(animator, frames):
            driving, prediction = rebuilt.pair.driving, rebuilt.animation.prediction
            parts.append(similarity(prediction, driving, extractors))
            finite.append(prediction.isfinite().flatten(1).all(dim=1).cpu())
            if number == 0:
                baseline.append(similarity(rebuilt.pair.source, driving, extractors))
            if finder:
                images = to_uint8(prediction).permute(0, 2, 3, 1).numpy()
                faces += [finder.find(image) for image in images]
        scores = concatenate(parts) | _face_scores(true_faces, faces)
        models.append(mask_not_finite(scores, torch.cat(finite).numpy()))
    copied = true_faces[:1] * len(true_faces)
    return [concatenate(baseline) | _face_scores(true_faces, copied), *models]


@float32_products(convolutions="ieee")
@torch.inference_mode()
def _score_transfer(
    source: NDArray[np.uint8],
    frames: NDArray[np.uint8],
    animators: Sequence[Animator],
    extractors: Extractors,
) -> list[FrameScores]:
    """Animate a source with the motion of a clip; scores as those of :func:`score_frames`."""
    assert extractors.features is not None
    device = next(extractors.features.buffers()).device
    picture = to_tensor(source[None], device)
    copied = picture.expand(len(frames), -1, -1, -1)
    scores = [transfer_scores(picture, copied, None, extractors.features)]
    for animator in animators:
        moved = move(animator, source, frames, relative=True)
        found = transfer_scores(picture, moved.frames, moved.poses, extractors.features)
        scores.append(mask_not_finite(found, moved.finite))
    return scores


class Moved(NamedTuple):
    """What a model makes of a source and a clip's motion.

    Attributes:
        frames: the generated frames, `[T, 3, H, W]`.
        finite: which of them have no NaN and no infinite value, `[T]`.
        poses: their pose errors, `[T]`; None with absolute motion, where they are not measured.
    """

    frames: Tensor
    finite: NDArray[np.bool_]
    poses: Tensor | None


def move(
    animator: Animator, source: NDArray[np.uint8], driving: NDArray[np.uint8], *, relative: bool
) -> Moved:
    """Move a source to the motion of a whole clip; the arguments are those of :func:`transfer`."""
    moved = [
        rendered.animation for rendered in transfer(animator, source, driving, relative=relative)
    ]
    frames = torch.cat([animation.prediction for animation in moved])
    finite = frames.isfinite().flatten(1).all(dim=1).cpu().numpy()
    poses = torch.cat([pose_errors(each, animator) for each in moved]) if relative else None
    return Moved(frames, finite, poses)


def similarity(
    predicted: Float[Tensor, "T 3 H W"], true: Float[Tensor, "T 3 H W"], extractors: Extractors
) -> FrameScores:
    """Return L1, PSNR, SSIM and the perceptual distance for each frame, of values in [0, 1]."""
    distance = every_frame(extractors.distance(predicted, true))
    return reconstruction_scores(predicted, true) | {extractors.key: distance}


def _face_scores(true: Sequence[Face | None], predicted: Sequence[Face | None]) -> FrameScores:
    if not true:
        return {}
    return landmark_scores(true, predicted) | identity_scores(true, predicted)
