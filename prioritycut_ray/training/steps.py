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
from prioritycut_ray.config import Config, LossConfig, PriorityCutConfig
from prioritycut_ray.equivariance import random_spline, transform_frame
from prioritycut_ray.models.animator import Animation, FramePair, TrainingInputs
from prioritycut_ray.models.discriminators import Discriminator, DiscriminatorOutput
from prioritycut_ray.models.perceptual import PerceptualPyramid
from prioritycut_ray.models.spectral import normalised_weights
from prioritycut_ray.precision import autocast
from prioritycut_ray.training.gradients import Network, apply_gradients
from prioritycut_ray.training.state import TrainState
from prioritycut_ray.training.worker import Worker
from prioritycut_ray.transfer import send

Losses = dict[str, Tensor]


class Randomness(NamedTuple):
    """Random numbers for some samples of a step.

    They depend only on (seed, step) and on a sample's place in the global batch, and so are the
    same for any number of workers.

    Attributes:
        mix: uniform number that decides whether the step mixes; shared by all ranks.
        spline: standard normal numbers for the equivariance transform.
        mask: uniform numbers for the mixing masks.
        motion: uniform numbers for each motion of the animator.
    """

    mix: float
    spline: Float[Tensor, "B 31"]
    mask: Float[Tensor, "B 5"]
    motion: Float[Tensor, "B M"]


class MicroBatch(NamedTuple):
    """What passes through the networks at once: a rank's batch, or a part (accumulation)."""

    pair: FramePair
    randomness: Randomness


class DiscriminatorBatch(NamedTuple):
    """Inputs and outputs of the discriminator for one micro-batch.

    Attributes:
        mask: M of the mixed images, or None if the step did not mix.
        mixed: the mixed images, or None.
        output: outputs for real, fake and mixed images, in this order along the batch.
    """

    mask: Float[Tensor, "B 1 H W"] | None
    mixed: Float[Tensor, "B 3 H W"] | None
    output: DiscriminatorOutput


class StepOutcome(NamedTuple):
    """The outcome of a training step.

    Attributes:
        animations: one for each micro-batch, without gradient history.
        discriminator_batches: one for each micro-batch; none without a discriminator.
        losses: weighted losses by network and name, averaged over micro-batches; on the device.
        stop: some rank was asked to stop; the same on all ranks.
    """

    animations: list[Animation]
    discriminator_batches: list[DiscriminatorBatch]
    losses: Losses
    stop: bool


def draw_randomness(config: Config, step: int, worker: Worker) -> Randomness:
    """Draw the random numbers of a step from (seed, step), and return those of this rank."""
    name = f"{config.train.seed}/{step}".encode()
    seed = int.from_bytes(hashlib.sha256(name).digest()[:8], "little", signed=True)
    generator = torch.Generator().manual_seed(seed)
    total = config.train.batch_size
    mix = torch.rand((), generator=generator).item()
    spline = torch.randn(total, 31, generator=generator)
    mask = torch.rand(total, 5, generator=generator)
    motion = torch.rand(total, config.model.num_motions, generator=generator)
    share = total // worker.world_size
    rows = slice(worker.rank * share, (worker.rank + 1) * share)
    numbers = torch.cat([spline, mask, motion], dim=1)[rows]
    return Randomness(mix, *send(numbers, worker.device).split([31, 5, motion.shape[1]], dim=1))


def training_step(
    state: TrainState,
    animator: nn.Module,
    discriminator: nn.Module | None,
    perceptual: PerceptualPyramid,
    batches: Sequence[MicroBatch],
    config: Config,
    *,
    stop: bool = False,
    on_phase: Callable[[str], None] = lambda phase: None,
) -> StepOutcome:
    """Take one optimiser step of each network whose losses and gradients are finite.

    The discriminator's gradients do not depend on the animator's update, so both updates come last,
    and the host waits for the device once a step (:mod:`.gradients`).

    Args:
        state: the training state; its networks are updated.
        animator: the animator, wrapped for distributed training if there are several workers.
        discriminator: the discriminator, wrapped likewise; None to train without one.
        perceptual: frozen features for the perceptual loss.
        batches: micro-batches whose gradients are averaged.
        config: the run's configuration.
        stop: this rank was asked to stop.
        on_phase: called with the phase that begins, one of
            :data:`~prioritycut_ray.training.worker.PHASES`.

    Raises:
        NotFiniteError: too many updates in a row were skipped.
    """
    # Train the generator: reconstruct the driving frame, fool the discriminator.
    on_phase("generator step")
    animations, generator = generator_gradients(state, animator, perceptual, batches, config)
    losses_by_network: dict[Network, Losses] = {"animator": generator}
    # Train the discriminator: real, generated and mixed images in one batch.
    seen: list[DiscriminatorBatch] = []
    if discriminator is not None:
        on_phase("discriminator step")
        seen, critic = discriminator_gradients(state, discriminator, batches, animations, config)
        losses_by_network["discriminator"] = critic
    # Run the optimizers and update the weights.
    on_phase("update")
    stop = apply_gradients(state, losses_by_network, config.optim, stop=stop)
    merged = {name: loss for terms in losses_by_network.values() for name, loss in terms.items()}
    return StepOutcome(animations, seen, merged, stop)


def micro_batches(pair: FramePair, randomness: Randomness, count: int) -> list[MicroBatch]:
    """Split a rank's batch into equal parts for gradient accumulation.

    Part i takes every ``count``-th sample, starting at the i-th. So the i-th parts of all ranks
    together hold the same samples, and have the same batch statistics, for any number of ranks.
    """
    mix, *numbers = randomness
    parts = zip(*(_interleaved(tensor, count) for tensor in (*pair, *numbers)), strict=True)
    return [
        MicroBatch(FramePair(source, driving), Randomness(mix, *of_part))
        for source, driving, *of_part in parts
    ]


def _interleaved(tensor: Tensor, count: int) -> list[Tensor]:
    if count == 1:
        return [tensor]
    # Copies are dense, and keep the memory layout of the batch.
    return [tensor[i::count].clone() for i in range(count)]


def generator_gradients(
    state: TrainState,
    animator: nn.Module,
    perceptual: PerceptualPyramid,
    batches: Sequence[MicroBatch],
    config: Config,
) -> tuple[list[Animation], Losses]:
    """Compute the animator's gradients, replacing earlier ones (method §2).

    Args:
        state: the training state; its animator gets gradients, its discriminator stays frozen.
        animator: the animator, wrapped for distributed training if there are several workers.
        perceptual: frozen features for the perceptual loss.
        batches: micro-batches whose gradients are averaged.
        config: gives the weights of the losses.

    Returns:
        An animation for each micro-batch, without gradient history, and the weighted losses.
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
    """Animate a micro-batch and return the weighted losses of the generator side (method §2)."""
    pair, weights = batch.pair, config.loss
    spline = random_spline(batch.randomness.spline, euclidean=state.animator.euclidean_warps)
    transformed = transform_frame(spline, pair.driving)
    inputs = TrainingInputs(transformed, batch.randomness.motion, state.samples)
    with autocast(config.train.precision, pair.driving.device):
        animation, transformed_keypoints, own = animator(pair, inputs)
        with torch.no_grad():
            target_features = perceptual(pair.driving)
        features = perceptual(animation.prediction)
        critique = _critique(state.discriminator, pair, animation, weights)
    driving = animation.driving_keypoints
    terms = {
        "perceptual": weights.perceptual.weight
        * losses.feature_distance(features, target_features),
        **critique,
        "equivariance_value": weights.equivariance_value
        * losses.equivariance_value(driving, transformed_keypoints, spline),
    }
    if driving.jacobian is not None:
        jacobian = losses.equivariance_jacobian(driving, transformed_keypoints, spline)
        terms["equivariance_jacobian"] = weights.equivariance_jacobian * jacobian
    return animation, terms | {name: getattr(weights, name) * loss for name, loss in own.items()}


def _critique(
    discriminator: Discriminator | None, pair: FramePair, animation: Animation, weights: LossConfig
) -> Losses:
    """Return the weighted losses that need a discriminator; none without one."""
    if discriminator is None:
        return {}
    real_features, fake = discriminate_frozen(discriminator, pair, animation)
    return {
        "adversarial": weights.adversarial * losses.generator_adversarial(fake),
        "feature_matching": weights.feature_matching
        * losses.feature_distance(fake.features, real_features),
    }


def discriminate_frozen(
    discriminator: Discriminator, pair: FramePair, animation: Animation
) -> tuple[tuple[Tensor, ...], DiscriminatorOutput]:
    """Return the discriminator's features of real frames and its output for fake ones.

    Gradients flow only to the fake images. The module is not wrapped for distributed training, its
    parameters are frozen, and its spectral norms are not updated: the generator's step does not
    change it.
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
) -> tuple[list[DiscriminatorBatch], Losses]:
    """Compute the discriminator's gradients, replacing earlier ones (method §3, §4).

    Args:
        state: the training state; its discriminator gets gradients.
        discriminator: the discriminator, wrapped if there are several workers.
        batches: micro-batches whose gradients are averaged.
        animations: animations of the same step, without gradient history.
        config: gives the kind of mask, how often to mix, and the variant.

    Returns:
        The discriminator's inputs and outputs for each micro-batch, and the weighted losses.
    """
    seen, collected = [], []
    assert state.discriminator_optimizer is not None
    state.discriminator_optimizer.zero_grad()
    for batch, animation in zip(batches, animations, strict=True):
        with _synchronised(discriminator, last=batch is batches[-1]):
            outputs = discriminate(discriminator, batch, animation, state.samples, config)
            terms = discriminator_losses(outputs, state.samples, config.priority_cut)
            (_total(terms) / len(batches)).backward()
        seen.append(outputs)
        collected.append(terms)
    return seen, _average("discriminator", collected)


def discriminate(
    discriminator: nn.Module,
    batch: MicroBatch,
    animation: Animation,
    samples: int,
    config: Config,
) -> DiscriminatorBatch:
    """Pass real, fake and, if the step mixes, mixed images through the discriminator at once.

    In several passes, DistributedDataParallel would overwrite buffers between them, which older
    versions of torch refuse and newer ones do silently.
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
    return DiscriminatorBatch(mask, mixed, output)


def discriminator_losses(
    batch: DiscriminatorBatch, samples: int, mixing: PriorityCutConfig | None
) -> Losses:
    """Return the weighted losses of a discriminator step (method §3, §4).

    In the full-batch variant, the mixed losses replace the ordinary ones in a mixing step. In the
    additive variant, they are added at every step, weighted by the ramp p(t).
    """
    output, mask = batch.output, batch.mask
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
    """Draw the mask M that the configuration selects, at image size."""
    options = mixing.model_dump(include={"mask", "top_k", "background_threshold", "swap_prob"})
    return priority_cut.mixing_mask(animation, uniform, **options)


def display_mask(animation: Animation, config: Config) -> Float[Tensor, "B 1 H W"] | None:
    """Draw a mask for pictures, as training would; None if mixing is off."""
    if config.priority_cut is None:
        return None
    generator = torch.Generator().manual_seed(config.train.seed)
    uniform = send(
        torch.rand(len(animation.prediction), 5, generator=generator), animation.prediction.device
    )
    return draw_mask(animation, uniform, config.priority_cut)


def _ramp(mixing: PriorityCutConfig, samples: int) -> float:
    """Return p(t) after ``samples`` frame pairs."""
    return priority_cut.mix_probability(
        samples, mix_prob=mixing.mix_prob, warmup_samples=mixing.warmup_samples
    )


def _synchronised(module: nn.Module, *, last: bool) -> AbstractContextManager[None]:
    """Average gradients over ranks only in the last micro-batch."""
    if isinstance(module, DistributedDataParallel) and not last:
        return module.no_sync()
    return nullcontext()


def _total(terms: Losses) -> Tensor:
    return torch.stack(list(terms.values())).sum()


def _average(prefix: str, collected: Sequence[Losses]) -> Losses:
    """Return detached means over micro-batches, and their total, under ``prefix``."""
    means = torch.stack([torch.stack(list(terms.values())) for terms in collected]).detach().mean(0)
    names = [f"{prefix}/{name}" for name in (*collected[0], "total")]
    return dict(zip(names, (*means.unbind(), means.sum()), strict=True))
