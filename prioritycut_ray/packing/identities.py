"""Who is in each video, where no manifest says it."""

import re
from collections import defaultdict
from collections.abc import Sequence
from pathlib import PurePosixPath

from prioritycut_ray.errors import UserError
from prioritycut_ray.packing.entries import VIDEO_EXTENSIONS, Entry, printable
from prioritycut_ray.packing.folders import common_parts, path_parts
from prioritycut_ray.packing.manifest import SPLIT_NAMES


def name_identities(entries: Sequence[Entry], identity_from: str = "") -> list[Entry]:
    """Name each missing identity.

    Args:
        entries: the videos.
        identity_from: ``folder``: the first folder below the input and its ``train`` or ``test``.
            ``name``: the file name without extension. Another value is a regular expression that
            is searched in the path below the input, then in the whole path: its group, or the
            whole match. Empty: what precedes the first ``#`` of the file name, as in VoxCeleb's
            ``id10283#abc#00012#00100.mp4``; without ``#``, the path below the input, without
            extension, so that each file is an identity of its own.

    Raises:
        UserError: a folder or the regular expression does not give an identity.
    """
    missing = [entry for entry in entries if not entry.identity]
    if identity_from == "folder":
        given = [_folder(entry) for entry in missing]
    elif identity_from == "name":
        given = [_file_name(entry) for entry in missing]
    elif identity_from:
        given = _matches(missing, identity_from)
    else:
        given = [_before_hash(entry) for entry in missing]
    names = iter(given)
    return _after_files(
        [
            entry if entry.identity else entry._replace(identity=printable(next(names)))
            for entry in entries
        ]
    )


def _before_hash(entry: Entry) -> str:
    person, mark, _ = _file_name(entry).partition("#")
    return person.strip() if mark else ""


def _file_name(entry: Entry) -> str:
    path = PurePosixPath(path_parts(entry.path)[-1])
    # A folder of frames has no extension, except one that it took over from its video.
    is_folder = entry.pictures is not None and entry.pictures.strip_width is None
    return path.name if is_folder and path.suffix.lower() not in VIDEO_EXTENSIONS else path.stem


def _below_input(entry: Entry) -> list[str]:
    """Return the parts of the path below the input, or below the tar."""
    below = path_parts(entry.member or entry.name)
    return [*below[:-1], path_parts(entry.path)[-1]]


def _folder(entry: Entry) -> str:
    folders = _below_input(entry)[:-1] or path_parts(entry.path)[-2:-1]
    names = [name for name in folders if name.casefold() not in SPLIT_NAMES]
    if not names:
        raise UserError(
            f"{entry.shown}: --identity-from folder needs a folder for each identity, but this is "
            f"directly in {'/'.join(folders)}; use --identity-from name or a regular expression"
        )
    return names[0]


def _matches(entries: Sequence[Entry], pattern: str) -> list[str]:
    identity = re.compile(pattern)
    found = []
    for entry in entries:
        match = identity.search("/".join(_below_input(entry))) or identity.search(entry.path)
        found.append((match[identity.groups] or "") if match else "")
    if "" in found:
        raise UserError(
            f"--identity-from {pattern!r}: finds no identity in {found.count('')} of {len(found)} "
            f"paths, such as {entries[found.index('')].shown}; use folder, name, or a regular "
            "expression that matches each path"
        )
    return found


def _after_files(entries: Sequence[Entry]) -> list[Entry]:
    """Name each missing identity after its file.

    The name is the file's path below the input folder. If that is ambiguous, it is the path below
    the common folder of the files in question, with the extension.
    """
    taken = {entry.identity for entry in entries if entry.identity}
    files: dict[str, set[str]] = defaultdict(set)
    for entry in entries:
        if not entry.identity:
            files[entry.name].add(entry.path)

    def named(entry: Entry) -> Entry:
        alike = files[entry.name]
        identity = printable(entry.name)
        if len(alike) > 1 or identity in taken:
            parts = path_parts(entry.path)
            above = len(common_parts(path.rpartition("/")[0] for path in alike))
            above = min(above, len(parts) - len(path_parts(entry.name)))
            identity = printable("/".join(parts[above:]))
        return entry._replace(identity=identity, by_name=True)

    return [entry if entry.identity else named(entry) for entry in entries]
