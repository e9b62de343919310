"""The first-order motion model: detector, dense motion and generator together (method §1)."""

from jaxtyping import Float
from torch import Tensor

from prioritycut_ray.models.animator import (
    Animation,
    Animator,
    EncodedSource,
    FramePair,
    Reconstruction,
    TrainingInputs,
)
from prioritycut_ray.models.first_order.dense_motion import DenseMotion, DenseMotionNetwork
from prioritycut_ray.models.first_order.detector import KeypointDetector
from prioritycut_ray.models.first_order.generator import Generator
from prioritycut_ray.models.keypoints import Keypoints


class FirstOrderAnimator(Animator):
    """Keypoints with jacobians → dense motion → prediction."""

    euclidean_warps = False

    def __init__(
        self, detector: KeypointDetector, dense_motion: DenseMotionNetwork, generator: Generator
    ) -> None:
        super().__init__()
        self.detector = detector
        self.dense_motion = dense_motion
        self.generator = generator

    def forward(self, pair: FramePair, inputs: TrainingInputs | None = None) -> Reconstruction:
        source, driving = self.detect(pair.source), self.detect(pair.driving)
        motion = self.dense_motion(pair.source, source, driving)
        prediction = self.generator(pair.source, motion)
        animation = _animation(prediction, motion, source, driving)
        return Reconstruction(animation, inputs and self.detect(inputs.transformed), {})

    def detect(self, frames: Float[Tensor, "B 3 H W"]) -> Keypoints:
        keypoints: Keypoints = self.detector(frames)
        return keypoints

    def encode(self, image: Float[Tensor, "B 3 H W"]) -> EncodedSource:
        return EncodedSource(image, self.detect(image), (self.generator.encode(image),))

    def render(self, source: EncodedSource, driving: Keypoints) -> Animation:
        image, keypoints, (features,) = source.expand_like(driving)
        motion = self.dense_motion(image, keypoints, driving)
        prediction = self.generator.decode(features, motion)
        return _animation(prediction, motion, keypoints, driving)


def _animation(
    prediction: Float[Tensor, "B 3 H W"],
    motion: DenseMotion,
    source: Keypoints,
    driving: Keypoints,
) -> Animation:
    return Animation(prediction, motion.occlusion_map, motion.mask[:, :1], source, driving)
