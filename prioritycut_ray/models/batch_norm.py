"""Batch normalisation with accurate statistics on CPUs, optionally synchronised over processes.

Sums over pixels are those of :mod:`.channel_sums`. torch's SyncBatchNorm exists only for CUDA, and
makes the host wait for the device in every forward pass.
"""

from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from prioritycut_ray.models.channel_sums import gradient_sums, input_gradient, moments, pixels


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
        self._track(mean, var, processes * pixels(x))
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
        found = _averaged(moments([x])[0], processes)
        found[1].addcmul_(found[0], found[0], value=-1)
        mean, var = found.to(weight.dtype)
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
        statistics = mean[None], var[None], invstd[None]
        sums = gradient_sums([grad], [x], *statistics, ctx.eps)[0]
        of_x = None
        if ctx.needs_input_grad[0]:
            means = _averaged(sums / pixels(x), ctx.processes)
            of_x = torch.empty_like(x)
            input_gradient(of_x, grad, x, weight, mean, invstd, means)
        # Of this process only: they are averaged along with the gradients of other parameters.
        of_weight, of_bias = sums.to(weight.dtype)
        return of_x, of_weight, of_bias, None, None


def _averaged(means: Float[Tensor, "2 C"], processes: int) -> Float[Tensor, "2 C"]:
    """Average over all processes; the result is bitwise the same on each."""
    if processes > 1:
        means = means / processes
        dist.all_reduce(means)
    return means
