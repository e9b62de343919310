"""Detector and generator as one module with one forward pass a training step.

DistributedDataParallel expects one forward pass before each backward pass, so all that the
generator's step needs from the trained networks comes out of :meth:`Animator.forward`. Frames go
through the networks in a fixed order: every batch norm is a collective operation.
"""

from typing import NamedTuple

from jaxtyping import Float
from torch import Tensor, nn

from prioritycut_ray.models.blocks import warp
from prioritycut_ray.models.first_order.dense_motion import DenseMotion, DenseMotionNetwork
from prioritycut_ray.models.first_order.generator import Generator
from prioritycut_ray.models.first_order.keypoints import KeypointDetector, Keypoints


class FramePair(NamedTuple):
    """Two frames of one clip, values in [0, 1]."""

    source: Float[Tensor, "B 3 H W"]
    driving: Float[Tensor, "B 3 H W"]


class Animation(NamedTuple):
    """The source frame moved like the driving frame, with everything that led there.

    Attributes:
        prediction: D̂, values in (0, 1).
        source_keypoints: of the source frame.
        driving_keypoints: of the driving frame.
        motion: from driving to source.
    """

    prediction: Float[Tensor, "B 3 H W"]
    source_keypoints: Keypoints
    driving_keypoints: Keypoints
    motion: DenseMotion

    def detach(self) -> "Animation":
        """The same animation without its gradient history."""
        return Animation(
            self.prediction.detach(),
            self.source_keypoints.detach(),
            self.driving_keypoints.detach(),
            DenseMotion(*(tensor.detach() for tensor in self.motion)),
        )


class Animator(nn.Module):
    """The generator side of the method (§1): keypoints → dense motion → prediction."""

    def __init__(
        self, detector: KeypointDetector, dense_motion: DenseMotionNetwork, generator: Generator
    ) -> None:
        super().__init__()
        self.detector = detector
        self.dense_motion = dense_motion
        self.generator = generator

    def animate(
        self,
        source: Float[Tensor, "B 3 H W"],
        source_keypoints: Keypoints,
        driving_keypoints: Keypoints,
    ) -> Animation:
        """Render the source frame with given driving keypoints."""
        motion = self.dense_motion(source, source_keypoints, driving_keypoints)
        prediction = self.generator(source, motion)
        return Animation(prediction, source_keypoints, driving_keypoints, motion)

    def forward(
        self, pair: FramePair, transformed: Float[Tensor, "B 3 H W"] | None = None
    ) -> tuple[Animation, Keypoints | None]:
        """Reconstruct the driving frame; also detect keypoints of its transformed copy.

        Args:
            pair: source and driving frames.
            transformed: the driving frame under a random known warp, for the equivariance
                losses (method §2); None outside training.

        Returns:
            The animation, and the keypoints of ``transformed`` or None.
        """
        animation = self.animate(
            pair.source, self.detector(pair.source), self.detector(pair.driving)
        )
        return animation, None if transformed is None else self.detector(transformed)


def warped_source(
    source: Float[Tensor, "B 3 H W"], motion: DenseMotion
) -> Float[Tensor, "B 3 H W"]:
    """The source frame warped by the dense motion: the picture before inpainting."""
    return warp(source, motion.deformation)
