"""The state of a training run: networks, optimisers and progress."""

import copy
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn
from torch.optim import Adam

from prioritycut_ray.config import Config
from prioritycut_ray.models.animator import Animator
from prioritycut_ray.models.discriminators import Discriminator
from prioritycut_ray.networks import build_animator, build_discriminator
from prioritycut_ray.runs.locate import Origin


class MovingAverage(nn.Module):
    """The exponential moving average of an animator's weights, with its newest buffers.

    torch's AveragedModel computes the same weights, but copies buffers one by one and sends its
    counter to the device at every update.

    Attributes:
        module: the averaged animator.
        updates: number of updates; the first one copies the weights.
    """

    def __init__(self, animator: Animator, decay: float) -> None:
        super().__init__()
        self.module = copy.deepcopy(animator).requires_grad_(False)
        self.decay = decay
        self.updates = 0

    @torch.no_grad()
    def update_parameters(self, animator: Animator) -> None:
        """Move the average towards the weights of an animator."""
        averaged: list[Tensor] = list(self.module.parameters())
        current: list[Tensor] = list(animator.parameters())
        torch._foreach_lerp_(averaged, current, 1 - self.decay if self.updates else 1.0)
        copy_all(self.module.buffers(), animator.buffers())
        self.updates += 1


def copy_all(targets: Iterable[Tensor], sources: Iterable[Tensor]) -> None:
    """Copy tensors into others, with one kernel launch for each dtype."""
    formats: dict[torch.dtype, tuple[list[Tensor], list[Tensor]]] = defaultdict(lambda: ([], []))
    for target, source in zip(targets, sources, strict=True):
        formats[target.dtype][0].append(target)
        formats[target.dtype][1].append(source)
    for of_format in formats.values():
        torch._foreach_copy_(*of_format)


@dataclass
class TrainState:
    """Everything that a training step changes.

    Attributes:
        animator: the generator side.
        ema: exponential moving average of the animator's weights, for evaluation.
        discriminator: the discriminator that the config selects, or None.
        animator_optimizer: group 0 = detector, group 1 = the rest.
        discriminator_optimizer: one group; None without a discriminator.
        step: optimiser steps taken.
        samples: frame pairs seen by all workers together.
        skipped: updates skipped because a loss or a gradient was not finite.
        skipped_in_a_row: the latest consecutive ones of them, for each network.
        origin: the model that the run started from; None if it started from scratch.
    """

    animator: Animator
    ema: MovingAverage
    discriminator: Discriminator | None
    animator_optimizer: Adam
    discriminator_optimizer: Adam | None
    step: int = 0
    samples: int = 0
    skipped: int = 0
    skipped_in_a_row: dict[str, int] = field(
        default_factory=lambda: {"animator": 0, "discriminator": 0}
    )
    origin: Origin | None = None
    _good_buffers: dict[int, list[Tensor]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for network in self.networks():
            self.remember_buffers(network)

    def networks(self) -> list[nn.Module]:
        """Return the networks that are trained."""
        return [self.animator] + ([self.discriminator] if self.discriminator else [])

    def remember_buffers(self, module: nn.Module) -> None:
        """Remember a module's buffers (batch statistics) after a step that was applied."""
        buffers = list(module.buffers())
        if id(module) not in self._good_buffers:
            self._good_buffers[id(module)] = [torch.empty_like(buffer) for buffer in buffers]
        copy_all(self._good_buffers[id(module)], buffers)

    def restore_buffers(self, module: nn.Module) -> None:
        """Restore a module's buffers as of the last step that was applied."""
        copy_all(module.buffers(), self._good_buffers[id(module)])


def new_state(config: Config, device: torch.device) -> TrainState:
    """Return a fresh state on a device, the same on every rank: the config's seed decides."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.train.seed)
        animator = build_animator(config.model).to(device)
        discriminator = build_discriminator(config)
        discriminator = discriminator and discriminator.to(device)
    optim = config.optim
    adam = partial(Adam, betas=optim.betas, weight_decay=optim.weight_decay, fused=True)
    # A frozen detector (as in taichi-adv) keeps its weights, but still updates batch statistics.
    animator.detector.requires_grad_(optim.detector_lr > 0)
    detector = list(animator.detector.parameters())
    in_detector = set(map(id, detector))
    rest = [p for p in animator.parameters() if id(p) not in in_detector]
    return TrainState(
        animator,
        MovingAverage(animator, optim.ema_decay),
        discriminator,
        adam([{"params": detector, "lr": optim.detector_lr}, {"params": rest, "lr": optim.lr}]),
        adam(discriminator.parameters(), lr=optim.discriminator_lr) if discriminator else None,
    )


def set_learning_rates(state: TrainState, config: Config) -> None:
    """Apply the schedule, a function of samples seen: the same for any number of workers."""
    optim = config.optim
    passed = sum(state.samples >= milestone for milestone in optim.milestones)
    factor = optim.gamma**passed
    detector, rest = state.animator_optimizer.param_groups
    detector["lr"] = optim.detector_lr * factor
    rest["lr"] = optim.lr * factor
    if state.discriminator_optimizer:
        state.discriminator_optimizer.param_groups[0]["lr"] = optim.discriminator_lr * factor
