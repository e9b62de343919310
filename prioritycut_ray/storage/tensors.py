"""Reading tensors from files that may come from anywhere."""

import codecs
from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import numpy as np
import torch
from numpy._core.multiarray import scalar
from safetensors.torch import load_file
from torch import Tensor

from prioritycut_ray.errors import UserError

_NUMPY_SCALARS: list[Any] = [
    # A learning rate or an epoch may be one; by the names of numpy 2 and of numpy 1.
    *((scalar, f"numpy.{core}.multiarray.scalar") for core in ("_core", "core")),
    np.dtype,
    *{type(np.dtype(code)) for code in np.typecodes["All"] if code not in "OVMm"},
    (codecs.encode, "_codecs.encode"),
]
"""What a pickle needs for numbers of numpy, beside tensors: it cannot run code either."""


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
        with torch.serialization.safe_globals(_NUMPY_SCALARS):
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


def read_weights(path: Path) -> dict[str, Any]:
    """As :func:`read_tensors`, for the weights of a network.

    Raises:
        UserError: as there, or a weight is NaN or infinite.
    """
    weights = read_tensors(path)
    if wrong := not_finite(weights):
        raise UserError(
            f"{path}: these weights are NaN or infinite: {wrong}; they cannot be used, take those "
            "of an earlier checkpoint or of another file"
        )
    return weights


def not_finite(weights: Mapping[str, Any]) -> str:
    """Names of the tensors that hold NaN or infinite values, the first few; empty if none does."""
    names = [
        name
        for name, tensor in weights.items()
        if isinstance(tensor, Tensor)
        and tensor.is_floating_point()
        and not tensor.is_meta
        and not tensor.float().isfinite().all()
    ]
    more = len(names) - _NAMED
    return ", ".join(names[:_NAMED]) + (f" and {more} more" if more > 0 else "")


_NAMED = 3
