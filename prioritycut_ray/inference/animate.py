"""Apply a trained animator: rebuild a clip, animate another identity."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import chain, islice
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from prioritycut_ray.errors import UserError
from prioritycut_ray.inference.smoothing import Detected, smoothed
from prioritycut_ray.models.animator import Animation, Animator, FramePair
from prioritycut_ray.models.blocks import in_float32
from prioritycut_ray.models.keypoints import moved_keypoints, movement_scale, pose_distance
from prioritycut_ray.precision import Precision, autocast, float32_products
from prioritycut_ray.transfer import send

BATCH = 16
"""Number of frames that go through the network together."""


class Rendered(NamedTuple):
    """A batch of driving frames, and the source animated by them.

    Attributes:
        pair: the source, repeated for each driving frame; and the driving frames.
        animation: the source with the motion of the driving frames.
    """

    pair: FramePair
    animation: Animation


def default_device() -> torch.device:
    """Return the first GPU, or the CPU if there is none."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def to_tensor(frames: NDArray[np.uint8], device: torch.device) -> Float[Tensor, "T 3 H W"]:
    """Convert uint8 frames `[T, H, W, 3]` to floats in [0, 1] on a device."""
    return send(torch.tensor(frames), device).permute(0, 3, 1, 2).float() / 255


def reconstruct(animator: Animator, frames: NDArray[np.uint8]) -> Iterator[Rendered]:
    """Rebuild every frame of a clip from its first one (method §5), in batches.

    Args:
        animator: in evaluation mode.
        frames: the clip, `[T, H, W, 3]`.
    """
    return transfer(animator, frames[0], frames, relative=False)


@torch.inference_mode()
def transfer(
    animator: Animator, source: NDArray[np.uint8], driving: NDArray[np.uint8], *, relative: bool
) -> Iterator[Rendered]:
    """Move a source to the motion of a clip to be scored, in batches.

    Unlike :func:`animate`, it computes in the caller's number formats, and leaves it to the caller
    to look for values that are not finite.

    Args:
        animator: in evaluation mode.
        source: square frame `[H, W, 3]`.
        driving: the clip, `[T, H, W, 3]`.
        relative: apply the motion since the clip's first frame (method §6), not its poses.
    """
    device = _device_of(animator)
    prepared = animator.encode(to_tensor(source[None], device))
    start = animator.detect(to_tensor(driving[:1], device)) if relative else None
    for first in range(0, len(driving), BATCH):
        frames = to_tensor(driving[first : first + BATCH], device)
        keypoints = animator.detect(frames)
        if start is not None:
            keypoints = moved_keypoints(prepared.keypoints, keypoints, start, 1.0)
        animation = animator.render(prepared, keypoints)
        pair = FramePair(prepared.image.expand(len(frames), -1, -1, -1), frames)
        yield Rendered(pair, animation)


@torch.inference_mode()
def animate(
    animator: Animator,
    source: Float[Tensor, "1 3 H W"],
    driving: Iterable[NDArray[np.uint8]],
    *,
    relative: bool,
    adapt_scale: bool,
    initial: NDArray[np.uint8] | None = None,
    smooth: int = 0,
    precision: Precision = "float32",
) -> Iterator[Rendered]:
    """Animate a source image with the motion of a driving video (method §6), in batches.

    A rendered frame depends only on the source, its own driving frame and the initial frame; with
    ``smooth``, also on the driving frames of its window. Animating outward from the best frame in
    both directions therefore gives the same frames as animating them in order.

    Args:
        animator: in evaluation mode.
        source: image in [0, 1].
        driving: square uint8 frames `[H, W, 3]` of the model's size.
        relative: apply the change of the driving keypoints since the initial frame, which
            preserves the shape of the source; otherwise use the driving keypoints themselves.
        adapt_scale: scale that change by the ratio of the two keypoint hulls (relative only).
        initial: the driving frame whose pose matches the source, `[H, W, 3]`; the first one by
            default.
        smooth: window in frames of :func:`~prioritycut_ray.inference.smoothing.smoothed`, which
            filters the driving keypoints; 0 leaves them as they are.
        precision: of the networks.

    Raises:
        UserError: the network outputs NaN or infinite values, or ``smooth`` is invalid.
    """
    detected = _detected(animator, driving, source.device, precision)
    if smooth:
        detected = smoothed(detected, smooth)
    first = next(detected, None)
    if first is None:
        return
    with _number_formats(precision, source.device):
        prepared = animator.encode(source)
        if initial is None:
            start = first[1].first()
        else:
            start = animator.detect(to_tensor(initial[None], source.device))
    # Once: the hulls are computed on the CPU, which would wait for the GPU at every batch.
    scale = movement_scale(prepared.keypoints, start) if relative and adapt_scale else 1.0
    for frames, keypoints in chain([first], detected):
        with _number_formats(precision, source.device):
            if relative:
                with in_float32(source):
                    keypoints = moved_keypoints(prepared.keypoints, keypoints, start, scale)
            animation = animator.render(prepared, keypoints)
        require_finite(animation.prediction)
        yield Rendered(FramePair(source.expand(len(frames), -1, -1, -1), frames), animation)


def _detected(
    animator: Animator,
    driving: Iterable[NDArray[np.uint8]],
    device: torch.device,
    precision: Precision,
) -> Iterator[Detected]:
    for frames in _batches(driving, device):
        with _number_formats(precision, device):
            keypoints = animator.detect(frames)
        yield frames, keypoints


@contextmanager
def _number_formats(precision: Precision, device: torch.device) -> Iterator[None]:
    """Compute in the number formats of training."""
    with float32_products(convolutions="tf32"), autocast(precision, device):
        yield


def require_finite(pictures: Tensor) -> None:
    """Reject NaN and infinite values, which would be shown as black.

    Raises:
        UserError: the pictures contain such values.
    """
    if not pictures.isfinite().all():
        raise UserError(
            "the model outputs NaN or infinite values: its training diverged; use an earlier "
            "checkpoint (RUN/step_...), or train again with a lower optim.lr"
        )


@float32_products(convolutions="tf32")
@torch.inference_mode()
def find_best_frame(
    animator: Animator,
    source: Float[Tensor, "1 3 H W"],
    driving: Iterable[NDArray[np.uint8]],
) -> int:
    """Return the index of the driving frame whose pose is nearest to the source's (method §6).

    Args:
        animator: in evaluation mode.
        source: image in [0, 1].
        driving: square uint8 frames `[H, W, 3]` of the model's size, at least one.

    Raises:
        UserError: the keypoints of the source, or of every driving frame, span no area.
    """
    own = animator.detect(source).value.cpu()
    distances = torch.cat(
        [pose_distance(own, animator.detect(b).value) for b in _batches(driving, source.device)]
    )
    best = int(distances.argmin())
    if not torch.isfinite(distances[best]):
        raise UserError(
            "cannot find a best frame: in every driving frame the keypoints lie on one line or at "
            "one point; animate without --best-frame"
        )
    return best


def _batches(
    frames: Iterable[NDArray[np.uint8]], device: torch.device
) -> Iterator[Float[Tensor, "B 3 H W"]]:
    frames = iter(frames)
    while batch := list(islice(frames, BATCH)):
        yield to_tensor(np.stack(batch), device)


def _device_of(animator: Animator) -> torch.device:
    return next(animator.parameters()).device
