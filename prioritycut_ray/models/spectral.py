"""Spectral normalisation of all layers of a network together (method §3).

It computes the numbers of ``torch.nn.utils.parametrizations.spectral_norm``, under the same names
in a state dict. torch's own needs twenty kernel launches per layer and pass, copies weights that
are channels last, and multiplies in half precision under CUDA's autocast.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.spectral_norm import SpectralNorm as SpectralNormHook

from prioritycut_ray.models.blocks import in_float32

_Layer = TypeVar("_Layer", bound=nn.Module)
_EPSILON = 1e-12
"""Shorter vectors are divided by this instead of their length."""
_FIRST_ITERATIONS = 15


class SpectralNorm(nn.Module):
    """Divides a weight by an estimate of its largest singular value: σ = uᵀ·W·v.

    In training mode each forward pass starts with one power iteration: u = W·v, then v = Wᵀ·u, both
    scaled to length 1. The gradient treats u and v as constants.

    Args:
        weight: initial weight; its rows are output features.
    """

    _u: Tensor
    _v: Tensor

    def __init__(self, weight: Float[Tensor, "O *I"]) -> None:
        super().__init__()
        self.computed: Tensor | None = None
        u, v = (weight.new_empty(size).normal_() for size in weight.flatten(1).shape)
        self.register_buffer("_u", u / u.norm())
        self.register_buffer("_v", v / v.norm())
        for _ in range(_FIRST_ITERATIONS):
            _estimate([weight], [self], iterate=True)

    def forward(self, weight: Float[Tensor, "O *I"]) -> Float[Tensor, "O *I"]:
        if self.computed is not None:
            return self.computed
        return _normalise([weight], [self])[0]


def spectral_norm(layer: _Layer) -> _Layer:
    """Normalise the weight of a layer, and return the layer."""
    weight: Tensor = layer.get_parameter("weight").detach()
    parametrize.register_parametrization(layer, "weight", SpectralNorm(weight))
    return layer


class _OutsideAutocast(SpectralNormHook):
    """The forward pre-hook of torch's older spectral norm, computing in float32."""

    def compute_weight(self, module: nn.Module, do_power_iteration: bool) -> Tensor:
        with in_float32(module.get_parameter("weight_orig")):
            return super().compute_weight(module, do_power_iteration)


def spectral_norm_of_reference(layer: _Layer) -> _Layer:
    """Normalise the weight of a layer as the reference does, and return the layer.

    The reference uses torch's older spectral norm, which has other tensor names and swaps the two
    halves of a power iteration: in training mode its weights differ.
    """
    torch.nn.utils.spectral_norm(layer)
    for hook in layer._forward_pre_hooks.values():
        hook.__class__ = _OutsideAutocast
    return layer


@contextmanager
def normalised_weights(network: nn.Module) -> Iterator[None]:
    """Compute the normalised weights of a network once, for all layers together.

    All passes in the body, and nested calls, share them, and so take one power iteration together.
    """
    layers: list[Any] = [
        layer.get_submodule("parametrizations.weight")
        for layer in network.modules()
        if parametrize.is_parametrized(layer, "weight")
    ]
    norms: list[SpectralNorm] = [layer[0] for layer in layers]
    if not norms or norms[0].computed is not None:
        yield
        return
    weights = _normalise([layer.original for layer in layers], norms)
    try:
        for norm, weight in zip(norms, weights, strict=True):
            norm.computed = weight
        yield
    finally:
        for norm in norms:
            norm.computed = None


def _normalise(weights: Sequence[Tensor], norms: Sequence[SpectralNorm]) -> list[Tensor]:
    """Return W / σ for some weights, after a power iteration in training mode."""
    us, vs, sigmas = _estimate(weights, norms, iterate=norms[0].training)
    with torch.no_grad():
        quotients = torch._foreach_div(list(weights), sigmas)
        us = list(torch._foreach_div(us, sigmas))
    return [_Quotient.apply(*each) for each in zip(weights, quotients, us, vs, sigmas, strict=True)]


@torch.no_grad()
def _estimate(
    weights: Sequence[Tensor], norms: Sequence[SpectralNorm], *, iterate: bool
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Return u, v and σ for some weights, with v in the order of a matrix's columns."""
    matrices = [_matrix(weight) for weight in weights]
    stored_us = [norm._u for norm in norms]
    stored_vs = [
        norm._v.view(1, *weight.shape[1:]).movedim(1, -1)
        for norm, weight in zip(norms, weights, strict=True)
    ]
    rows = [torch.empty(v.shape, dtype=v.dtype, device=v.device) for v in stored_vs]
    torch._foreach_copy_(rows, stored_vs)
    us, vs = stored_us, [row.flatten() for row in rows]
    with in_float32(weights[0]):
        products = [matrix.mv(v) for matrix, v in zip(matrices, vs, strict=True)]
        if not iterate:
            return us, vs, [u.dot(product) for u, product in zip(us, products, strict=True)]
        us, _ = _scaled(products)
        # uᵀ·W·v is the length of Wᵀ·u, because v is that vector scaled to length 1.
        vs, sigmas = _scaled([matrix.mT.mv(u) for matrix, u in zip(matrices, us, strict=True)])
    torch._foreach_copy_(stored_us, us)
    torch._foreach_copy_(stored_vs, [v.view_as(x) for v, x in zip(vs, stored_vs, strict=True)])
    return us, vs, sigmas


def _scaled(vectors: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Scale vectors to length 1; return them and their former lengths."""
    lengths = torch._foreach_norm(vectors)
    scaled = torch._foreach_div(vectors, torch._foreach_clamp_min(lengths, _EPSILON))
    return list(scaled), list(lengths)


def _matrix(weight: Float[Tensor, "O *I"]) -> Float[Tensor, "O N"]:
    """View a weight with one row per output feature, in the order of channels-last memory."""
    return weight.movedim(1, -1).flatten(1)


class _Quotient(torch.autograd.Function):
    """A given W / σ, with the gradient for W: (G − ⟨G, W⟩ · u/σ · vᵀ) / σ."""

    @staticmethod
    def forward(
        ctx: Any, weight: Tensor, quotient: Tensor, u: Tensor, v: Tensor, sigma: Tensor
    ) -> Tensor:
        """Args: W, W / σ, u / σ, v, σ."""
        ctx.save_for_backward(weight, u, v, sigma)
        return quotient

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        weight, u, v, sigma = ctx.saved_tensors
        rows = _matrix(gradient)
        share = rows.flatten().dot(_matrix(weight).flatten())
        rows = torch.addr(rows, u * share, v, alpha=-1).div_(sigma)
        last = gradient.movedim(1, -1).shape
        return rows.view(last).movedim(-1, 1), None, None, None, None
