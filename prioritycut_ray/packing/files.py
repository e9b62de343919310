"""Files of the inputs, local or on fsspec, and what identifies a version of each."""

import os
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from prioritycut_ray.errors import UserError, reason_of
from prioritycut_ray.packing.entries import Entry, Rejected, printable
from prioritycut_ray.storage.filesystem import filesystem
from prioritycut_ray.storage.paths import is_url

IS_FOLDER = "is a folder"
# What file systems call the version of a file, the most reliable first.
_VERSION_KEYS = ("ETag", "etag", "mtime", "LastModified", "last_modified", "updated", "created")


def is_shown(name: str) -> bool:
    """Return whether a file or folder of this name is not hidden."""
    return not name.startswith(".")


def walk(root: Path) -> Iterator[Path | Rejected]:
    """List everything below a folder. Links to folders are not followed: they may form cycles."""
    unreadable: list[OSError] = []
    for folder, folders, files in os.walk(root, onerror=unreadable.append):
        folders[:] = [name for name in folders if is_shown(name)]
        yield from (Path(folder, name) for name in files)
    for error in unreadable:
        yield Rejected(printable(str(error.filename)), f"cannot be listed ({error.strerror})")


def local_or_not(source: str, name: str) -> Entry | Rejected:
    """Make an entry of a local file, or say why it cannot be one."""
    try:
        state = os.stat(source)
    except (OSError, ValueError) as error:
        if os.path.islink(source):
            return Rejected(printable(source), "is a broken link")
        return Rejected(printable(source), reason_of(error))
    if not stat.S_ISREG(state.st_mode):
        is_folder = stat.S_ISDIR(state.st_mode)
        return Rejected(printable(source), IS_FOLDER if is_folder else "is not a regular file")
    return Entry(
        source=source,
        name=name,
        size=state.st_size,
        version=str(state.st_mtime_ns),
    )


def remote_entry(url: str, name: str, info: Mapping[str, Any]) -> Entry:
    """Make an entry of a file on fsspec."""
    return Entry(source=url, name=name, size=int(info.get("size") or 0), version=version_of(info))


def version_of(info: Mapping[str, Any]) -> str:
    """Return what changes when a file on fsspec does; empty if the file system does not say."""
    return next((str(info[key]) for key in _VERSION_KEYS if info.get(key)), "")


def any_entry(source: str, name: str) -> Entry | Rejected:
    """Make an entry of a file, local or on fsspec, or say why it cannot be one."""
    if not is_url(source):
        return local_or_not(source, name)
    try:
        fs, path = filesystem(source)
        info = fs.info(path)
    except FileNotFoundError:
        return Rejected(printable(source), "No such file or directory")
    except (UserError, OSError) as error:
        return Rejected(printable(source), f"cannot be read ({printable(reason_of(error))})")
    if info["type"] == "directory":
        return Rejected(printable(source), IS_FOLDER)
    return remote_entry(source, name, info)


def stems_below(folder: str, extensions: frozenset[str]) -> dict[str, list[str]]:
    """List the files below a folder by their names without extension; hidden ones are ignored.

    Args:
        folder: a local path or an fsspec URL.
        extensions: of the files to list, in lower case.

    Returns:
        The paths or URLs of each name, and of each path below the folder without extension; those
        with the fewest folders first.
    """
    if is_url(folder):
        fs, root = filesystem(folder)
        found = [
            (path.removeprefix(root).lstrip("/"), fs.unstrip_protocol(path))
            for path in fs.find(root)
        ]
    else:
        paths = (item for item in walk(Path(folder)) if isinstance(item, Path))
        found = [(str(path.relative_to(folder)), str(path)) for path in paths]
    stems: dict[str, list[str]] = {}
    for relative, source in sorted(found, key=lambda pair: (pair[0].count("/"), pair[0])):
        path = PurePosixPath(relative)
        if path.suffix.lower() in extensions and all(map(is_shown, path.parts)):
            for name in {path.stem, str(path.with_suffix(""))}:
                stems.setdefault(name, []).append(source)
    return stems
