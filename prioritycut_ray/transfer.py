"""Copies from the host to the device that training runs on."""

import torch
from torch import Tensor


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor on a device; the host does not wait for the copy.

    To a GPU it goes by pinned memory: from other memory, CUDA copies while the host waits.
    """
    if device.type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)
