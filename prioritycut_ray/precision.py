"""The precision of the networks: float32, or bfloat16 by autocast (docs/performance.md).

Weights, optimisers, coordinates, jacobians, softmaxes and losses are always float32.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch

Precision = Literal["auto", "float32", "bfloat16"]


def resolve_precision(wanted: Precision, device: torch.device) -> Precision:
    """Resolve ``auto`` on a device: bfloat16 if its hardware supports it, else float32."""
    if wanted != "auto":
        return wanted
    return "bfloat16" if has_bfloat16(device) else "float32"


def has_bfloat16(device: torch.device) -> bool:
    """Return whether a device multiplies in bfloat16: Ampere or newer; AMX or AVX512-BF16."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("amx_bf16") or capabilities.get("avx512_bf16"))


def autocast(precision: Precision, device: torch.device) -> torch.autocast:
    """Run convolutions and linear layers in the given precision."""
    enabled = resolve_precision(precision, device) == "bfloat16"
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=enabled)


@contextmanager
def float32_products(*, convolutions: Literal["ieee", "tf32"]) -> Iterator[None]:
    """Keep float32 matrix products exact in the body; choose the precision of convolutions.

    GPUs from Ampere on can round the factors of float32 products to TF32, which has 10 bits of
    mantissa: a coordinate in a 256x256 frame is then known to an eighth of a pixel. Coordinates,
    jacobians and splines are matrix products, which torch rounds if
    ``torch.set_float32_matmul_precision`` or the environment says so
    (TORCH_ALLOW_TF32_CUBLAS_OVERRIDE, which NVIDIA's containers set). Convolutions have their own
    switch.

    The settings apply to the whole process; the previous ones are restored at the end.

    Args:
        convolutions: ``tf32`` rounds their factors, which is torch's default and several times
            faster; ``ieee`` keeps them in float32, as on a CPU.
    """
    # Only these names: torch refuses to read the older ones while the two disagree.
    products, convolution = torch.backends.cuda.matmul, torch.backends.cudnn.conv  # type: ignore[attr-defined]
    before = products.fp32_precision, convolution.fp32_precision
    products.fp32_precision, convolution.fp32_precision = "ieee", convolutions
    try:
        yield
    finally:
        products.fp32_precision, convolution.fp32_precision = before
