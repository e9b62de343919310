"""Reading tensors from files that may come from anywhere."""

from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors.torch import load_file

from prioritycut_ray.errors import UserError


def read_tensors(path: Path) -> dict[str, Any]:
    """Read a ``.safetensors`` file, or a torch pickle without running any code in it.

    Returns:
        Names and tensors; a pickle may nest further dictionaries, lists and numbers.

    Raises:
        UserError: the file is missing, is damaged, or holds anything but tensors and plain data.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file with tensors")
    try:
        if path.suffix == ".safetensors":
            return dict(load_file(path))
        stored = torch.load(path, map_location="cpu", weights_only=True)
    except UnpicklingError as error:
        raise UserError(
            f"{path}: no file of tensors, or one that would run code when it is loaded; it is "
            "not loaded"
        ) from error
    except Exception as error:  # parsers raise errors of many kinds
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"{path}: not readable as tensors ({reason})") from error
    if not isinstance(stored, dict):
        raise UserError(f"{path}: holds a {type(stored).__name__}, not named tensors")
    return stored
