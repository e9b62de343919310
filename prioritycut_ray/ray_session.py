"""Joining or starting Ray, the same way for every job."""

import os
from typing import Any

import ray

_OBJECT_STORE_BYTES = 200_000_000
"""Small: frames travel through the data loader's shared memory, not through Ray's store."""


def start_ray() -> None:
    """Join the cluster that ``RAY_ADDRESS`` names, or start one on this machine."""
    if ray.is_initialized():
        return
    options: dict[str, Any] = {}
    if "RAY_ADDRESS" not in os.environ:
        options = {"object_store_memory": _OBJECT_STORE_BYTES}
    # What workers have to say reaches the driver by our own queue; Ray's logs stay in its folder.
    ray.init(logging_level="ERROR", log_to_driver=False, **options)
