"""The manifest of a checkpoint: the SHA-256 of each of its files."""

import hashlib
import json
import os
from pathlib import Path

from prioritycut_ray.errors import UserError
from prioritycut_ray.storage.atomic import flush

MANIFEST = "manifest.json"


def seal(directory: Path) -> None:
    """Write the manifest of a checkpoint directory, its last file, and flush everything to disk."""
    files = sorted(path for path in directory.iterdir() if path.name != MANIFEST)
    manifest = {path.name: _sha256(path) for path in files}
    partial = directory / f".{MANIFEST}"
    partial.write_text(json.dumps(manifest, indent=1))
    for path in (*files, partial):
        flush(path)
    os.replace(partial, directory / MANIFEST)
    flush(directory)


def verify(directory: Path) -> None:
    """Compare every file of a checkpoint directory with its manifest.

    Raises:
        UserError: if a file is missing or damaged.
    """
    try:
        for name, expected in parse_manifest((directory / MANIFEST).read_bytes()).items():
            if _sha256(directory / name) != expected:
                raise UserError(f"{directory / name}: is damaged (checksum differs)")
    except (FileNotFoundError, NotADirectoryError, ValueError) as error:
        raise UserError(f"{directory}: is not a complete checkpoint ({error})") from error


def parse_manifest(content: bytes) -> dict[str, str]:
    """Return the checksums by file name.

    Raises:
        ValueError: if the manifest is damaged.
    """
    manifest = json.loads(content)
    if not isinstance(manifest, dict) or not manifest:
        raise ValueError(f"{MANIFEST} does not name any files")
    if not all(name == Path(name).name for name in manifest):
        raise ValueError(f"{MANIFEST} names files in other folders")
    return manifest


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
