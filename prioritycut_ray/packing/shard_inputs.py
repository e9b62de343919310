"""Which shards an index is made of: files, folders, globs and braces, local or on fsspec."""

import glob
import itertools
import posixpath
from collections.abc import Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any

from prioritycut_ray.errors import UserError
from prioritycut_ray.packing.entries import Entry, printable
from prioritycut_ray.packing.files import is_shown, remote_entry
from prioritycut_ray.packing.inputs import expand_braces
from prioritycut_ray.storage.filesystem import FileSystem, filesystem
from prioritycut_ray.storage.paths import absolute, is_url

# Compressed ones too: they cannot be used, and that is reported.
_SUFFIXES = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst")


def find_shards(inputs: Sequence[str]) -> list[Entry]:
    """List the tars that the inputs name, each once; none is opened.

    Args:
        inputs: tars, folders (searched recursively; hidden files are ignored) and globs, each a
            local path or an fsspec URL. Braces are expanded: ``shard-{000000..000999}.tar``.

    Raises:
        UserError: an input does not exist, or contains no tar.
    """
    given = itertools.chain.from_iterable(map(expand_braces, inputs))
    shards = {shard.source: shard for one in given for shard in _shards_of(absolute(one))}
    if not shards:
        raise UserError("there are no shards to index: name tars, folders or globs")
    return [*shards.values()]


def _shards_of(given: str) -> list[Entry]:
    fs, path = filesystem(given)
    try:
        info = fs.info(path)
    except FileNotFoundError:
        info = {"type": "pattern"}
    if info["type"] == "file":
        return [_entry(fs, given, path, path.rpartition("/")[0], info)]
    if info["type"] == "directory":
        root, infos = path, fs.find(path, detail=True)
    elif glob.has_magic(path):
        root, infos = _plain_folder(path), fs.glob(path, detail=True)
    else:
        raise UserError(f"{printable(given)}: does not exist; name a tar, folder or glob")
    shards = _tars(fs, given, root, infos)
    if not shards:
        raise UserError(f"{printable(given)}: no tars found; their names end in .tar")
    return shards


def _plain_folder(pattern: str) -> str:
    parts = itertools.takewhile(lambda part: not glob.has_magic(part), pattern.split("/"))
    return "/".join(parts)


def _tars(
    fs: FileSystem, given: str, root: str, infos: Mapping[str, Mapping[str, Any]]
) -> list[Entry]:
    return [
        _entry(fs, given, path, root, info)
        for path, info in sorted(infos.items())
        if info["type"] == "file"
        and path.lower().endswith(_SUFFIXES)
        and all(map(is_shown, posixpath.relpath(path, root or "/").split("/")))
    ]


def _entry(fs: FileSystem, given: str, path: str, root: str, info: Mapping[str, Any]) -> Entry:
    source = fs.unstrip_protocol(path) if is_url(given) else path
    name = posixpath.relpath(path, root or "/")
    return remote_entry(source, str(PurePosixPath(name).with_suffix("")), info)
