"""Training on a GPU: run by ``benchmarks/gpu.py``; skipped where there is none."""

import pytest
import torch

from prioritycut_ray.config import load_config
from prioritycut_ray.data.stream import Batch
from prioritycut_ray.models.animator import FramePair
from prioritycut_ray.precision import has_bfloat16
from prioritycut_ray.state import new_state
from prioritycut_ray.steps import (
    build_perceptual,
    draw_randomness,
    micro_batches,
    training_step,
)
from prioritycut_ray.trainer import prepare
from prioritycut_ray.worker import Worker
from tests.conftest import TINY

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
CPU = torch.device("cpu")


def first_losses(device: torch.device, *words: str) -> dict[str, float]:
    """Of one step on the same frames, weights and random numbers."""
    config = load_config(str(TINY), ["priority_cut.mix_prob=1", *words])
    state, perceptual = new_state(config, device), build_perceptual(config, device)
    state.animator.train()
    state.discriminator.train()
    generator = torch.Generator().manual_seed(0)
    frames = torch.rand(2, config.train.batch_size, 3, 32, 32, generator=generator).to(device)
    randomness = draw_randomness(config, 0, Worker(0, 1, device))
    parts = micro_batches(FramePair(*frames), randomness, config.train.accumulate)
    networks = state.animator, state.discriminator
    losses = training_step(state, *networks, perceptual, parts, config).losses
    assert state.skipped == 0
    return {name: value.item() for name, value in losses.items()}


def test_a_step_gives_the_losses_of_the_cpu() -> None:
    expected = first_losses(CPU)
    for name, loss in first_losses(torch.device("cuda", 0)).items():
        # Convolutions run in TF32, with 10 bits of mantissa.
        assert loss == pytest.approx(expected[name], rel=1e-2, abs=1e-3), name


def test_bfloat16_gives_the_losses_of_float32_within_its_noise() -> None:
    device = torch.device("cuda", 0)
    if not has_bfloat16(device):
        pytest.skip("this GPU has no bfloat16")
    expected = first_losses(device)
    for name, loss in first_losses(device, "train.precision=bfloat16").items():
        assert loss == pytest.approx(expected[name], rel=0.05, abs=0.01), name


def test_activation_checkpointing_changes_no_loss() -> None:
    device = torch.device("cuda", 0)
    expected = first_losses(device)
    for name, loss in first_losses(device, "train.activation_checkpointing=true").items():
        assert loss == pytest.approx(expected[name], rel=1e-2, abs=1e-3), name


def test_frames_arrive_on_the_gpu_channels_last() -> None:
    config = load_config(str(TINY))
    frames = torch.randint(0, 256, (2, 4, 3, 32, 32), dtype=torch.uint8).pin_memory()
    pair = prepare(Batch(*frames, torch.arange(4)), config, torch.device("cuda", 0))
    for frame in pair:
        assert frame.is_cuda
        assert float(frame.min()) >= 0
        assert float(frame.max()) <= 1
