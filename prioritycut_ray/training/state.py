"""The state of a training run: networks, optimisers, and how far it has come."""

import copy
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.optim import Adam

from prioritycut_ray.config import Config
from prioritycut_ray.models.animator import Animator
from prioritycut_ray.models.discriminators import (
    Discriminator,
)
from prioritycut_ray.networks import build_animator, build_discriminator


class MovingAverage(nn.Module):
    """The exponential moving average of an animator's weights, beside its newest buffers.

    torch's AveragedModel computes the same weights, but copies buffer by buffer, and sends its
    counter to the device at every update.

    Attributes:
        module: the averaged animator.
        updates: how many there were; the first one takes the weights as they are.
    """

    def __init__(self, animator: Animator, decay: float) -> None:
        super().__init__()
        self.module = copy.deepcopy(animator).requires_grad_(False)
        self.decay = decay
        self.updates = 0

    @torch.no_grad()
    def update_parameters(self, animator: Animator) -> None:
        """Move towards the weights of an animator."""
        averaged: list[Tensor] = list(self.module.parameters())
        current: list[Tensor] = list(animator.parameters())
        torch._foreach_lerp_(averaged, current, 1 - self.decay if self.updates else 1.0)
        copy_all(self.module.buffers(), animator.buffers())
        self.updates += 1


def copy_all(targets: Iterable[Tensor], sources: Iterable[Tensor]) -> None:
    """Copy tensors into others, all of a format in one launch."""
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
        animator: detector, dense motion and generator.
        ema: exponential moving average of the animator's weights, for evaluation.
        discriminator: of the kind that the config names.
        animator_optimizer: group 0 = detector, group 1 = the rest.
        discriminator_optimizer: one group.
        step: optimiser steps taken.
        samples: frame pairs seen by all workers together.
        skipped: updates skipped because something was not finite.
        skipped_in_a_row: how many of them come last, for each network.
        stop_wanted: this rank was asked to save and end; not part of a checkpoint.
        stopping: some rank was, and all ranks know it since the same step; not part of one either.
    """

    animator: Animator
    ema: MovingAverage
    discriminator: Discriminator
    animator_optimizer: Adam
    discriminator_optimizer: Adam
    step: int = 0
    samples: int = 0
    skipped: int = 0
    skipped_in_a_row: dict[str, int] = field(
        default_factory=lambda: {"animator": 0, "discriminator": 0}
    )
    stop_wanted: bool = False
    stopping: bool = False
    _good_buffers: dict[int, list[Tensor]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.remember_buffers(self.animator)
        self.remember_buffers(self.discriminator)

    def remember_buffers(self, module: nn.Module) -> None:
        """Keep a module's buffers (batch statistics) as they are after a good step."""
        buffers = list(module.buffers())
        if id(module) not in self._good_buffers:
            self._good_buffers[id(module)] = [torch.empty_like(buffer) for buffer in buffers]
        copy_all(self._good_buffers[id(module)], buffers)

    def restore_buffers(self, module: nn.Module) -> None:
        """Put a module's buffers back to the last good step."""
        copy_all(module.buffers(), self._good_buffers[id(module)])


def new_state(config: Config, device: torch.device) -> TrainState:
    """A fresh state on a device; the same on every rank, by the config's seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.train.seed)
        animator = build_animator(config.model).to(device)
        discriminator = build_discriminator(config).to(device)
    optim = config.optim
    # A frozen detector (as in taichi-adv) keeps its weights; its batch statistics go on.
    animator.detector.requires_grad_(optim.detector_lr > 0)
    detector = list(animator.detector.parameters())
    rest = list(animator.parameters())[len(detector) :]
    return TrainState(
        animator,
        MovingAverage(animator, optim.ema_decay),
        discriminator,
        Adam(
            [{"params": detector, "lr": optim.detector_lr}, {"params": rest, "lr": optim.lr}],
            betas=optim.betas,
            fused=True,
        ),
        Adam(discriminator.parameters(), lr=optim.discriminator_lr, betas=optim.betas, fused=True),
    )


def set_learning_rates(state: TrainState, config: Config) -> None:
    """Apply the schedule: a function of samples seen, the same on any number of workers."""
    optim = config.optim
    passed = sum(state.samples >= milestone for milestone in optim.milestones)
    factor = optim.gamma**passed
    detector, rest = state.animator_optimizer.param_groups
    detector["lr"] = optim.detector_lr * factor
    rest["lr"] = optim.lr * factor
    state.discriminator_optimizer.param_groups[0]["lr"] = optim.discriminator_lr * factor
