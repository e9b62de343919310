"""Paths and URLs in files that no shell reads: ``~``, ``$VARIABLES``, absolute paths."""

import os
import re
from pathlib import Path

from prioritycut_ray.errors import UserError

_VARIABLE = re.compile(r"\$(?:([A-Za-z_]\w*)|\{([^}]*)\})")


def expanded(path: str, folder: str = "") -> str:
    """Expand ``~``, ``~user``, ``$NAME`` and ``${NAME}`` in a path, as a shell does.

    Unset variables and unknown users are left as they are. So is the path of an existing file,
    which may be called ``a$b``.

    Args:
        path: a local path, or a URL.
        folder: folder that a relative path starts from; the current one by default.
    """
    if "$" not in path and not path.startswith("~"):
        return path
    means_home = path == "~" or path.startswith("~/")
    if not means_home and not is_url(path) and os.path.lexists(Path(folder, path)):
        return path
    return os.path.expandvars(os.path.expanduser(path))


def resolved(path: str) -> str:
    """Expand a path that is about to be used, and make it absolute; a URL stays a URL.

    Raises:
        UserError: if a variable is not set, or a user does not exist.
    """
    place = expanded(path)
    if not is_url(place) and os.path.lexists(place):
        return os.path.abspath(place)
    if place.startswith("~"):
        raise UserError(
            f"{path}: the user {place.split('/')[0]} has no home folder; write the path out"
        )
    for match in _VARIABLE.finditer(place):
        name = match[1] or match[2]
        if name not in os.environ:
            raise UserError(
                f"{path}: the environment variable {name} is not set; set it, or write the path out"
            )
    return absolute(place)


def absolute(path: str) -> str:
    """Make a local path absolute; a URL stays as it is."""
    return path if is_url(path) else os.path.abspath(path)


def is_url(path: str) -> bool:
    """Return whether a path is an fsspec URL."""
    return "://" in path
