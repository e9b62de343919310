"""Batch normalisation with accurate statistics on CPUs, optionally synchronised over processes.

torch's CPU kernel for channels-last tensors adds up a channel's pixels one by one in float32: an
error of 1e-5 and more for each layer, which grows with batch and frame size. torch's SyncBatchNorm
exists only for CUDA, and makes the host wait for the device in every forward pass.
"""

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

_ROWS, _COLUMNS = 1024, 1024
"""Size of the blocks in which float32 sums are taken; a block fits into a core's cache."""


class BatchNorm2d(nn.BatchNorm2d):
    """``torch.nn.BatchNorm2d``, with the same parameters and buffers under the same names.

    On CPUs, float32 sums are taken in blocks and added up in float64. On GPUs the layer is torch's
    own unless it is synchronised.

    Attributes:
        synchronised: take statistics over the batches of all processes of the default group, which
            must have equal sizes. Every forward and backward pass in training mode is then a
            collective operation: all processes must run the same layers in the same order.
    """

    synchronised = False

    def forward(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B C H W"]:
        # Compiled code sums accurately by itself.
        on_cpu = x.device.type == "cpu" and not torch.compiler.is_compiling()
        if not self.training or not (self.synchronised or on_cpu):
            return super().forward(x)
        processes = dist.get_world_size() if self.synchronised else 1
        out, mean, var = _Normalise.apply(x, self.weight, self.bias, self.eps, processes)
        self._track(mean, var, processes * _pixels(x))
        return out  # type: ignore[no-any-return]

    @torch.no_grad()
    def _track(self, mean: Float[Tensor, " C"], var: Float[Tensor, " C"], count: int) -> None:
        """Move the running statistics towards those of a batch with ``count`` pixels."""
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        assert self.momentum is not None
        self.num_batches_tracked.add_(1)
        self.running_mean.lerp_(mean, self.momentum)
        self.running_var.lerp_(var * (count / max(count - 1, 1)), self.momentum)


def synchronise(network: nn.Module) -> None:
    """Synchronise the batch statistics of a network over all processes of the default group."""
    for layer in network.modules():
        if isinstance(layer, BatchNorm2d):
            layer.synchronised = True


class _Normalise(torch.autograd.Function):
    """(x − mean) / √(var + ε) · weight + bias, with statistics over the batches of all processes.

    Returns the result, the mean, and the biased variance; gradients flow only through the result.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float, processes: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        moments = _averaged(_moments(x), processes)
        moments[1].addcmul_(moments[0], moments[0], value=-1)
        mean, var = moments.to(weight.dtype)
        out, _, _ = torch.native_batch_norm(x, weight, bias, mean, var, False, 0.0, eps)
        ctx.save_for_backward(x, weight, mean, var)
        ctx.eps, ctx.processes = eps, processes
        ctx.mark_non_differentiable(mean, var)
        return out, mean, var

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, var = ctx.saved_tensors
        if grad.stride() != x.stride():  # torch's kernels would fall back to loops
            grad = torch.empty_like(x).copy_(grad)
        invstd = (var + ctx.eps).rsqrt()
        if x.dtype.itemsize < 4 and ctx.processes == 1:
            # torch's fused kernel is faster, and its error is far below the rounding of x.
            gradients = torch.ops.aten.native_batch_norm_backward(
                grad, x, weight, None, None, mean, invstd, True, ctx.eps, [True, True, True]
            )
            return (*gradients, None, None)
        sums = _gradient_sums(grad, x, mean, var, invstd, ctx.eps)
        of_x = None
        if ctx.needs_input_grad[0]:
            means = _averaged(sums / _pixels(x), ctx.processes)
            of_x = _input_gradient(grad, x, weight, mean, invstd, means)
        # Of this process only: they are averaged along with the gradients of other parameters.
        of_weight, of_bias = sums.to(weight.dtype)
        return of_x, of_weight, of_bias, None, None


def _averaged(means: Float[Tensor, "2 C"], processes: int) -> Float[Tensor, "2 C"]:
    """Average over all processes; the result is bitwise the same on each."""
    if processes > 1:
        means = means / processes
        dist.all_reduce(means)
    return means


def _moments(x: Float[Tensor, "B C H W"]) -> Float[Tensor, "2 C"]:
    """Return the means of x and of x² for each channel, in float64."""
    blocks = _blocks(x)
    scratch = None
    if x.device.type == "cpu":
        # Without running statistics the CPU kernel would return the dtype of x.
        width, dtype = blocks[0].shape[1], torch.promote_types(x.dtype, torch.float32)
        scratch = x.new_zeros(width, dtype=dtype)
    moments = _stacked(
        torch.batch_norm_update_stats(block, scratch, scratch, 0.0) for block in blocks
    )
    moments[:, 1].addcmul_(moments[:, 0], moments[:, 0])  # E x² = variance + (E x)²
    if len(blocks) > 1:
        counts = moments.new_tensor([_pixels(block) for block in blocks])
        moments *= (counts / counts.sum())[:, None, None]
    channels = x.shape[1]
    return _added(moments, channels) / (moments.shape[2] // channels)


def _gradient_sums(
    grad: Float[Tensor, "B C H W"],
    x: Float[Tensor, "B C H W"],
    mean: Float[Tensor, " C"],
    var: Float[Tensor, " C"],
    invstd: Float[Tensor, " C"],
    eps: float,
) -> Float[Tensor, "2 C"]:
    """Return Σ grad·x̂ and Σ grad for each channel, in float64; x̂ is the normalised x."""
    blocks = _blocks(x)
    mean, var, invstd = (_repeated(value, blocks[0]) for value in (mean, var, invstd))
    # Evaluation mode gives the gradients of weight and bias for given statistics.
    gradients = [
        torch.ops.aten.native_batch_norm_backward(
            of_out, block, None, mean, var, mean, invstd, False, eps, [False, True, True]
        )
        for of_out, block in zip(_blocks(grad), blocks, strict=True)
    ]
    return _added(_stacked([pair for _, *pair in gradients]), x.shape[1])


def _input_gradient(
    grad: Float[Tensor, "B C H W"],
    x: Float[Tensor, "B C H W"],
    weight: Float[Tensor, " C"],
    mean: Float[Tensor, " C"],
    invstd: Float[Tensor, " C"],
    means: Float[Tensor, "2 C"],
) -> Float[Tensor, "B C H W"]:
    """Return weight/√(var + ε) · (grad − x̂·mean of grad·x̂ − mean of grad), block by block."""
    of_normalised, of_grad = means.to(weight.dtype)
    slope = weight * invstd
    of_x = slope * invstd * of_normalised
    constant = torch.addcmul(of_x * mean, slope, of_grad, value=-1)
    out = torch.empty_like(x)
    targets, grads, inputs = (_blocks(tensor) for tensor in (out, grad, x))
    slope, of_x, constant = (
        _repeated(value, targets[0])[:, None, None] for value in (slope, of_x, constant)
    )
    for target, of_out, block in zip(targets, grads, inputs, strict=True):
        torch.addcmul(constant, block, of_x, value=-1, out=target).addcmul_(of_out, slope)
    return out


def _blocks(x: Float[Tensor, "B C H W"]) -> tuple[Tensor, ...]:
    """Return views of ``x`` that torch's kernels sum accurately; ``x`` itself if they do already.

    In channels-last layout a batch is a matrix of pixels × channels, and kernels add up its rows.
    Joining neighbouring pixels gives fewer and wider rows at no cost; these are split into blocks
    ``[rows, columns, 1, 1]``, in which the channels repeat along the columns.
    """
    if x.device.type != "cpu" or not x.is_contiguous(memory_format=torch.channels_last):
        return (x,)
    pixels, channels = _pixels(x), x.shape[1]
    fold = pixels & -pixels  # the largest power of two in it
    while fold > 1 and fold * channels > _COLUMNS:
        fold //= 2
    rows: Tensor = x.permute(0, 2, 3, 1).reshape(-1, fold * channels, 1, 1)
    return tuple(rows.split(_ROWS))


def _repeated(value: Float[Tensor, " C"], block: Tensor) -> Float[Tensor, " columns"]:
    """Repeat one number per channel for every column of a block."""
    fold = block.shape[1] // len(value)
    return value if fold == 1 else value.repeat(fold)


def _stacked(pairs: Iterable[Iterable[Tensor]]) -> Float[Tensor, "blocks 2 columns"]:
    """Stack two numbers per column of each block, in float64."""
    stacked: Tensor = torch.stack([value for pair in pairs for value in pair]).double()
    return stacked.unflatten(0, (-1, 2))  # type: ignore[no-any-return]


def _added(sums: Float[Tensor, "blocks 2 columns"], channels: int) -> Float[Tensor, "2 C"]:
    """Return sums over all pixels, given sums over the rows of each block."""
    if sums.shape[0] == 1 and sums.shape[2] == channels:
        return sums[0]
    total: Tensor = sums.unflatten(2, (-1, channels)).sum(dim=(0, 2))
    return total


def _pixels(x: Tensor) -> int:
    """Return the number of values in a channel."""
    return x.shape[0] * x.shape[2] * x.shape[3]
