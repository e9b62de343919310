import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from prioritycut_ray.config import Config, load_config
from prioritycut_ray.errors import UserError
from prioritycut_ray.models.animator import FramePair
from prioritycut_ray.models.perceptual import PerceptualPyramid
from prioritycut_ray.networks import build_perceptual
from prioritycut_ray.training.gradients import apply_gradients
from prioritycut_ray.training.state import TrainState, new_state, set_learning_rates
from prioritycut_ray.training.steps import (
    MicroBatch,
    discriminator_gradients,
    draw_randomness,
    generator_gradients,
    micro_batches,
    training_step,
)
from prioritycut_ray.training.worker import Worker
from tests.float64 import as_float64, in_float64
from tests.places import ALONE, FAMILIES, TINY, TINY_TPS

CPU = torch.device("cpu")
either_family = pytest.mark.parametrize("source", FAMILIES.values(), ids=FAMILIES)


@pytest.fixture(scope="module")
def perceptual() -> PerceptualPyramid:
    return build_perceptual(load_config(str(TINY)))


def configured(*words: str, source: Path = TINY) -> Config:
    return load_config(str(source), words)


def a_batch(config: Config, *, step: int = 0, seed: int = 0) -> list[MicroBatch]:
    generator = torch.Generator().manual_seed(seed)
    size, count = config.data.size, config.train.batch_size
    frames = torch.rand(2, count, 3, size, size, generator=generator)
    randomness = draw_randomness(config, step, Worker(0, 1, CPU))
    return micro_batches(FramePair(frames[0], frames[1]), randomness, config.train.accumulate)


def weights(module: torch.nn.Module) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in module.parameters()]


def same(before: list[torch.Tensor], module: torch.nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(before, module.parameters(), strict=True))


def both_steps(
    state: TrainState, perceptual: PerceptualPyramid, batch: list[MicroBatch], config: Config
) -> dict[str, torch.Tensor]:
    state.animator.train()
    networks = state.animator, state.discriminator
    return training_step(state, *networks, perceptual, batch, config).losses


@either_family
def test_each_step_changes_only_its_own_network(
    perceptual: PerceptualPyramid, source: Path
) -> None:
    config = configured(source=source)
    state, batch = new_state(config, CPU), a_batch(config)
    animator, critic = weights(state.animator), weights(state.discriminator)
    buffers = [buffer.clone() for buffer in state.discriminator.buffers()]
    animations, losses = generator_gradients(state, state.animator, perceptual, batch, config)
    apply_gradients(state, {"animator": losses}, config.optim)
    assert not same(animator, state.animator)
    assert same(critic, state.discriminator)
    assert all(p.grad is None for p in state.discriminator.parameters())
    assert all(
        torch.equal(a, b) for a, b in zip(buffers, state.discriminator.buffers(), strict=True)
    ), "the generator's step does not change the discriminator's spectral norms"
    animator = weights(state.animator)
    _, losses = discriminator_gradients(state, state.discriminator, batch, animations, config)
    apply_gradients(state, {"discriminator": losses}, config.optim)
    assert same(animator, state.animator)
    assert not same(critic, state.discriminator)


@either_family
def test_every_trained_parameter_gets_a_gradient(
    perceptual: PerceptualPyramid, source: Path
) -> None:
    config = configured("priority_cut.mix_prob=1", source=source)
    state = new_state(config, CPU)
    state.samples = 100  # The background's motion is on.
    both_steps(state, perceptual, a_batch(config), config)
    for module in (state.animator, state.discriminator):
        missing = [n for n, p in module.named_parameters() if p.grad is None]
        assert missing == []


def test_mixed_losses_replace_or_join_the_ordinary_ones(perceptual: PerceptualPyramid) -> None:
    names = {}
    for key, words in {
        "never": ["priority_cut.mix_prob=0"],
        "full_batch": ["priority_cut.mix_prob=1"],
        "additive": ["priority_cut.variant=additive"],
        "off": ["priority_cut=null"],
        "patch": [
            "priority_cut=null",
            "discriminator.kind=patch",
            "discriminator.patch_num_blocks=2",
        ],
    }.items():
        config = configured(*words)
        losses = both_steps(new_state(config, CPU), perceptual, a_batch(config), config)
        names[key] = {n.removeprefix("discriminator/") for n in losses if n.startswith("disc")}
    assert names["never"] == names["off"] == names["patch"] == {"adversarial", "total"}
    assert names["full_batch"] == {"mixed", "consistency", "total"}
    assert names["additive"] == {"mixed", "consistency", "adversarial", "total"}


@either_family
def test_a_run_without_a_discriminator_has_the_other_losses_alone(
    perceptual: PerceptualPyramid, source: Path
) -> None:
    config, whole = configured(*ALONE, source=source), configured(source=source)
    state, batch = new_state(config, CPU), a_batch(config)
    assert state.discriminator is None
    before = weights(state.animator)
    names = both_steps(state, perceptual, batch, config).keys()
    assert not same(before, state.animator)
    with_critic = both_steps(new_state(whole, CPU), perceptual, batch, whole).keys()
    assert with_critic - names == {
        *("generator/adversarial", "generator/feature_matching"),
        *(name for name in with_critic if name.startswith("discriminator/")),
    }
    assert names < with_critic


def test_the_background_is_trained_from_its_start(perceptual: PerceptualPyramid) -> None:
    """Before, it has neither gradients nor a state of the optimizer, nor does it decay."""
    config = configured("model.background_start=8", *ALONE, source=TINY_TPS)
    state, seen = new_state(config, CPU), []
    background, start = state.animator.background, None
    start = weights(background)
    for step in range(4):
        losses = both_steps(state, perceptual, a_batch(config, step=step), config)
        moved = not same(start, background)
        in_optimizer = next(background.parameters()) in state.animator_optimizer.state
        seen.append((state.samples, "generator/background" in losses, moved, in_optimizer))
        state.samples += config.train.batch_size
    off, on = (False, False, False), (True, True, True)
    assert seen == [(0, *off), (4, *off), (8, *on), (12, *on)]
    assert state.skipped == 0


def test_the_ramp_decides_how_often_a_step_mixes(perceptual: PerceptualPyramid) -> None:
    config = configured("priority_cut.mix_prob=1", "priority_cut.warmup_samples=100")
    state = new_state(config, CPU)
    assert "discriminator/mixed" not in both_steps(state, perceptual, a_batch(config), config)
    state.samples = 100
    assert "discriminator/mixed" in both_steps(state, perceptual, a_batch(config), config)


def test_the_additive_variant_weighs_the_mixed_losses_by_the_ramp(
    perceptual: PerceptualPyramid,
) -> None:
    words = ["priority_cut.variant=additive", "priority_cut.mix_prob=1"]
    config = configured(*words, "priority_cut.warmup_samples=100")
    losses = {}
    for samples in (25, 100):
        state = new_state(config, CPU)
        state.samples = samples
        losses[samples] = both_steps(state, perceptual, a_batch(config), config)
    quarter, whole = (losses[s]["discriminator/mixed"].item() for s in (25, 100))
    assert quarter == pytest.approx(whole / 4, rel=1e-5)


@either_family
def test_the_loss_decreases_on_a_repeated_batch(
    perceptual: PerceptualPyramid, source: Path
) -> None:
    config = configured("optim.lr=1e-3", "optim.detector_lr=1e-3", source=source)
    state, batch = new_state(config, CPU), a_batch(config)
    losses = [
        both_steps(state, perceptual, batch, config)["generator/perceptual"].item()
        for _ in range(15)
    ]
    assert losses[-1] < 0.9 * losses[0]


def test_randomness_is_the_same_for_any_number_of_workers() -> None:
    config = configured("train.batch_size=4")
    whole = draw_randomness(config, 7, Worker(0, 1, CPU))
    halves = [draw_randomness(config, 7, Worker(rank, 2, CPU)) for rank in range(2)]
    assert {half.mix for half in halves} == {whole.mix}
    assert torch.equal(torch.cat([half.spline for half in halves]), whole.spline)
    assert torch.equal(torch.cat([half.mask for half in halves]), whole.mask)
    assert torch.equal(torch.cat([half.motion for half in halves]), whole.motion)
    assert not torch.equal(draw_randomness(config, 8, Worker(0, 1, CPU)).spline, whole.spline)


def gradient(module: torch.nn.Module) -> torch.Tensor:
    return torch.cat([p.grad.flatten() for p in module.parameters() if p.grad is not None])


@pytest.mark.parametrize(
    ("kind", "source", "limit"),
    [("unet", TINY, 1e-5), ("patch", TINY, 1e-5), ("patch", TINY_TPS, 1e-9)],
    ids=["unet", "patch", "thin_plate"],
)
def test_accumulation_gives_the_gradient_of_the_whole_batch(
    kind: str, source: Path, limit: float
) -> None:
    """Batch statistics are frozen: otherwise they would be those of each micro-batch."""
    mixing = [] if kind == "unet" else ["priority_cut=null", "discriminator.patch_num_blocks=2"]
    gradients = []
    for accumulate in (1, 2):
        words = [f"discriminator.kind={kind}", f"train.accumulate={accumulate}", *mixing]
        config = configured(*words, "train.workers=1", source=source)
        state, perceptual = new_state(config, CPU), build_perceptual(config)
        for module in state.animator.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.eval()
        batch = a_batch(config)
        assert len(batch) == accumulate
        networks = state.animator, state.discriminator
        if source == TINY:
            training_step(state, *networks, perceptual, batch, config)
        else:
            with in_float64(*networks, perceptual):
                training_step(state, *networks, perceptual, as_float64(batch), config)
        gradients.append((gradient(state.animator), gradient(state.discriminator)))
    (animator, critic), (animator_2, critic_2) = gradients
    assert (animator - animator_2).norm() <= limit * animator.norm()
    # Spectral norms take one power iteration a forward pass, so here they differ a little.
    assert (critic - critic_2).norm() <= (1e-3 if kind == "unet" else limit) * critic.norm()


def test_gradients_are_clipped_to_the_norm(perceptual: PerceptualPyramid) -> None:
    config = configured("optim.max_grad_norm=0.01")
    state = new_state(config, CPU)
    both_steps(state, perceptual, a_batch(config), config)
    for module in (state.animator, state.discriminator):
        norms = [p.grad.norm() for p in module.parameters() if p.grad is not None]
        assert torch.stack(norms).norm().item() == pytest.approx(0.01, rel=1e-3)


def test_networks_are_clipped_one_by_one_to_their_largest_gradient(
    perceptual: PerceptualPyramid,
) -> None:
    """The inpainting network is not clipped, as in the reference."""
    config = configured("optim.max_grad_norm=1e-5", source=TINY_TPS)
    state = new_state(config, CPU)
    state.samples = 100
    both_steps(state, perceptual, a_batch(config), config)

    def largest(network: torch.nn.Module) -> float:
        return max(p.grad.abs().max().item() for p in network.parameters())

    animator = state.animator
    for network in (animator.detector, animator.dense_motion, state.discriminator):
        assert largest(network) == pytest.approx(1e-5, rel=1e-3)
    assert largest(animator.inpainting) > 1e-4


@either_family
@pytest.mark.parametrize("alone", [(), ALONE], ids=["with", "without"])
def test_a_step_that_is_not_finite_is_skipped_and_changes_nothing(
    perceptual: PerceptualPyramid,
    caplog: pytest.LogCaptureFixture,
    alone: tuple[str, ...],
    source: Path,
) -> None:
    config = configured(*alone, source=source)
    state, batch = new_state(config, CPU), a_batch(config)
    before = {name: t.clone() for name, t in state.animator.state_dict().items()}
    pair = FramePair(batch[0].pair.source * float("nan"), batch[0].pair.driving)
    with caplog.at_level(logging.WARNING):
        both_steps(state, perceptual, [batch[0]._replace(pair=pair)], config)
    for name, tensor in state.animator.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    assert state.skipped == len(state.networks())
    assert "generator/perceptual" in caplog.text
    assert "gradient of" in caplog.text
    both_steps(state, perceptual, batch, config)
    assert state.skipped_in_a_row == {"animator": 0, "discriminator": 0}
    assert all(torch.isfinite(p).all() for p in state.animator.parameters())


def test_too_many_skipped_steps_stop_the_run(perceptual: PerceptualPyramid) -> None:
    config = configured("optim.max_skipped_in_a_row=3")
    state, batch = new_state(config, CPU), a_batch(config)
    pair = FramePair(batch[0].pair.source * float("inf"), batch[0].pair.driving)
    spoilt = [batch[0]._replace(pair=pair)]
    for _ in range(2):
        both_steps(state, perceptual, spoilt, config)
    with pytest.raises(UserError, match=r"3 updates in a row .*optim\.lr"):
        both_steps(state, perceptual, spoilt, config)


@either_family
def test_a_detector_with_learning_rate_zero_keeps_its_weights(
    perceptual: PerceptualPyramid, source: Path
) -> None:
    config = configured("optim.detector_lr=0", source=source)
    state = new_state(config, CPU)
    detector, motion = weights(state.animator.detector), weights(state.animator.dense_motion)
    both_steps(state, perceptual, a_batch(config), config)
    assert same(detector, state.animator.detector)
    assert not same(motion, state.animator.dense_motion)


def test_learning_rates_follow_samples_seen() -> None:
    config = configured("optim.milestones=[100, 200]", "optim.gamma=0.1", "optim.lr=1")
    state = new_state(config, CPU)
    rates: list[Any] = []
    for samples in (0, 99, 100, 200):
        state.samples = samples
        set_learning_rates(state, config)
        rates.append(state.animator_optimizer.param_groups[1]["lr"])
    assert rates == pytest.approx([1, 1, 0.1, 0.01])


def test_the_average_follows_the_weights() -> None:
    config = configured("optim.ema_decay=0.75")
    state = new_state(config, CPU)
    state.ema.update_parameters(state.animator)
    start = state.animator.generator.final.weight.detach().clone()
    with torch.no_grad():
        state.animator.generator.final.weight += 1
    state.ema.update_parameters(state.animator)
    averaged = state.ema.module.generator.final.weight
    assert torch.allclose(averaged, start + 0.25)
