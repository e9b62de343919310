"""A trained animator at work: rebuild a clip, animate another identity."""

from collections.abc import Iterator
from itertools import islice
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, UInt8
from numpy.typing import NDArray
from torch import Tensor

from prioritycut_ray.models.animator import Animation, Animator, FramePair
from prioritycut_ray.models.keypoints import Keypoints, relative_keypoints

BATCH = 16
"""Frames that go through the network together."""


class Rebuilt(NamedTuple):
    """Some frames of a clip, rebuilt from its first frame."""

    pair: FramePair
    animation: Animation


def default_device() -> torch.device:
    """The first GPU, or the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def to_tensor(frames: NDArray[np.uint8], device: torch.device) -> Float[Tensor, "T 3 H W"]:
    """uint8 frames `[T, H, W, 3]` as floats in [0, 1] on a device."""
    return torch.from_numpy(frames).to(device).permute(0, 3, 1, 2).float() / 255


@torch.inference_mode()
def reconstruct(animator: Animator, frames: Float[Tensor, "T 3 H W"]) -> Iterator[Rebuilt]:
    """Rebuild every frame of a clip from its first one (method §5), in batches."""
    source = frames[:1]
    source_keypoints = animator.detector(source)
    for driving in frames.split(BATCH):
        animation = animator.animate(source, source_keypoints, animator.detector(driving))
        yield Rebuilt(FramePair(source.expand(len(driving), -1, -1, -1), driving), animation)


@torch.inference_mode()
def animate(
    animator: Animator,
    source: Float[Tensor, "1 3 H W"],
    driving: Iterator[NDArray[np.uint8]],
    *,
    relative: bool,
    adapt_scale: bool,
) -> Iterator[UInt8[Tensor, "T 3 H W"]]:
    """Move a source image like a driving video (method §6), batch by batch.

    Args:
        animator: in evaluation mode.
        source: image in [0, 1].
        driving: square uint8 frames `[H, W, 3]` of the model's size.
        relative: move by the driving keypoints' change since the first driving frame, which
            keeps the source's own shape; else take the driving keypoints as they are.
        adapt_scale: scale that change by the ratio of the two keypoint hulls (relative only).
    """
    source_keypoints = animator.detector(source)
    initial: Keypoints | None = None
    while batch := list(islice(driving, BATCH)):
        keypoints = animator.detector(to_tensor(np.stack(batch), source.device))
        initial = initial or Keypoints(keypoints.value[:1], keypoints.jacobian[:1])
        if relative:
            keypoints = relative_keypoints(
                source_keypoints, keypoints, initial, adapt_scale=adapt_scale
            )
        animation = animator.animate(source, source_keypoints, keypoints)
        yield (animation.prediction * 255).round().to(torch.uint8).cpu()
