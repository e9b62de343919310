"""Accurate sums over the pixels of each channel, for the normalisation layers.

torch's CPU kernel for channels-last tensors adds up a channel's pixels one by one in float32: an
error of 1e-5 and more for each layer, which grows with batch and frame size. Here, float32 sums are
taken in blocks and added up in float64.

A group is what is normalised together: a batch, or one image of it. All groups of a call have the
same shape.
"""

from collections.abc import Iterable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

_ROWS, _COLUMNS = 1024, 1024
"""Size of the blocks in which float32 sums are taken; a block fits into a core's cache."""

Groups = Sequence[Float[Tensor, "B C H W"]]


def moments(groups: Groups) -> Float[Tensor, "G 2 C"]:
    """Return the means of x and of x² for each group and channel, in float64."""
    blocks = [block for x in groups for block in _blocks(x)]
    scratch = None
    if blocks[0].device.type == "cpu":
        # Without running statistics the CPU kernel would return the dtype of x.
        width, dtype = blocks[0].shape[1], torch.promote_types(blocks[0].dtype, torch.float32)
        scratch = blocks[0].new_zeros(width, dtype=dtype)
    pairs = (torch.batch_norm_update_stats(block, scratch, scratch, 0.0) for block in blocks)
    found = _stacked(len(groups), pairs)
    found[:, :, 1].addcmul_(found[:, :, 0], found[:, :, 0])  # E x² = variance + (E x)²
    in_group = found.shape[1]
    if in_group > 1:
        counts = found.new_tensor([pixels(block) for block in blocks[:in_group]])
        found *= (counts / counts.sum())[:, None, None]
    channels = groups[0].shape[1]
    return _added(found, channels) / (found.shape[3] // channels)


def gradient_sums(
    grads: Groups,
    groups: Groups,
    mean: Float[Tensor, "G C"],
    var: Float[Tensor, "G C"],
    invstd: Float[Tensor, "G C"],
    eps: float,
) -> Float[Tensor, "G 2 C"]:
    """Return Σ grad·x̂ and Σ grad for each channel, in float64; x̂ is the normalised x."""
    found = []
    for grad, x, *statistics in zip(grads, groups, mean, var, invstd, strict=True):
        blocks = _blocks(x)
        of_mean, of_var, of_invstd = (_repeated(value, blocks[0]) for value in statistics)
        # Evaluation mode gives the gradients of weight and bias for given statistics.
        for of_out, block in zip(_blocks(grad), blocks, strict=True):
            _, *pair = torch.ops.aten.native_batch_norm_backward(
                of_out, block, None, of_mean, of_var, of_mean, of_invstd, False, eps,
                [False, True, True],
            )  # fmt: skip
            found.append(pair)
    return _added(_stacked(len(groups), found), groups[0].shape[1])


def input_gradient(
    out: Float[Tensor, "B C H W"],
    grad: Float[Tensor, "B C H W"],
    x: Float[Tensor, "B C H W"],
    weight: Float[Tensor, " C"],
    mean: Float[Tensor, " C"],
    invstd: Float[Tensor, " C"],
    means: Float[Tensor, "2 C"],
) -> None:
    """Write weight/√(var + ε) · (grad − x̂·mean of grad·x̂ − mean of grad) to ``out``, by blocks."""
    of_normalised, of_grad = means.to(weight.dtype)
    slope = weight * invstd
    of_x = slope * invstd * of_normalised
    constant = torch.addcmul(of_x * mean, slope, of_grad, value=-1)
    targets, grads, inputs = (_blocks(tensor) for tensor in (out, grad, x))
    slope, of_x, constant = (
        _repeated(value, targets[0])[:, None, None] for value in (slope, of_x, constant)
    )
    for target, of_out, block in zip(targets, grads, inputs, strict=True):
        torch.addcmul(constant, block, of_x, value=-1, out=target).addcmul_(of_out, slope)


def pixels(x: Tensor) -> int:
    """Return the number of values in a channel."""
    return x.shape[0] * x.shape[2] * x.shape[3]


def _blocks(x: Float[Tensor, "B C H W"]) -> tuple[Tensor, ...]:
    """Return views of ``x`` that torch's kernels sum accurately; ``x`` itself if they do already.

    In channels-last layout a batch is a matrix of pixels × channels, and kernels add up its rows.
    Joining neighbouring pixels gives fewer and wider rows at no cost; these are split into blocks
    ``[rows, columns, 1, 1]``, in which the channels repeat along the columns.
    """
    if x.device.type != "cpu" or not x.is_contiguous(memory_format=torch.channels_last):
        return (x,)
    count, channels = pixels(x), x.shape[1]
    fold = count & -count  # the largest power of two in it
    while fold > 1 and fold * channels > _COLUMNS:
        fold //= 2
    rows: Tensor = x.permute(0, 2, 3, 1).reshape(-1, fold * channels, 1, 1)
    return tuple(rows.split(_ROWS))


def _repeated(value: Float[Tensor, " C"], block: Tensor) -> Float[Tensor, " columns"]:
    """Repeat one number per channel for every column of a block."""
    fold = block.shape[1] // len(value)
    return value if fold == 1 else value.repeat(fold)


def _stacked(groups: int, pairs: Iterable[Iterable[Tensor]]) -> Float[Tensor, "G blocks 2 columns"]:
    """Stack two numbers per column of each block of each group, in float64."""
    stacked: Tensor = torch.stack([value for pair in pairs for value in pair]).double()
    return stacked.unflatten(0, (groups, -1, 2))  # type: ignore[no-any-return]


def _added(sums: Float[Tensor, "G blocks 2 columns"], channels: int) -> Float[Tensor, "G 2 C"]:
    """Return sums over all pixels, given sums over the rows of each block."""
    if sums.shape[1] == 1 and sums.shape[3] == channels:
        return sums[:, 0]
    total: Tensor = sums.unflatten(3, (-1, channels)).sum(dim=(1, 3))
    return total
