"""The folders of a path, local or a URL."""

import os
from collections.abc import Iterable
from itertools import takewhile

from prioritycut_ray.packing.entries import Entry
from prioritycut_ray.storage.paths import is_url


def folder_of(entry: Entry) -> str:
    """Return the folder of an entry's file."""
    return entry.source.rpartition("/")[0]


def path_parts(path: str) -> list[str]:
    """Split a path into its folders and its name."""
    return (path if is_url(path) else os.path.normpath(path)).split("/")


def common_parts(paths: Iterable[str]) -> list[str]:
    """Return the parts that all paths begin with."""
    columns = zip(*map(path_parts, paths), strict=False)
    return [column[0] for column in takewhile(lambda column: len({*column}) == 1, columns)]
