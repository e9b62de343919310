"""The number format of the networks: float32, or bfloat16 by autocast (docs/performance.md).

Weights, optimisers, coordinates, jacobians, softmaxes and losses are float32 in either.
"""

from typing import Literal

import torch

Precision = Literal["auto", "float32", "bfloat16"]


def resolve_precision(wanted: Precision, device: torch.device) -> Precision:
    """What ``auto`` means on a device: bfloat16 where its hardware multiplies in it."""
    if wanted != "auto":
        return wanted
    return "bfloat16" if has_bfloat16(device) else "float32"


def has_bfloat16(device: torch.device) -> bool:
    """Whether the device has instructions for bfloat16 products: Ampere; AMX or AVX512-BF16."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    if not hasattr(torch.cpu, "get_capabilities"):  # before torch 2.10
        return False
    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("amx_bf16") or capabilities.get("avx512_bf16"))


def autocast(precision: Precision, device: torch.device) -> torch.autocast:
    """Run convolutions and linear layers in the given format."""
    enabled = resolve_precision(precision, device) == "bfloat16"
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=enabled)
