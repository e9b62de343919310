"""Clip gradients and apply them, unless they are not finite."""

import logging
import math
from collections.abc import Mapping
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from prioritycut_ray.config import OptimConfig
from prioritycut_ray.errors import NotFiniteError
from prioritycut_ray.training.state import TrainState

logger = logging.getLogger(__name__)

Network = Literal["animator", "discriminator"]


def apply_gradients(
    state: TrainState,
    losses: Mapping[Network, Mapping[str, Tensor]],
    options: OptimConfig,
    *,
    stop: bool = False,
) -> bool:
    """Take one optimiser step of each network, or skip it on all ranks together.

    The step of a network is skipped if any rank has a loss or a gradient for it that is not finite.
    The names of those tensors are logged, and the batch statistics from before the step are
    restored. Both networks are updated here because the host must wait for the device to decide:
    this is the only such wait of a step, so the request to stop is exchanged along with it.

    Args:
        state: networks and optimisers; counts skipped updates.
        losses: this rank's losses by name, for each network that has gradients.
        options: clipping, and how many skipped steps in a row end the run.
        stop: this rank was asked to stop.

    Returns:
        Whether any rank was asked to stop; the same on all ranks.

    Raises:
        NotFiniteError: too many steps in a row were skipped.
    """
    finite = torch.stack(
        [
            torch.isfinite(_clip(state, network, options) + _total(terms))
            for network, terms in losses.items()
        ]
    )
    finite_everywhere, go_on = _agree(finite, not stop)
    for network, is_finite in zip(losses, finite_everywhere, strict=True):
        if is_finite:
            _update(state, network)
        else:
            _skip(state, network, losses[network], options)
    return not go_on


def _clip(state: TrainState, network: Network, options: OptimConfig) -> Tensor:
    """Clip a network's gradients if configured; return a number that is finite if they all are."""
    module: nn.Module = getattr(state, network)
    order = math.inf if options.grad_norm == "maximum" else 2.0
    gradients = {id(p): p.grad for p in module.parameters() if p.grad is not None}
    norms = dict(zip(gradients, _norms(list(gradients.values()), order), strict=True))
    if options.max_grad_norm is not None:
        parts = state.animator.clipped_parts() if network == "animator" else [module]
        for part in parts:
            # Only what the step used has a gradient.
            if own := [norms[id(p)] for p in part.parameters() if id(p) in norms]:
                norm = torch.linalg.vector_norm(torch.stack(own), order)
                nn.utils.clip_grads_with_norm_(part.parameters(), options.max_grad_norm, norm)
    # Clipping does not change whether all of them are finite.
    total: Tensor = torch.linalg.vector_norm(torch.stack(list(norms.values())), order)
    return total


def _norms(gradients: list[Tensor], order: float) -> list[Tensor]:
    """Return the norm of each gradient."""
    if order == math.inf and gradients[0].device.type == "cpu":
        # 10 times as fast as torch's norm.
        return [torch.maximum(gradient.amax(), -gradient.amin()) for gradient in gradients]
    return list(torch._foreach_norm(gradients, order))


def _total(losses: Mapping[str, Tensor]) -> Tensor:
    return torch.stack(list(losses.values())).sum()


def _agree(finite: Tensor, go_on: bool) -> tuple[list[bool], bool]:
    """Return which conditions hold on every rank, by one collective operation and one wait."""
    # The device itself writes the flag: a copy from the host would be another wait.
    flags = torch.cat([finite.float(), finite.new_full((1,), go_on, dtype=torch.float32)])
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(flags, op=dist.ReduceOp.MIN)
    *all_finite, all_go_on = (flag > 0 for flag in flags.tolist())
    return all_finite, all_go_on


def _update(state: TrainState, network: Network) -> None:
    optimizer: Optimizer = getattr(state, f"{network}_optimizer")
    optimizer.step()
    state.remember_buffers(getattr(state, network))
    state.skipped_in_a_row[network] = 0


def _skip(
    state: TrainState, network: Network, losses: Mapping[str, Tensor], options: OptimConfig
) -> None:
    module: nn.Module = getattr(state, network)
    state.skipped += 1
    state.skipped_in_a_row[network] += 1
    in_a_row = state.skipped_in_a_row[network]
    state.restore_buffers(module)
    culprits = _not_finite(module, losses)
    if in_a_row & (in_a_row - 1) == 0:  # at 1, 2, 4, 8, ...
        logger.warning(
            "step %d: skipped the update of the %s, %d in a row; not finite: %s",
            state.step,
            network,
            in_a_row,
            culprits or "a loss of another rank",
        )
    if in_a_row >= options.max_skipped_in_a_row:
        raise NotFiniteError(
            f"training stopped at step {state.step}: {in_a_row} updates in a row of the {network} "
            f"had losses or gradients that are not finite ({culprits or 'on another rank'}); lower "
            "optim.lr or the weight of that loss, or set optim.max_grad_norm, and train again "
            "under another name=..."
        )


def _not_finite(module: nn.Module, losses: Mapping[str, Tensor]) -> str:
    """Name the losses and some of the gradients that are not finite on this rank, if any."""
    bad_losses = [name for name, loss in losses.items() if not torch.isfinite(loss)]
    bad_gradients = [
        name
        for name, parameter in module.named_parameters()
        if parameter.grad is not None and not torch.isfinite(parameter.grad).all()
    ]
    shown = [*bad_losses, *(f"gradient of {name}" for name in bad_gradients[:3])]
    more = len(bad_gradients) - 3
    return ", ".join(shown) + (f" and {more} more gradients" if more > 0 else "")
