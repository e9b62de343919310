"""Compile networks block by block (``train.compile``, docs/performance.md).

Only blocks, because what connects them must stay as it is: spectral norms of all layers together,
coordinates in float32, hooks that keep gradients channels last. Blocks of equal shape share their
compiled code.
"""

import os
import shutil
from collections.abc import Callable
from typing import Any

import torch
from timm.models.resnet import BasicBlock
from torch import Tensor, nn

from prioritycut_ray.errors import UserError
from prioritycut_ray.models.batch_norm import BatchNorm2d
from prioritycut_ray.models.blocks import ResBlock, SameBlock
from prioritycut_ray.models.discriminators import PatchBlock, ResidualDownBlock, ResidualUpBlock
from prioritycut_ray.models.perceptual import PerceptualFeatures

BLOCKS = (
    *(SameBlock, ResBlock, BasicBlock, PatchBlock, ResidualDownBlock, ResidualUpBlock),
    PerceptualFeatures,
)
_VARIANTS = 64
"""Maximum number of compiled variants of a block: shapes, with or without gradients, frozen."""


class _CollectiveBatchNorm2d(BatchNorm2d):
    """Never compiled, so that every rank runs collective operations in the order of the layers."""

    forward = torch.compiler.disable(BatchNorm2d.forward)


def compile_networks(*networks: nn.Module, backend: str = "inductor") -> None:
    """Compile the blocks of networks in place, each shape when it is first used.

    The code of a block works for any batch size: the discriminator gets two images per sample, and
    three if the step mixes.

    Args:
        networks: they keep their parameters, buffers and names; copies of them are not compiled.
        backend: backend of ``torch.compile``.

    Raises:
        UserError: this machine lacks a C++ compiler, which generated code needs.
    """
    if backend == "inductor" and not _has_compiler():
        raise UserError(
            "train.compile=true needs a C++ compiler on every node that trains: install g++, or "
            "set train.compile=false"
        )
    config = torch._dynamo.config
    config.recompile_limit = max(config.recompile_limit, _VARIANTS)
    for network in networks:
        for module in network.modules():
            if isinstance(module, BLOCKS):
                # The attribute that nn.Module.compile sets; copies of a module lack it.
                compiled = torch.compile(module.forward, backend=backend, dynamic=False)
                module._compiled_call_impl = _for_any_batch(compiled)
            elif isinstance(module, BatchNorm2d) and module.synchronised:
                module.__class__ = _CollectiveBatchNorm2d


def _for_any_batch(forward: Callable[[Tensor], Any]) -> Callable[[Tensor], Any]:
    def call(x: Tensor) -> Any:
        torch._dynamo.maybe_mark_dynamic(x, 0)
        return forward(x)

    return call


def _has_compiler() -> bool:
    names = ("g++", "clang++", os.environ.get("CXX", ""))
    return any(shutil.which(name) for name in names if name)
