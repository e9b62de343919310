"""The members of a tar, by their byte ranges; whatever is unusable or lost is named."""

import json
import tarfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import PurePosixPath
from typing import Any

from prioritycut_ray.data.shards import unread_rest
from prioritycut_ray.errors import UserError, reason_of
from prioritycut_ray.packing.entries import Entry, Rejected, opened, printable

LONGEST_JSON = 1 << 20
COMPRESSED = {
    b"\x1f\x8b": ("gzip", "gunzip"),
    b"BZh": ("bzip2", "bunzip2"),
    b"\xfd7zXZ": ("xz", "unxz"),
    b"\x28\xb5\x2f\xfd": ("zstd", "unzstd"),
}
"""The first bytes of compressed files: the format, and the program that unpacks it."""
_NAMES_SHOWN = 5
_CHUNK = 1 << 20


class NoTar(Exception):
    """Raised if a file is not a tar; the message says what it is.

    Attributes:
        lasting: whether another try would give the same result.
    """

    def __init__(self, reason: str, *, lasting: bool = True) -> None:
        super().__init__(reason)
        self.lasting = lasting


@contextmanager
def opened_tar(shard: Entry) -> Iterator[tarfile.TarFile]:
    """Open a tar for reading; nothing is extracted.

    Raises:
        NoTar: it cannot be opened, is compressed, or is not a tar.
        UserError: the storage refused, or does not answer.
    """
    try:
        with opened(shard) as file:
            _check_plain(file.read(6))
            file.seek(0)
            with tarfile.open(fileobj=file, mode="r:") as tar:
                yield tar
    except UserError:
        raise
    except tarfile.TarError:
        raise NoTar("is not a tar archive") from None
    except OSError as error:
        raise NoTar(printable(reason_of(error)), lasting=False) from None


def _check_plain(head: bytes) -> None:
    for magic, (kind, program) in COMPRESSED.items():
        if head.startswith(magic):
            raise NoTar(
                f"is compressed ({kind}), so all of it is lost: clips are found by their bytes; "
                f"unpack it with {program}"
            )


def usable_members(
    shard: Entry, tar: tarfile.TarFile, rejected: list[Rejected]
) -> Iterator[tarfile.TarInfo]:
    """Yield the members that can be read, in their order.

    Args:
        shard: where the tar lies, and its size.
        tar: the same, opened.
        rejected: gets the other members, and what is lost of an archive that ends early.

    Raises:
        UserError: the storage refused, or does not answer.
    """
    shown, size = shard.shown, shard.size
    seen: set[str] = set()
    try:
        for member in tar:
            if member.isdir():
                continue
            if reason := _why_unusable(member, seen, size):
                rejected.append(Rejected(f"{shown}/{printable(member.name)}", reason))
                continue
            seen.add(member.name)
            yield member
        damage = unread_rest(tar)
    except UserError:  # The storage does not answer, which says nothing about the archive.
        raise
    except (tarfile.TarError, OSError, EOFError):
        damage = "is damaged or cut off"
    except Exception as error:  # A strange file must not end the run, whatever it triggers.
        damage = f"is a damaged tar ({printable(reason_of(error))})"
    if damage:
        lost = _what_is_lost(tar, size)
        rejected.append(Rejected(shown, f"{damage}; {lost}; the samples before that are used"))


def _what_is_lost(tar: tarfile.TarFile, size: int) -> str:
    """Say what is lost of an archive that ends early: bytes, and the members that show in them."""
    if size - tar.offset < tarfile.BLOCKSIZE:
        return f"what followed byte {size:,} is lost"
    names = _names_in_rest(tar)
    shown = f", with {_listed(names)}" if names else ""
    return f"{size - tar.offset:,} of its {size:,} bytes are lost{shown}"


def _names_in_rest(tar: tarfile.TarFile) -> list[str]:
    """Find the headers of files after the place where a reader stopped."""
    file: Any = tar.fileobj
    file.seek(tar.offset)
    names: list[str] = []
    while chunk := file.read(_CHUNK):
        for place in range(0, len(chunk), tarfile.BLOCKSIZE):
            block = chunk[place : place + tarfile.BLOCKSIZE]
            if block[257:262] == b"ustar":
                with suppress(tarfile.HeaderError):
                    info = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
                    names += [info.name] if info.isreg() else []
    return names


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(map(printable, names[:_NAMES_SHOWN]))
    more = f" and {len(names) - _NAMES_SHOWN} more" if len(names) > _NAMES_SHOWN else ""
    return f"{len(names)} members: {shown}{more}"


def _why_unusable(member: tarfile.TarInfo, seen: set[str], size: int) -> str:
    path = PurePosixPath(member.name)
    if path.is_absolute() or ".." in path.parts or "\0" in member.name:
        return "its name leads out of the archive; it is not read"
    if not member.isreg() or member.issparse():
        return "is not a regular file"
    if member.offset_data + member.size > size:
        return "is cut off by the end of the archive"
    if member.name in seen:
        return "occurs twice; the first one is used"
    if member.size == 0:
        return "is empty (0 bytes)"
    return ""


def without_sample(shard: Entry, names: Sequence[str]) -> list[Rejected]:
    """Name the members that belong to no sample, on one line."""
    return [Rejected(shard.shown, f"has no sample for {_listed(names)}")] if names else []


def json_object(tar: tarfile.TarFile, member: tarfile.TarInfo) -> dict[str, Any] | None:
    """Read a member as a JSON object; None if it is not one."""
    if member.size > LONGEST_JSON:
        return None
    file = tar.extractfile(member)
    try:
        value = json.loads(file.read() if file else b"")
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def word(value: Any) -> str:
    """Read a name from JSON, where it may be a number."""
    return printable(str(value).strip()) if isinstance(value, str | int) else ""
