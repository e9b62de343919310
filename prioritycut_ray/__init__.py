"""PriorityCut: image animation trained with occlusion-aware mixing, distributed on Ray.

The public names are documented in docs/api.md.
"""

import importlib
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


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used: torch and ray take seconds to import."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_MODULES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
