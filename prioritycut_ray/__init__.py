"""PriorityCut: image animation trained with occlusion-aware mixing, distributed on Ray.

The public names are documented in docs/api.md.
"""

import importlib
import os
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from prioritycut_ray.config import load_config
    from prioritycut_ray.inference.pretrained import Animator
    from prioritycut_ray.launch.evaluate import evaluate
    from prioritycut_ray.launch.train import train

__all__ = ["Animator", "evaluate", "load_config", "train"]

_MODULES = {
    "Animator": "prioritycut_ray.inference.pretrained",
    "evaluate": "prioritycut_ray.launch.evaluate",
    "load_config": "prioritycut_ray.config",
    "train": "prioritycut_ray.launch.train",
}

# Ray reads these when it is first imported; set later, they would contradict what it has read.
if "ray" not in sys.modules:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_TRAIN_ENABLE_PRINT_PATCH", "0")  # or every line is printed twice
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
    # Our monitor tells workers of a draining node; Ray's watcher would wait and then count twice.
    os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
    # A node that has just died counts as ready for a while: ask for other places soon.
    os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "30")


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used: torch and ray take seconds to import."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_MODULES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
