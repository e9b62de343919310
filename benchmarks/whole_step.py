"""A whole training step with its data, in our way or the reference's, for other benchmarks."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from device_rates import DEVICE
from reference_way import reference_perceptual, reference_state, reference_step
from torch import Tensor, nn

from prioritycut_ray.config import Config
from prioritycut_ray.data.stream import Batch
from prioritycut_ray.models.animator import FramePair
from prioritycut_ray.models.perceptual import PerceptualPyramid
from prioritycut_ray.networks import build_perceptual
from prioritycut_ray.precision import float32_products
from prioritycut_ray.training.compilation import compile_networks
from prioritycut_ray.training.state import TrainState, new_state
from prioritycut_ray.training.steps import draw_randomness, micro_batches, training_step
from prioritycut_ray.training.trainer import choose_algorithms, distribute, prepare
from prioritycut_ray.training.worker import Worker

REFERENCE = "reference's way"


class Run(NamedTuple):
    """Networks and frames, ready to take steps.

    Attributes:
        way: :data:`REFERENCE`, or any other name for ours.
        config: the resolved configuration.
        worker: the rank, which determines its part of the frames.
        state: the training state.
        animator: as the trainer calls it, under DDP if there are several workers.
        discriminator: likewise.
        perceptual: with random weights, which do not affect the time.
        frames: this rank's part of a global batch, in pinned memory if there is a GPU.
    """

    way: str
    config: Config
    worker: Worker
    state: TrainState
    animator: nn.Module
    discriminator: nn.Module | None
    perceptual: PerceptualPyramid
    frames: Batch

    @float32_products(convolutions="tf32")
    def step(
        self, on_phase: Callable[[str], None] = lambda phase: None
    ) -> dict[str, Tensor] | dict[str, float]:
        """Send and augment the frames, and update both networks; return the losses."""
        config, state = self.config, self.state
        pair = prepare(self.frames, config, self.worker.device)
        randomness = draw_randomness(config, state.step, self.worker)
        losses: dict[str, Tensor] | dict[str, float]
        if self.way == REFERENCE:
            contiguous = FramePair(*(frames.contiguous() for frames in pair))
            (part,) = micro_batches(contiguous, randomness, 1)
            losses = reference_step(state, self.perceptual, part, config)
        else:
            parts = micro_batches(pair, randomness, config.train.accumulate)
            networks = self.animator, self.discriminator
            outcome = training_step(
                state, *networks, self.perceptual, parts, config, on_phase=on_phase
            )
            state.ema.update_parameters(state.animator)
            losses = outcome.losses
        state.step += 1
        return losses


def make_run(
    way: str, config: Config, worker: Worker | None = None, *, backend: str = "inductor"
) -> Run:
    """Set up networks with random weights and random frames for a way, as the trainer does.

    Args:
        way: see :class:`Run`.
        config: the resolved configuration.
        worker: a single one on :data:`DEVICE` by default.
        backend: of torch.compile, if ``train.compile`` is set.
    """
    worker = worker or Worker(0, 1, DEVICE)
    if worker.device.type == "cuda":
        choose_algorithms(deterministic=config.train.deterministic)
    build, perceptual_of = (
        (reference_state, reference_perceptual)
        if way == REFERENCE
        else (new_state, build_perceptual)
    )
    state, perceptual = build(config, worker.device), perceptual_of(config, worker.device)
    networks = distribute(state, worker)
    if config.train.compile:
        compile_networks(*state.networks(), perceptual, backend=backend)
    return Run(way, config, worker, state, *networks, perceptual, random_frames(config, worker))


def random_frames(config: Config, worker: Worker) -> Batch:
    """A rank's part of a global batch of noise; the batch is the same for any number of ranks."""
    total = config.train.batch_size
    share = total // worker.world_size
    rows = slice(worker.rank * share, (worker.rank + 1) * share)
    generator = torch.Generator().manual_seed(0)
    shape = (2, total, config.data.size, config.data.size, 3)
    frames = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
    frames = frames[:, rows].contiguous()
    if worker.device.type == "cuda":
        frames = frames.pin_memory()
    source, driving = frames.permute(0, 1, 4, 2, 3)  # Channels last, as decoded.
    return Batch(source, driving, torch.arange(total)[rows])
