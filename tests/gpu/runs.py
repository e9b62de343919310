"""Small runs on any device, with the same weights, frames and random numbers on each."""

from typing import NamedTuple

import torch
from torch import Tensor

from prioritycut_ray.config import Config, load_config
from prioritycut_ray.models.animator import FramePair
from prioritycut_ray.models.perceptual import PerceptualPyramid
from prioritycut_ray.networks import build_perceptual
from prioritycut_ray.precision import float32_products
from prioritycut_ray.training.state import TrainState, new_state
from prioritycut_ray.training.steps import (
    StepOutcome,
    draw_randomness,
    micro_batches,
    training_step,
)
from prioritycut_ray.training.tracking import training_pictures
from prioritycut_ray.training.worker import Worker
from tests.conftest import TINY

# A bare machine has no ImageNet weights.
WORDS = ["priority_cut.mix_prob=1", "loss.perceptual.weights=random"]
PATCH = ["discriminator.kind=patch", "discriminator.patch_num_blocks=2", "priority_cut=null"]
KINDS = {
    "mixing": [],
    "not mixing": ["priority_cut.mix_prob=0"],
    "patch": PATCH,
    "accumulated": ["train.accumulate=2"],
    "checkpointed": ["train.activation_checkpointing=true"],
    "frozen detector": ["optim.detector_lr=0"],
}


class Run(NamedTuple):
    """Networks on a device, and frames that are the same on any."""

    config: Config
    worker: Worker
    state: TrainState
    perceptual: PerceptualPyramid

    def step(self) -> dict[str, float]:
        """Update both networks and return the losses."""
        return {name: value.item() for name, value in self.outcome().losses.items()}

    @float32_products(convolutions="tf32")
    def outcome(self, *, stop: bool = False) -> StepOutcome:
        """Update both networks, asked to stop or not."""
        config, state = self.config, self.state
        size, count = config.data.size, config.train.batch_size
        generator = torch.Generator().manual_seed(state.step)
        frames = torch.rand(2, count, 3, size, size, generator=generator).to(self.worker.device)
        randomness = draw_randomness(config, state.step, self.worker)
        parts = micro_batches(FramePair(*frames), randomness, config.train.accumulate)
        networks = state.animator, state.discriminator
        outcome = training_step(state, *networks, self.perceptual, parts, config, stop=stop)
        training_pictures(parts[0].pair, outcome, config)
        state.step += 1
        return outcome


def set_up(device: torch.device, *words: str) -> Run:
    config = load_config(str(TINY), [*WORDS, *words])
    state, perceptual = new_state(config, device), build_perceptual(config, device)
    state.animator.train()
    state.discriminator.train()
    return Run(config, Worker(0, 1, device), state, perceptual)


def tensors(state: TrainState) -> dict[str, Tensor]:
    """All weights and buffers."""
    networks = {"animator": state.animator, "ema": state.ema, "critic": state.discriminator}
    return {
        f"{name}.{key}": value.detach().clone()
        for name, network in networks.items()
        for key, value in network.state_dict().items()
    }
