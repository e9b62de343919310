"""A folder whose files several processes share."""

import pytest

from prioritycut_ray.errors import UserError
from prioritycut_ray.storage.folder import Folder


def test_an_unknown_scheme_is_refused() -> None:
    with pytest.raises(UserError, match="nosuch://bucket/mine: cannot be reached"):
        Folder("nosuch://bucket/mine")
