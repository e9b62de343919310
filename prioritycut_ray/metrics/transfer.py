"""Animation of another identity without ground truth: identity, pose and flicker.

None of these metrics knows the right picture. How well they rank models can be measured on puppets,
where it is known: :data:`CORRELATIONS`.
"""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from numpy.typing import NDArray
from skimage.color import rgb2gray
from skimage.registration import optical_flow_ilk
from torch import Tensor, nn

from prioritycut_ray.metrics.aggregate import FrameScores, Metric, Tally, every_frame
from prioritycut_ray.metrics.truth import MotionTruth, warping_error
from prioritycut_ray.models.animator import Animation, Animator

IDENTITY = "identity_distance"
POSE = "pose_transfer"
FLICKER = "estimated_flicker"
TRUE_ERRORS = {IDENTITY: "l1", POSE: "l1", FLICKER: "flicker"}
"""The true error on puppets, in relative motion, that each metric stands in for."""
CORRELATIONS: dict[str, float | None] = {IDENTITY: 0.89, POSE: 0.80, FLICKER: 0.98}
"""Spearman's rank correlation with :data:`TRUE_ERRORS` over at least :data:`FEWEST_MODELS` trained
models, as ``benchmarks/puppet_metrics.py`` prints it; None: not measured. What it does not show
is in docs/evaluation.md."""
LOWEST_CORRELATION = 0.8
"""A metric below it, or not measured, is labelled "unvalidated" wherever it shows."""
FEWEST_MODELS = 20


def transfer_metrics() -> tuple[Metric, ...]:
    """Describe the metrics of :func:`transfer_scores`."""
    task = "the first frame of another identity's clip, moved by relative motion"
    return (
        Metric(
            key=IDENTITY,
            label=_label(IDENTITY, "identity distance"),
            definition=f"of {task}: 1 − cosine of EfficientNet-Lite0 features (stride 16, mean "
            f"over pixels) of source and generated frame; {_standing(IDENTITY)}",
            decimals=4,
        ),
        Metric(
            key=POSE,
            label=_label(POSE, "pose transfer"),
            definition=f"of {task}: mean distance between the keypoints asked for and those that "
            "the model's own detector finds in the generated frame, as a share of the frame's "
            f"side; {_standing(POSE)}",
            decimals=4,
        ),
        Metric(
            key=FLICKER,
            label=_label(FLICKER, "estimated flicker"),
            definition=f"of {task}: L1 between each generated frame and the previous one, warped "
            "by the flow between them (scikit-image, iterative Lucas-Kanade), where it stays "
            f"inside the frame; {_standing(FLICKER)}",
            decimals=4,
        ),
    )


def unvalidated_warnings(metrics: Sequence[Metric]) -> list[str]:
    """Warn of metrics that are not known to rank models as the truth does."""
    labels = [m.label for m in metrics if m.key in CORRELATIONS and not _is_validated(m.key)]
    reason = "not shown to rank models as the true errors do; see docs/evaluation.md"
    return [f"{', '.join(labels)}: {reason}"] if labels else []


def _is_validated(key: str) -> bool:
    correlation = CORRELATIONS[key]
    return correlation is not None and correlation >= LOWEST_CORRELATION


def _label(key: str, name: str) -> str:
    return name if _is_validated(key) else f"{name} (unvalidated)"


def _standing(key: str) -> str:
    """Say how well the metric ranks models."""
    correlation = CORRELATIONS[key]
    if correlation is None:
        return "unvalidated: its rank correlation with the true error has not been measured"
    verdict = "" if _is_validated(key) else "unvalidated: "
    return f"{verdict}rank correlation with the true error on puppets {correlation:.2f}"


def transfer_scores(
    source: Float[Tensor, "1 3 H W"],
    generated: Float[Tensor, "T 3 H W"],
    poses: Float[Tensor, " T"] | None,
    features: nn.Module,
) -> FrameScores:
    """Return the three metrics for each frame of an animation.

    Args:
        source: the animated picture, in [0, 1].
        generated: the frames in order, in [0, 1].
        poses: of :func:`pose_errors`; None if no model was asked for a pose.
        features: EfficientNet-Lite0, see :func:`perceptual_features`.
    """
    undefined = Tally(*np.zeros((2, len(generated))))
    return {
        IDENTITY: every_frame(_identity_distance(source, generated, features)),
        POSE: undefined if poses is None else every_frame(poses),
        FLICKER: _estimated_flicker(generated),
    }


def pose_errors(animation: Animation, animator: Animator) -> Float[Tensor, " T"]:
    """Return how far the keypoints of generated frames are from those asked for.

    Args:
        animation: the frames.
        animator: that made them.

    Returns:
        The mean distance in each frame, as a share of the frame's side.
    """
    asked, found = animation.driving_keypoints, animator.detect(animation.prediction)
    distances: Tensor = (asked.value - found.value).norm(dim=-1)
    return distances.mean(1) / 2  # coordinates span two units over the frame's side


def _identity_distance(source: Tensor, generated: Tensor, features: nn.Module) -> Tensor:
    one, many = (features(images)[-1].mean((2, 3)) for images in (source, generated))
    return (1 - F.cosine_similarity(one, many)).clamp_min(0)  # rounding makes it negative


def _estimated_flicker(generated: Float[Tensor, "T 3 H W"]) -> Tally:
    frames = generated.permute(0, 2, 3, 1).cpu().double().numpy()
    grey = rgb2gray(frames)
    flow = np.zeros((*grey.shape, 2))
    # Finite values only: others have no flow, and their frames are marked as not finite.
    for number in np.flatnonzero(np.isfinite(grey).all(axis=(1, 2))):
        if number > 0 and np.isfinite(grey[number - 1]).all():
            vertical, horizontal = optical_flow_ilk(grey[number], grey[number - 1])
            flow[number] = np.stack([horizontal, vertical], axis=-1)
    return warping_error(generated, MotionTruth(torch.from_numpy(flow), _stays_inside(flow)))


def _stays_inside(flow: NDArray[np.float64]) -> Tensor:
    """Tell where the flow leads to the inside of the previous frame; nowhere in the first one."""
    height, width = flow.shape[1:3]
    rows, columns = np.indices((height, width)) + 0.5
    x, y = columns + flow[..., 0], rows + flow[..., 1]
    inside = (x >= 0) & (x <= width) & (y >= 0) & (y <= height)
    inside[0] = False
    return torch.from_numpy(inside)
