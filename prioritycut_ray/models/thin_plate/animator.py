"""The thin-plate spline motion model: its four networks together (method §7)."""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from prioritycut_ray.models.animator import (
    Animation,
    Animator,
    EncodedSource,
    FramePair,
    Reconstruction,
    TrainingInputs,
)
from prioritycut_ray.models.keypoints import Keypoints
from prioritycut_ray.models.thin_plate.dense_motion import DenseMotion, DenseMotionNetwork, Dropout
from prioritycut_ray.models.thin_plate.inpainting import InpaintingNetwork, warp_distance
from prioritycut_ray.models.thin_plate.resnet import (
    BackgroundMotion,
    PointDetector,
    background_distance,
)


class Schedule(NamedTuple):
    """What changes in the course of training, in frame pairs seen.

    Attributes:
        background_start: when the motion of the background is switched on.
        dropout_start: share of motions that is left out in the first step.
        dropout_peak: share after ``dropout_ramp``, which it rises to linearly.
        dropout_ramp: how long the share rises.
        dropout_end: when all motions are kept again.
    """

    background_start: int = 0
    dropout_start: float = 0.0
    dropout_peak: float = 0.0
    dropout_ramp: int = 0
    dropout_end: int = 0

    def dropout_rate(self, samples: int) -> float:
        """Return P, the share of motions that is left out."""
        if samples >= self.dropout_end:
            return 0.0
        progress = min(1.0, samples / self.dropout_ramp) if self.dropout_ramp else 1.0
        return self.dropout_start + (self.dropout_peak - self.dropout_start) * progress


class ThinPlateAnimator(Animator):
    """Groups of keypoints → splines → dense motion → prediction.

    Args:
        detector: finds five keypoints for each spline.
        dense_motion: combines the splines.
        inpainting: renders the prediction.
        background: predicts the motion of the background in training, or None.
        schedule: what changes in the course of training.
    """

    euclidean_warps = True

    def __init__(
        self,
        detector: PointDetector,
        dense_motion: DenseMotionNetwork,
        inpainting: InpaintingNetwork,
        background: BackgroundMotion | None,
        schedule: Schedule,
    ) -> None:
        super().__init__()
        self.detector = detector
        self.dense_motion = dense_motion
        self.inpainting = inpainting
        self.background = background
        self.schedule = schedule
        self.parts_change = background is not None and schedule.background_start > 0

    def forward(self, pair: FramePair, inputs: TrainingInputs | None = None) -> Reconstruction:
        source, driving = self.detect(pair.source), self.detect(pair.driving)
        background, losses = None, {}
        if inputs and self.background and inputs.samples >= self.schedule.background_start:
            background = self.background(pair.source, pair.driving)
            back = self.background(pair.driving, pair.source)
            losses["background"] = background_distance(background, back)
        motion = self.dense_motion(pair.source, source, driving, background, self._dropout(inputs))
        maps = self.inpainting.encode(pair.source)
        prediction = self.inpainting.decode(pair.source, maps, motion)
        animation = _animation(prediction, motion, source, driving)
        if inputs is None:
            return Reconstruction(animation, None, losses)
        with torch.no_grad():
            driving_maps = self.inpainting.encode(pair.driving)
        losses["warp"] = warp_distance(maps, driving_maps, motion)
        return Reconstruction(animation, self.detect(inputs.transformed), losses)

    def _dropout(self, inputs: TrainingInputs | None) -> Dropout | None:
        if inputs is None or inputs.samples >= self.schedule.dropout_end:
            return None
        return Dropout(inputs.uniform, self.schedule.dropout_rate(inputs.samples))

    def detect(self, frames: Float[Tensor, "B 3 H W"]) -> Keypoints:
        keypoints: Keypoints = self.detector(frames)
        return keypoints

    def encode(self, image: Float[Tensor, "B 3 H W"]) -> EncodedSource:
        return EncodedSource(image, self.detect(image), self.inpainting.encode(image))

    def render(self, source: EncodedSource, driving: Keypoints) -> Animation:
        image, keypoints, maps = source.expand_like(driving)
        motion = self.dense_motion(image, keypoints, driving)
        prediction = self.inpainting.decode(image, maps, motion)
        return _animation(prediction, motion, keypoints, driving)

    def clipped_parts(self) -> list[nn.Module]:
        """Return all networks but the inpainting one, as the reference does."""
        parts = [self.detector, self.dense_motion, self.background]
        return [part for part in parts if part is not None]


def _animation(
    prediction: Float[Tensor, "B 3 H W"],
    motion: DenseMotion,
    source: Keypoints,
    driving: Keypoints,
) -> Animation:
    return Animation(prediction, motion.occlusion_map, motion.mask[:, :1], source, driving)
