"""Copies from the host to the training device."""

import torch
from torch import Tensor


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a tensor to a device without making the host wait.

    To a GPU it goes through pinned memory: a copy from pageable memory blocks the host.
    """
    if device.type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)
