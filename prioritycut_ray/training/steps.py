"""Losses and gradients of the generator side and of the discriminator (method §2 to §4)."""

import hashlib
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from prioritycut_ray import losses, priority_cut
from prioritycut_ray.config import Config, PriorityCutConfig
from prioritycut_ray.equivariance import random_spline, transform_frame
from prioritycut_ray.models.animator import Animation, FramePair
from prioritycut_ray.models.discriminators import Discriminator, DiscriminatorOutput
from prioritycut_ray.models.perceptual import PerceptualPyramid
from prioritycut_ray.models.spectral import normalised_weights
from prioritycut_ray.precision import autocast
from prioritycut_ray.training.gradients import apply_gradients
from prioritycut_ray.training.state import TrainState
from prioritycut_ray.training.worker import Worker
from prioritycut_ray.transfer import send

Losses = dict[str, Tensor]


class Randomness(NamedTuple):
    """Random numbers of some samples of a step.

    They are a function of (seed, step) and of the sample's place in the global batch alone: the
    same for any number of workers.

    Attributes:
        mix: decides whether the step mixes; shared by all ranks.
        spline: standard normal numbers of the equivariance transform.
        mask: uniform numbers of the mixing masks.
    """

    mix: float
    spline: Float[Tensor, "B 31"]
    mask: Float[Tensor, "B 5"]


class MicroBatch(NamedTuple):
    """What goes through the networks at once: a rank's batch, or a part of it (accumulation)."""

    pair: FramePair
    randomness: Randomness


class Judged(NamedTuple):
    """What the discriminator saw of one micro-batch, and said.

    Attributes:
        mask: M of the mixed images, or None where the step did not mix.
        mixed: the mixed images.
        output: on real, fake and mixed images, in this order along the batch.
    """

    mask: Float[Tensor, "B 1 H W"] | None
    mixed: Float[Tensor, "B 3 H W"] | None
    output: DiscriminatorOutput


class Outcome(NamedTuple):
    """What came of a step.

    Attributes:
        animations: of each micro-batch, without gradient history.
        judged: of each micro-batch.
        losses: weighted, by network and name, averaged over micro-batches; on the device.
    """

    animations: list[Animation]
    judged: list[Judged]
    losses: Losses


def draw_randomness(config: Config, step: int, worker: Worker) -> Randomness:
    """The random numbers of a step, from (seed, step) alone, sliced to this rank's samples."""
    name = f"{config.train.seed}/{step}".encode()
    seed = int.from_bytes(hashlib.sha256(name).digest()[:8], "little", signed=True)
    generator = torch.Generator().manual_seed(seed)
    total = config.train.batch_size
    mix = torch.rand((), generator=generator).item()
    spline = torch.randn(total, 31, generator=generator)
    mask = torch.rand(total, 5, generator=generator)
    share = total // worker.world_size
    rows = slice(worker.rank * share, (worker.rank + 1) * share)
    numbers = send(torch.cat([spline[rows], mask[rows]], dim=1), worker.device)
    return Randomness(mix, *numbers.split([31, 5], dim=1))


def training_step(
    state: TrainState,
    animator: nn.Module,
    discriminator: nn.Module,
    perceptual: PerceptualPyramid,
    batches: Sequence[MicroBatch],
    config: Config,
    *,
    on_phase: Callable[[str], None] = lambda phase: None,
) -> Outcome:
    """One optimiser step of both networks, each unless something of it is not finite.

    The discriminator's gradients do not depend on the animator's update, so both updates come last:
    what decides on them is then read from the device once a step (:mod:`.gradients`).

    Args:
        state: the run; its networks are updated.
        animator: the animator, wrapped for distributed training where there are several workers.
        discriminator: the discriminator, wrapped likewise.
        perceptual: frozen features for the perceptual loss.
        batches: micro-batches whose gradients are averaged.
        config: of the run.
        on_phase: told what begins, one of :data:`~prioritycut_ray.training.worker.PHASES`.

    Raises:
        NotFiniteError: too many updates in a row were skipped.
    """
    # The generator learns: reconstruct the driving frame, fool the discriminator.
    on_phase("generator step")
    animations, generator = generator_gradients(state, animator, perceptual, batches, config)
    # The discriminator learns: real, generated and mixed images in one batch.
    on_phase("discriminator step")
    judged, critic = discriminator_gradients(state, discriminator, batches, animations, config)
    on_phase("update")
    apply_gradients(state, {"animator": generator, "discriminator": critic}, config.optim)
    return Outcome(animations, judged, generator | critic)


def micro_batches(pair: FramePair, randomness: Randomness, count: int) -> list[MicroBatch]:
    """Cut a rank's batch into equal parts for gradient accumulation.

    Part i takes every ``count``-th sample from the i-th on. So the i-th parts of all ranks together
    hold the same samples for any number of ranks, and have the same batch statistics.
    """
    tensors = (*pair, randomness.spline, randomness.mask)
    parts = zip(*(_interleaved(tensor, count) for tensor in tensors), strict=True)
    return [
        MicroBatch(FramePair(source, driving), Randomness(randomness.mix, spline, mask))
        for source, driving, spline, mask in parts
    ]


def _interleaved(tensor: Tensor, count: int) -> list[Tensor]:
    if count == 1:
        return [tensor]
    # Copies have no gaps in memory, and the layout of the whole.
    return [tensor[i::count].clone() for i in range(count)]


def generator_gradients(
    state: TrainState,
    animator: nn.Module,
    perceptual: PerceptualPyramid,
    batches: Sequence[MicroBatch],
    config: Config,
) -> tuple[list[Animation], Losses]:
    """Gradients of detector, dense motion and generator, in place of those before (method §2).

    Args:
        state: the run; its animator gets gradients, its discriminator is frozen meanwhile.
        animator: the animator, wrapped for distributed training where there are several workers.
        perceptual: frozen features for the perceptual loss.
        batches: micro-batches whose gradients are averaged.
        config: the weights of the losses.

    Returns:
        The animations of each micro-batch, without gradient history, and the weighted losses.
    """
    animations, collected = [], []
    state.animator_optimizer.zero_grad()
    for batch in batches:
        with _synchronised(animator, last=batch is batches[-1]):
            animation, terms = generator_losses(state, animator, perceptual, batch, config)
            (_total(terms) / len(batches)).backward()
        animations.append(animation.detach())
        collected.append(terms)
    return animations, _average("generator", collected)


def generator_losses(
    state: TrainState,
    animator: nn.Module,
    perceptual: PerceptualPyramid,
    batch: MicroBatch,
    config: Config,
) -> tuple[Animation, Losses]:
    """Animate a micro-batch; the weighted losses of the generator side (method §2)."""
    pair, weights = batch.pair, config.loss
    transform = random_spline(batch.randomness.spline)
    transformed = transform_frame(transform, pair.driving)
    with autocast(config.train.precision, pair.driving.device):
        animation, transformed_keypoints = animator(pair, transformed)
        with torch.no_grad():
            target_features = perceptual(pair.driving)
        features = perceptual(animation.prediction)
        real_features, fake = judge_frozen(state.discriminator, pair, animation)
    driving = animation.driving_keypoints
    return animation, {
        "perceptual": weights.perceptual.weight
        * losses.feature_distance(features, target_features),
        "adversarial": weights.adversarial * losses.generator_adversarial(fake),
        "feature_matching": weights.feature_matching
        * losses.feature_distance(fake.features, real_features),
        "equivariance_value": weights.equivariance_value
        * losses.equivariance_value(driving, transformed_keypoints, transform),
        "equivariance_jacobian": weights.equivariance_jacobian
        * losses.equivariance_jacobian(driving, transformed_keypoints, transform),
    }


def judge_frozen(
    discriminator: Discriminator, pair: FramePair, animation: Animation
) -> tuple[tuple[Tensor, ...], DiscriminatorOutput]:
    """The discriminator's features of real, and all it says of fake, for the generator's losses.

    Gradients flow to the fake image alone. The module is used bare, not wrapped for distributed
    training, with its parameters frozen and its spectral norms at rest: the generator's step leaves
    no trace in it.
    """
    keypoints = animation.driving_keypoints.value.detach()
    discriminator.eval().requires_grad_(False)
    with normalised_weights(discriminator):  # Both passes share them.
        with torch.no_grad():
            real_features = discriminator.encode(pair.driving, keypoints)
        fake = discriminator(animation.prediction, keypoints)
    discriminator.train().requires_grad_(True)
    return real_features, fake


def discriminator_gradients(
    state: TrainState,
    discriminator: nn.Module,
    batches: Sequence[MicroBatch],
    animations: Sequence[Animation],
    config: Config,
) -> tuple[list[Judged], Losses]:
    """Gradients of the discriminator, regularised by mixing, in place of those before (§3, §4).

    Args:
        state: the run; its discriminator gets gradients.
        discriminator: the discriminator, wrapped where there are several workers.
        batches: micro-batches whose gradients are averaged.
        animations: of the same step, without gradient history.
        config: which mask, how often, and which variant.

    Returns:
        What was judged, and the weighted losses.
    """
    judgements, collected = [], []
    state.discriminator_optimizer.zero_grad()
    for batch, animation in zip(batches, animations, strict=True):
        with _synchronised(discriminator, last=batch is batches[-1]):
            judged = judge_mixed(discriminator, batch, animation, state.samples, config)
            terms = discriminator_losses(judged, state.samples, config.priority_cut)
            (_total(terms) / len(batches)).backward()
        judgements.append(judged)
        collected.append(terms)
    return judgements, _average("discriminator", collected)


def judge_mixed(
    discriminator: nn.Module,
    batch: MicroBatch,
    animation: Animation,
    samples: int,
    config: Config,
) -> Judged:
    """Show real, fake and, where the step mixes, mixed images in one forward pass.

    One: with several, DistributedDataParallel overwrites buffers between them, which older torch
    refuses and newer torch does in silence.
    """
    real, fake, mixing = batch.pair.driving, animation.prediction, config.priority_cut
    mask, mixed = None, None
    if mixing is not None and (
        mixing.variant == "additive" or batch.randomness.mix < _ramp(mixing, samples)
    ):
        mask = draw_mask(animation, batch.randomness.mask, mixing)
        mixed = priority_cut.mix(real, fake, mask)
    images = [real, fake] if mixed is None else [real, fake, mixed]
    keypoints = animation.driving_keypoints.value.repeat(len(images), 1, 1)
    with autocast(config.train.precision, real.device):
        output = discriminator(torch.cat(images), keypoints)
    return Judged(mask, mixed, output)


def discriminator_losses(judged: Judged, samples: int, mixing: PriorityCutConfig | None) -> Losses:
    """The weighted losses of a discriminator step (method §3, §4).

    Full-batch variant: in a mixing step the mixed losses replace the ordinary ones. Additive
    variant: they are added at every step, weighted by the ramp p(t).
    """
    output, mask = judged.output, judged.mask
    size = len(output.logits) // (2 if mask is None else 3)
    real, fake = output.rows(slice(size)), output.rows(slice(size, 2 * size))
    if mask is None or mixing is None:
        return {"adversarial": losses.discriminator_adversarial(real, fake)}
    mixed = output.rows(slice(2 * size, None))
    terms = {
        "mixed": losses.mixed_adversarial(mixed, mask),
        "consistency": mixing.consistency * losses.consistency(mixed, real, fake, mask),
    }
    if mixing.variant == "additive":
        ramp = _ramp(mixing, samples)
        terms = {name: ramp * term for name, term in terms.items()}
        terms["adversarial"] = losses.discriminator_adversarial(real, fake)
    return terms


def draw_mask(
    animation: Animation, uniform: Float[Tensor, "B 5"], mixing: PriorityCutConfig
) -> Float[Tensor, "B 1 H W"]:
    """The mask M that the configuration asks for, at image size."""
    options = mixing.model_dump(include={"mask", "top_k", "background_threshold", "swap_prob"})
    return priority_cut.mixing_mask(animation, uniform, **options)


def display_mask(animation: Animation, config: Config) -> Float[Tensor, "B 1 H W"] | None:
    """A mask to look at, as training would draw it; None where mixing is off."""
    if config.priority_cut is None:
        return None
    generator = torch.Generator().manual_seed(config.train.seed)
    uniform = send(
        torch.rand(len(animation.prediction), 5, generator=generator), animation.prediction.device
    )
    return draw_mask(animation, uniform, config.priority_cut)


def _ramp(mixing: PriorityCutConfig, samples: int) -> float:
    """p(t) after ``samples`` frame pairs."""
    return priority_cut.mix_probability(
        samples, mix_prob=mixing.mix_prob, warmup_samples=mixing.warmup_samples
    )


def _synchronised(module: nn.Module, *, last: bool) -> AbstractContextManager[None]:
    """Average gradients over ranks in the last micro-batch alone."""
    if isinstance(module, DistributedDataParallel) and not last:
        return module.no_sync()
    return nullcontext()


def _total(terms: Losses) -> Tensor:
    return torch.stack(list(terms.values())).sum()


def _average(prefix: str, collected: Sequence[Losses]) -> Losses:
    """Detached means over micro-batches, and their total, under ``prefix``."""
    means = torch.stack([torch.stack(list(terms.values())) for terms in collected]).detach().mean(0)
    names = [f"{prefix}/{name}" for name in (*collected[0], "total")]
    return dict(zip(names, (*means.unbind(), means.sum()), strict=True))
