"""One optimiser step of the generator side and one of the discriminator (method §2 to §4)."""

import hashlib
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from prioritycut_ray import losses, priority_cut
from prioritycut_ray.config import Config, PriorityCutConfig
from prioritycut_ray.equivariance import ThinPlateSpline, transform_frame
from prioritycut_ray.models.animator import Animation, FramePair
from prioritycut_ray.models.dense_motion import DenseMotion
from prioritycut_ray.models.discriminators import Discriminator, DiscriminatorOutput
from prioritycut_ray.models.perceptual import PerceptualPyramid, perceptual_features
from prioritycut_ray.state import TrainState
from prioritycut_ray.worker import Worker

Losses = dict[str, Tensor]


class Randomness(NamedTuple):
    """All random numbers of a step, drawn for the global batch and sliced by rank.

    They are a function of (seed, step) alone: the same for any number of workers.

    Attributes:
        mix: decides whether the step mixes; shared by all ranks.
        spline: standard normal numbers of the equivariance transform.
        mask: uniform numbers of the mixing masks.
    """

    mix: float
    spline: Float[Tensor, "B 31"]
    mask: Float[Tensor, "B 5"]


class DiscriminatorStep(NamedTuple):
    """What a discriminator step saw and paid.

    Attributes:
        losses: weighted, by name.
        mask: M of the mixed images, or None where the step did not mix.
        mixed: the mixed images.
        output: on real, fake and mixed images, in this order along the batch.
    """

    losses: Losses
    mask: Float[Tensor, "B 1 H W"] | None
    mixed: Float[Tensor, "B 3 H W"] | None
    output: DiscriminatorOutput


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
    return Randomness(mix, *(numbers[rows].to(worker.device) for numbers in (spline, mask)))


def build_perceptual(config: Config) -> PerceptualPyramid:
    """The frozen network of the perceptual loss."""
    options = config.loss.perceptual
    return PerceptualPyramid(
        perceptual_features(options.weights, seed=options.seed), options.scales
    )


def generator_step(
    state: TrainState,
    animator: nn.Module,
    perceptual: PerceptualPyramid,
    pair: FramePair,
    transform: ThinPlateSpline,
    config: Config,
) -> tuple[Animation, Losses]:
    """One optimiser step of detector, dense motion and generator (method §2).

    Args:
        state: the run; its animator is updated, its discriminator is frozen meanwhile.
        animator: the animator, wrapped for distributed training where there are several workers.
        perceptual: frozen features for the perceptual loss.
        pair: frames in [0, 1].
        transform: the random warp of the equivariance losses.
        config: the weights of the losses.
    """
    transformed = transform_frame(transform, pair.driving)
    animation, transformed_keypoints = animator(pair, transformed)
    weights = config.loss
    with torch.no_grad():
        target_features = perceptual(pair.driving)
    real, fake = judge_frozen(state.discriminator, pair, animation)
    driving = animation.driving_keypoints
    terms = {
        "perceptual": weights.perceptual.weight
        * losses.feature_distance(perceptual(animation.prediction), target_features),
        "adversarial": weights.adversarial * losses.generator_adversarial(fake),
        "feature_matching": weights.feature_matching
        * losses.feature_distance(fake.features, real.features),
        "equivariance_value": weights.equivariance_value
        * losses.equivariance_value(driving, transformed_keypoints, transform),
        "equivariance_jacobian": weights.equivariance_jacobian
        * losses.equivariance_jacobian(driving, transformed_keypoints, transform),
    }
    total = torch.stack(list(terms.values())).sum()
    state.animator_optimizer.zero_grad()
    total.backward()
    state.animator_optimizer.step()
    terms["total"] = total
    return animation, {f"generator/{name}": loss.detach() for name, loss in terms.items()}


def judge_frozen(
    discriminator: Discriminator, pair: FramePair, animation: Animation
) -> tuple[DiscriminatorOutput, DiscriminatorOutput]:
    """Real and fake as the discriminator sees them, with gradients to the fake image alone.

    The module is used bare, not wrapped for distributed training, with its parameters frozen and
    its spectral norms at rest: the generator's step leaves no trace in it.
    """
    keypoints = animation.driving_keypoints.value.detach()
    discriminator.eval().requires_grad_(False)
    with torch.no_grad():
        real = discriminator(pair.driving, keypoints)
    fake = discriminator(animation.prediction, keypoints)
    discriminator.train().requires_grad_(True)
    return real, fake


def discriminator_step(
    state: TrainState,
    discriminator: nn.Module,
    pair: FramePair,
    animation: Animation,
    randomness: Randomness,
    config: Config,
) -> DiscriminatorStep:
    """One optimiser step of the discriminator, regularised by mixing (method §3, §4).

    Args:
        state: the run; its discriminator is updated.
        discriminator: the discriminator, wrapped where there are several workers.
        pair: frames in [0, 1].
        animation: of the generator's step; used detached.
        randomness: of this step.
        config: which mask, how often, and which variant.
    """
    real, fake = pair.driving, animation.prediction.detach()
    keypoints = animation.driving_keypoints.value.detach()
    mixing = config.priority_cut
    ramp = 0.0
    if mixing is not None:
        ramp = priority_cut.mix_probability(
            state.samples, mix_prob=mixing.mix_prob, warmup_samples=mixing.warmup_samples
        )
    mask, mixed = None, None
    if mixing is not None and (randomness.mix < ramp or mixing.variant == "additive"):
        mask = draw_mask(animation.motion, randomness.mask, mixing, real.shape[-1])
        mixed = priority_cut.mix(real, fake, mask)

    # One forward pass: DistributedDataParallel allows no more before the backward pass.
    images = [real, fake] if mixed is None else [real, fake, mixed]
    output = discriminator(torch.cat(images), keypoints.repeat(len(images), 1, 1))
    terms = discriminator_losses(output, mask, mixing, ramp)

    total = torch.stack(list(terms.values())).sum()
    state.discriminator_optimizer.zero_grad()
    total.backward()
    state.discriminator_optimizer.step()
    terms["total"] = total
    detached = {f"discriminator/{name}": loss.detach() for name, loss in terms.items()}
    return DiscriminatorStep(detached, mask, mixed, output)


def draw_mask(
    motion: DenseMotion, uniform: Float[Tensor, "B 5"], mixing: PriorityCutConfig, size: int
) -> Float[Tensor, "B 1 H W"]:
    """The mask M that the configuration asks for, at image size."""
    options = mixing.model_dump(include={"mask", "top_k", "background_threshold", "swap_prob"})
    return priority_cut.mixing_mask(motion, uniform, (size, size), **options)


def discriminator_losses(
    output: DiscriminatorOutput,
    mask: Float[Tensor, "B 1 H W"] | None,
    mixing: PriorityCutConfig | None,
    ramp: float,
) -> Losses:
    """The weighted losses of a discriminator step (method §3, §4).

    Args:
        output: on real, fake and, if ``mask`` is given, mixed images along the batch.
        mask: M of the mixed images.
        mixing: variant and weight of the consistency loss.
        ramp: p(t), the weight of the mixed losses in the additive variant.
    """
    if mask is None or mixing is None:
        size = len(output.logits) // 2
        real, fake = output.rows(slice(size)), output.rows(slice(size, None))
        return {"adversarial": losses.discriminator_adversarial(real, fake)}
    size = len(mask)
    real, fake, mixed = (output.rows(slice(i * size, (i + 1) * size)) for i in range(3))
    weight = ramp if mixing.variant == "additive" else 1.0
    terms = {
        "mixed": weight * losses.mixed_adversarial(mixed, mask),
        "consistency": weight * mixing.consistency * losses.consistency(mixed, real, fake, mask),
    }
    if mixing.variant == "additive":
        terms["adversarial"] = losses.discriminator_adversarial(real, fake)
    return terms


def display_mask(animation: Animation, config: Config) -> Float[Tensor, "B 1 H W"] | None:
    """A mask to look at, as training would draw it; None where mixing is off."""
    if config.priority_cut is None:
        return None
    batch, _, _, size = animation.prediction.shape
    generator = torch.Generator().manual_seed(config.train.seed)
    uniform = torch.rand(batch, 5, generator=generator).to(animation.prediction.device)
    return draw_mask(animation.motion, uniform, config.priority_cut, size)
