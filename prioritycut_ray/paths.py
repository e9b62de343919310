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
    """As :func:`expanded`, for a path that is about to be used.

    Raises:
        UserError: a variable is not set, or there is no such user.
    """
    place = expanded(path)
    if "://" not in place and os.path.lexists(place):
        return place
    if place.startswith("~"):
        raise UserError(f"{path}: there is no home folder of {place.split('/')[0]}; write it out")
    for match in _VARIABLE.finditer(place):
        name = match[1] or match[2]
        if name not in os.environ:
            raise UserError(
                f"{path}: the environment variable {name} is not set; set it, or write the path out"
            )
    return place
