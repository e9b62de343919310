"""Who a process is among those that train together."""

from typing import NamedTuple

import torch


class Worker(NamedTuple):
    """One of the processes that train together."""

    rank: int
    world_size: int
    device: torch.device
