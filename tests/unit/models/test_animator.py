"""The interface of generator families is all that training and animation need."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Adam

from prioritycut_ray.config import Config
from prioritycut_ray.inference.animate import animate, find_best_frame
from prioritycut_ray.inference.export import RelativeMotion
from prioritycut_ray.models.animator import (
    Animation,
    Animator,
    EncodedSource,
    FramePair,
    Reconstruction,
    TrainingInputs,
)
from prioritycut_ray.models.keypoints import Keypoints
from prioritycut_ray.networks import build_discriminator, build_perceptual
from prioritycut_ray.training.state import MovingAverage, TrainState
from prioritycut_ray.training.steps import draw_randomness, micro_batches, training_step
from prioritycut_ray.training.tracking import training_pictures
from prioritycut_ray.training.worker import Worker

CPU = torch.device("cpu")


class Shifter(Animator):
    """A family of its own: four keypoints without jacobians, and two encoder maps."""

    euclidean_warps = True

    def __init__(self) -> None:
        super().__init__()
        self.detector = nn.Sequential(
            nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(48, 8), nn.Tanh()
        )
        self.maps = nn.Conv2d(3, 2, 3, padding=1)
        self.paint = nn.Conv2d(6, 3, 3, padding=1)

    def forward(self, pair: FramePair, inputs: TrainingInputs | None = None) -> Reconstruction:
        animation = self.render(self.encode(pair.source), self.detect(pair.driving))
        return Reconstruction(animation, inputs and self.detect(inputs.transformed), {})

    def detect(self, frames: Tensor) -> Keypoints:
        return Keypoints(self.detector(frames).unflatten(1, (4, 2)))

    def encode(self, image: Tensor) -> EncodedSource:
        return EncodedSource(image, self.detect(image), (image, F.avg_pool2d(image, 2)))

    def render(self, source: EncodedSource, driving: Keypoints) -> Animation:
        source = source.expand_like(driving)
        fine, coarse = source.features
        shift = (driving.value - source.keypoints.value).mean(1)[:, :1, None, None]
        features = torch.cat([fine + shift, F.interpolate(coarse, scale_factor=2)], dim=1)
        occlusion, background = torch.sigmoid(self.maps(coarse)).split(1, dim=1)
        visible = F.interpolate(occlusion, scale_factor=2)
        prediction = torch.sigmoid(self.paint(features * visible))
        return Animation(prediction, occlusion, background, source.keypoints, driving)


def new_state(config: Config) -> TrainState:
    torch.manual_seed(0)
    animator, discriminator = Shifter(), build_discriminator(config)
    return TrainState(
        animator,
        MovingAverage(animator, 0.9),
        discriminator,
        Adam(animator.parameters()),
        discriminator and Adam(discriminator.parameters()),
    )


def test_another_family_trains(tiny: Config) -> None:
    mixing = tiny.priority_cut.model_copy(update={"mix_prob": 1.0})
    config = tiny.model_copy(update={"priority_cut": mixing})
    state = new_state(config)
    before = [p.detach().clone() for p in state.animator.parameters()]
    pair = FramePair(*torch.rand(2, 4, 3, 32, 32))
    parts = micro_batches(pair, draw_randomness(config, 0, Worker(0, 1, CPU)), 1)
    networks = state.animator, state.discriminator
    outcome = training_step(state, *networks, build_perceptual(config), parts, config)
    assert "generator/equivariance_value" in outcome.losses
    assert "generator/equivariance_jacobian" not in outcome.losses
    assert "discriminator/mixed" in outcome.losses
    changed = zip(before, state.animator.parameters(), strict=True)
    assert not any(torch.equal(old, new) for old, new in changed)
    assert {"columns", "keypoints"} <= training_pictures(pair, outcome, config).keys()


def test_pictures_of_a_run_without_a_discriminator_need_no_mask(tiny: Config) -> None:
    alone = tiny.discriminator.model_copy(update={"kind": "none"})
    config = tiny.model_copy(update={"discriminator": alone, "priority_cut": None})
    state = new_state(config)
    pair = FramePair(*torch.rand(2, 4, 3, 32, 32))
    parts = micro_batches(pair, draw_randomness(config, 0, Worker(0, 1, CPU)), 1)
    outcome = training_step(state, state.animator, None, build_perceptual(config), parts, config)
    assert outcome.discriminator_batches == []
    pictures = training_pictures(pair, outcome, config)
    assert pictures.keys() == {"columns", "keypoints"}
    assert pictures["columns"].shape[2] < 6 * 32, "source, driving, generated, occlusion"


def test_another_family_animates_and_exports(tiny: Config) -> None:
    animator = new_state(tiny).animator.eval()
    source = torch.rand(1, 3, 32, 32)
    frames = torch.randint(0, 256, (5, 32, 32, 3), dtype=torch.uint8).numpy()
    batches = animate(animator, source, iter(frames), relative=True, adapt_scale=False)
    predictions = torch.cat([batch.animation.prediction for batch in batches])
    assert 0 <= find_best_frame(animator, source, iter(frames)) < 5
    with torch.no_grad():
        driving = torch.tensor(frames).permute(0, 3, 1, 2) / 255
        exported = RelativeMotion(animator)(source, driving[:1], driving)
    torch.testing.assert_close(exported, predictions)
