"""The speed of large operations on a device: the ceiling for the other benchmarks' figures."""

import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from prioritycut_ray.inference.animate import default_device
from prioritycut_ray.precision import float32_products

DEVICE = default_device()
ON_GPU = DEVICE.type == "cuda"
FORMATS = (
    ("bfloat16", torch.bfloat16, "ieee"),
    ("TF32", torch.float32, "tf32"),
    ("float32", torch.float32, "ieee"),
)


def gemm_rate(side: int, dtype: torch.dtype, products: str) -> float:
    """FLOP/s of a square matrix product."""
    a, b = (torch.randn(side, side, device=DEVICE).to(dtype) for _ in range(2))
    with float32_products(convolutions="tf32"):
        torch.backends.cuda.matmul.fp32_precision = products
        return rate(lambda: a @ b, 2 * side**3)


def conv_rates(batch: int, channels: int, side: int, dtype: torch.dtype) -> tuple[float, float]:
    """FLOP/s of a 3x3 channels-last convolution, forward and backward; float32 means TF32."""

    def random(*shape: int) -> Tensor:
        values = torch.randn(shape, device=DEVICE)
        return values.to(dtype, memory_format=torch.channels_last).requires_grad_()

    images, kernel = random(batch, channels, side, side), random(channels, channels, 3, 3)
    work = 2 * 9 * channels**2 * side**2 * batch
    with float32_products(convolutions="tf32"):
        forward = rate(lambda: F.conv2d(images, kernel, padding=1), work)
        output = F.conv2d(images, kernel, padding=1)
        gradient = torch.randn_like(output)
        backward = rate(
            lambda: torch.autograd.grad(output, (images, kernel), gradient, retain_graph=True),
            2 * work,
        )
    return forward, backward


def transfer_rates(size: int) -> dict[str, float]:
    """Bytes per second from the host to the device, by kind of host memory."""
    pageable = torch.empty(size, dtype=torch.uint8)
    sources = {"pageable": pageable} | ({"pinned": pageable.pin_memory()} if ON_GPU else {})
    return {
        name: rate(lambda source=source: source.to(DEVICE, non_blocking=True, copy=True), size)
        for name, source in sources.items()
    }


def rate(call: Callable[[], object], work: float, repeats: int = 8, inner: int = 4) -> float:
    """The best work per second over several repeats."""
    for _ in range(2):
        call()
    fastest = float("inf")
    for _ in range(repeats):
        before = now()
        for _ in range(inner):
            call()
        fastest = min(fastest, now() - before)
    return work * inner / fastest


def now() -> float:
    """CPU seconds of this process; on a GPU, clock seconds after it has finished its work."""
    if ON_GPU:
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()
