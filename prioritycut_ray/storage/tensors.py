"""Read tensors from files of any origin, without running code in them."""

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

from prioritycut_ray.errors import UserError, describe

_NUMPY_SCALARS: list[Any] = [
    # A learning rate or an epoch may be one; the names are those of numpy 2 and of numpy 1.
    *((scalar, f"numpy.{core}.multiarray.scalar") for core in ("_core", "core")),
    np.dtype,
    *{type(np.dtype(code)) for code in np.typecodes["All"] if code not in "OVMm"},
    (codecs.encode, "_codecs.encode"),
]
"""What a pickle needs for numpy numbers besides tensors; none of it can run code."""


def read_tensors(path: Path) -> dict[str, Any]:
    """Read a ``.safetensors`` file, or a torch pickle without running any code in it.

    Returns:
        Names and tensors; a pickle may nest further dictionaries, lists and numbers.

    Raises:
        UserError: if the file is missing, damaged, or contains anything but tensors and plain data.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    try:
        if path.suffix == ".safetensors":
            return dict(load_file(path))
        with torch.serialization.safe_globals(_NUMPY_SCALARS):
            stored = torch.load(path, map_location="cpu", weights_only=True)
    except UnpicklingError as error:
        raise UserError(
            f"{path}: is not a file of tensors, or would run code when it is loaded; it was not "
            "loaded"
        ) from error
    except Exception as error:  # parsers raise errors of many kinds
        raise UserError(f"{path}: cannot be read as tensors ({describe(error)})") from error
    if not isinstance(stored, dict):
        raise UserError(f"{path}: contains a {type(stored).__name__}, not named tensors")
    return stored


def read_weights(path: Path) -> dict[str, Any]:
    """Read the weights of a network, as :func:`read_tensors`.

    Raises:
        UserError: as there, or if a weight is NaN or infinite.
    """
    weights = read_tensors(path)
    if wrong := not_finite(weights):
        raise UserError(
            f"{path}: these weights are NaN or infinite: {wrong}; use an earlier checkpoint or "
            "another file"
        )
    return weights


def not_finite(weights: Mapping[str, Any]) -> str:
    """Name the first few tensors with NaN or infinite values; empty if there are none."""
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
