"""Instance normalisation in channels-last layout on CPUs.

torch computes instance norms on contiguous planes: it converts a channels-last input, and the
convolutions after it get planes too.
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from prioritycut_ray.models.blocks import channels_last
from prioritycut_ray.models.channel_sums import gradient_sums, input_gradient, moments, pixels


class InstanceNorm2d(nn.InstanceNorm2d):
    """``torch.nn.InstanceNorm2d`` with a learned scale and shift, and the same parameter names.

    On CPUs, its output has the layout of its input, and sums are accurate
    (:mod:`~prioritycut_ray.models.channel_sums`). On GPUs it is torch's own, between copies that
    keep the networks channels last.
    """

    def __init__(self, features: int) -> None:
        super().__init__(features, affine=True)

    def forward(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B C H W"]:
        if x.device.type != "cpu" or torch.compiler.is_compiling():
            return channels_last(contiguous_gradient(super().forward(channels_last(x))))
        out: Tensor = _Normalise.apply(x, self.weight, self.bias, self.eps)
        return out


def contiguous_gradient(x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B C H W"]:
    """Return the result of torch's instance norm, and make its gradient contiguous, as it is.

    torch computes wrong gradients for one image whose gradient is channels last. Compiled code
    chooses layouts itself.
    """
    if x.requires_grad and not torch.compiler.is_compiling():
        x.register_hook(lambda gradient: None if gradient is None else gradient.contiguous())
    return x


class _Normalise(torch.autograd.Function):
    """(x − mean) / √(var + ε) · weight + bias, with the statistics of each image."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        images = x.split(1)
        found = moments(images)
        found[:, 1].addcmul_(found[:, 0], found[:, 0], value=-1)
        mean, var = found.to(weight.dtype).unbind(1)
        out = torch.empty_like(x)
        unused = x.new_empty(0, dtype=weight.dtype), x.new_empty(0, dtype=weight.dtype)
        for image, target, of_mean, of_var in zip(images, out.split(1), mean, var, strict=True):
            torch.native_batch_norm(
                image, weight, bias, of_mean, of_var, False, 0.0, eps, out=(target, *unused)
            )
        ctx.save_for_backward(x, weight, mean, var)
        ctx.eps = eps
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, var = ctx.saved_tensors
        if grad.stride() != x.stride():  # torch's kernels would fall back to loops
            grad = torch.empty_like(x).copy_(grad)
        invstd = (var + ctx.eps).rsqrt()
        grads, images = grad.split(1), x.split(1)
        if x.dtype.itemsize < 4:
            # torch's fused kernel is faster, and its error is far below the rounding of x.
            gradients = [
                torch.ops.aten.native_batch_norm_backward(
                    of_out, image, weight, None, None, *statistics, True, ctx.eps, [True] * 3
                )
                for of_out, image, *statistics in zip(grads, images, mean, invstd, strict=True)
            ]
            of_x, of_weight, of_bias = zip(*gradients, strict=True)
            return torch.cat(of_x), torch.stack(of_weight).sum(0), torch.stack(of_bias).sum(0), None
        sums = gradient_sums(grads, images, mean, var, invstd, ctx.eps)
        out = torch.empty_like(x)
        means = sums / pixels(images[0])
        for target, of_out, image, *statistics in zip(
            out.split(1), grads, images, mean, invstd, means, strict=True
        ):
            input_gradient(target, of_out, image, weight, *statistics)
        of_weight, of_bias = sums.sum(0).to(weight.dtype)
        return out, of_weight, of_bias, None
