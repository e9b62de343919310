"""What every generator family provides, and all that the rest of the project knows of one.

Training calls :meth:`Animator.forward`, once a step: DistributedDataParallel expects one forward
pass before each backward pass. Animation calls ``encode`` once for a source frame, and ``detect``
and ``render`` for batches of driving frames.
"""

from abc import ABC, abstractmethod
from typing import ClassVar, NamedTuple

from jaxtyping import Float
from torch import Tensor, nn

from prioritycut_ray.models.keypoints import Keypoints


class FramePair(NamedTuple):
    """Two frames of one clip, values in [0, 1]."""

    source: Float[Tensor, "B 3 H W"]
    driving: Float[Tensor, "B 3 H W"]


class Animation(NamedTuple):
    """A source frame moved to the pose of a driving frame.

    Attributes:
        prediction: D̂, values in (0, 1).
        occlusion_map: 1 = visible in the source, 0 = occluded, must be inpainted.
        background_mask: M_bg, the probability that a pixel moves with the background; of the
            occlusion map's size.
        source_keypoints: keypoints of the source frame.
        driving_keypoints: keypoints that the source was moved to.
    """

    prediction: Float[Tensor, "B 3 H W"]
    occlusion_map: Float[Tensor, "B 1 h w"]
    background_mask: Float[Tensor, "B 1 h w"]
    source_keypoints: Keypoints
    driving_keypoints: Keypoints

    def detach(self) -> "Animation":
        """Return the same animation without its gradient history."""
        return Animation(
            self.prediction.detach(),
            self.occlusion_map.detach(),
            self.background_mask.detach(),
            self.source_keypoints.detach(),
            self.driving_keypoints.detach(),
        )


class TrainingInputs(NamedTuple):
    """What a training step gives an animator besides a pair of frames.

    Attributes:
        transformed: the driving frame under a random known warp, for the equivariance losses
            (method §2).
        uniform: uniform numbers in [0, 1), for what a family decides at random for each motion.
        samples: frame pairs seen before this step, for what changes in the course of training.
    """

    transformed: Float[Tensor, "B 3 H W"]
    uniform: Float[Tensor, "B M"]
    samples: int


class Reconstruction(NamedTuple):
    """A driving frame made from a source frame of the same clip.

    Attributes:
        animation: the source moved to the pose of the driving frame.
        transformed_keypoints: keypoints of the transformed driving frame; None outside training.
        losses: the family's own losses by their names in the configuration, without weights.
    """

    animation: Animation
    transformed_keypoints: Keypoints | None
    losses: dict[str, Tensor]


class EncodedSource(NamedTuple):
    """A source frame and everything computed from it that does not depend on the motion.

    Attributes:
        image: in [0, 1].
        keypoints: keypoints of the image.
        features: encoder maps of the image, as many as the family has.
    """

    image: Float[Tensor, "B 3 H W"]
    keypoints: Keypoints
    features: tuple[Tensor, ...]

    def expand_like(self, driving: Keypoints) -> "EncodedSource":
        """Return one source (B = 1) once for each driving frame, as views."""
        count = driving.value.shape[0]
        return EncodedSource(
            self.image.expand(count, -1, -1, -1),
            self.keypoints.expand_like(driving),
            tuple(level.expand(count, -1, -1, -1) for level in self.features),
        )


class Animator(nn.Module, ABC):
    """The generator side of the method: an interface without an implementation.

    Frames go through the networks in a fixed order in training: every batch norm is a collective
    operation.

    Attributes:
        detector: the part that finds keypoints, which may have a learning rate of its own.
        euclidean_warps: the kind of random warps that the family's equivariance losses use
            (:class:`~prioritycut_ray.equivariance.ThinPlateSpline`).
        parts_change: whether some parameters are used in some training steps only.
    """

    detector: nn.Module
    euclidean_warps: ClassVar[bool]
    parts_change: bool = False

    @abstractmethod
    def forward(self, pair: FramePair, inputs: TrainingInputs | None = None) -> Reconstruction:
        """Reconstruct the driving frame.

        Args:
            pair: source and driving frames.
            inputs: what a training step gives besides; None outside training.
        """

    @abstractmethod
    def detect(self, frames: Float[Tensor, "B 3 H W"]) -> Keypoints:
        """Detect keypoints in frames with values in [0, 1]."""

    @abstractmethod
    def encode(self, image: Float[Tensor, "B 3 H W"]) -> EncodedSource:
        """Compute what depends on source frames alone, values in [0, 1]."""

    @abstractmethod
    def render(self, source: EncodedSource, driving: Keypoints) -> Animation:
        """Move a source to the keypoints of driving frames.

        Args:
            source: one frame (B = 1), or one for each driving frame.
            driving: keypoints of B driving frames.
        """

    def clipped_parts(self) -> list[nn.Module]:
        """Return the parts whose gradients are clipped, each by itself; by default, the whole."""
        return [self]
