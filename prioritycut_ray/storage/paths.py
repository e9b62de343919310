"""``~`` and ``$VARIABLES`` in paths of files that no shell reads: configurations and manifests."""

import os
import re
from pathlib import Path

from prioritycut_ray.errors import UserError

_VARIABLE = re.compile(r"\$(?:([A-Za-z_]\w*)|\{([^}]*)\})")


def expanded(path: str, folder: str = "") -> str:
    """A path as a shell would expand it: ``~``, ``~user``, ``$NAME`` and ``${NAME}``.

    What a shell would not find, an unset variable or an unknown user, stays as it is. So does the
    name of something that exists: a file may be called ``a$b``.

    Args:
        path: local, or a URL.
        folder: that a relative path starts from; the current one unless given.
    """
    if "$" not in path and not path.startswith("~"):
        return path
    means_home = path == "~" or path.startswith("~/")
    if not means_home and "://" not in path and os.path.lexists(Path(folder, path)):
        return path
    return os.path.expandvars(os.path.expanduser(path))


def resolved(path: str) -> str:
    """An absolute path, or a URL, as :func:`expanded`; for one that is about to be used.

    Raises:
        UserError: a variable is not set, or there is no such user.
    """
    place = expanded(path)
    is_url = "://" in place
    if not is_url and os.path.lexists(place):
        return os.path.abspath(place)
    if place.startswith("~"):
        raise UserError(f"{path}: there is no home folder of {place.split('/')[0]}; write it out")
    for match in _VARIABLE.finditer(place):
        name = match[1] or match[2]
        if name not in os.environ:
            raise UserError(
                f"{path}: the environment variable {name} is not set; set it, or write the path out"
            )
    return place if is_url else os.path.abspath(place)


def absolute(given: str) -> str:
    """Name an input in a way that does not depend on the current folder."""
    return given if is_url(given) else os.path.abspath(given)


def is_url(given: str) -> bool:
    """Tell an fsspec URL from a local path."""
    return "://" in given
