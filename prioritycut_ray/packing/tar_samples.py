"""Samples of a WebDataset shard: a video and a JSON object of the same key.

webdataset's own reader yields the contents of members without their offsets, silently skips links
and everything after a damaged header, and groups adjacent members only. Here a sample is a byte
range, and everything unusable is named. webdataset still decides where a key ends, so both readers
see the same samples.
"""

import json
import tarfile
from collections.abc import Iterator
from pathlib import PurePosixPath
from typing import Any, NamedTuple

from webdataset.tariterators import base_plus_ext

from prioritycut_ray.data.shards import unread_rest
from prioritycut_ray.errors import reason_of
from prioritycut_ray.packing.entries import (
    VIDEO_EXTENSIONS,
    Entry,
    Rejected,
    Span,
    opened,
    printable,
)
from prioritycut_ray.packing.manifest import SPLIT_NAMES

LONGEST_JSON = 1 << 20


class _Sample(NamedTuple):
    """The members of one key of a tar."""

    video: tarfile.TarInfo | None = None
    facts: dict[str, Any] | None = None


def read_samples(shard: Entry) -> list[Entry | Rejected]:
    """List the samples of a tar, and its unusable parts; nothing is extracted."""
    shown = shard.shown
    result: list[Entry | Rejected] = []
    samples: dict[str, _Sample] = {}
    try:
        with opened(shard) as file, tarfile.open(fileobj=file, mode="r:") as tar:
            result += _read_members(shard, tar, samples)
    except (OSError, tarfile.TarError) as error:
        reason = getattr(error, "strerror", None) or "is not a tar archive"
        return [Rejected(shown, reason)]
    except Exception as error:  # A strange file must not end the run, whatever it triggers.
        result.append(Rejected(shown, f"is a damaged tar ({printable(reason_of(error))})"))
    for key, sample in samples.items():
        if sample.video is None:
            result.append(Rejected(f"{shown}/{printable(key)}", "has no video beside its JSON"))
        elif sample.facts is None:
            member = printable(sample.video.name)
            result.append(Rejected(f"{shown}/{member}", "has no usable JSON beside it"))
        else:
            result.append(_entry(shard, key, sample.video, sample.facts))
    return result or [Rejected(shown, "contains no samples")]


def _read_members(
    shard: Entry, tar: tarfile.TarFile, samples: dict[str, _Sample]
) -> Iterator[Rejected]:
    """Sort the members of a tar into samples, and yield those that cannot be used."""
    shown, size = shard.shown, shard.size
    seen: set[str] = set()
    try:
        for member in tar:
            if member.isdir():
                continue
            if reason := _why_unusable(member, seen, size):
                yield Rejected(f"{shown}/{printable(member.name)}", reason)
                continue
            seen.add(member.name)
            yield from _add(shown, tar, member, samples)
        damage = unread_rest(tar)
    except (tarfile.TarError, OSError, EOFError):
        damage = "is damaged or cut off"
    if damage:
        yield Rejected(shown, f"{damage}; the samples before that are used")


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


def _add(
    shown: str, tar: tarfile.TarFile, member: tarfile.TarInfo, samples: dict[str, _Sample]
) -> Iterator[Rejected]:
    """Add a member to its sample, or yield why it cannot be one's."""
    key, extension = base_plus_ext(member.name)
    if key is None:  # A hidden file, or one without an extension.
        return
    sample = samples.get(key, _Sample())
    if f".{extension.lower()}" in VIDEO_EXTENSIONS:
        if sample.video is not None:
            yield Rejected(f"{shown}/{printable(member.name)}", "is a second video of its key")
            return
        samples[key] = sample._replace(video=member)
    elif extension.lower() == "json":
        facts = _json_object(tar, member)
        if facts is None:
            yield Rejected(f"{shown}/{printable(member.name)}", "is not a JSON object")
        samples[key] = sample._replace(facts=facts)


def _json_object(tar: tarfile.TarFile, member: tarfile.TarInfo) -> dict[str, Any] | None:
    if member.size > LONGEST_JSON:
        return None
    file = tar.extractfile(member)
    try:
        value = json.loads(file.read() if file else b"")
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _entry(shard: Entry, key: str, video: tarfile.TarInfo, facts: dict[str, Any]) -> Entry:
    split = _word(facts.get("split"))
    return shard._replace(
        name=f"{shard.name}/{key}",
        identity=_word(facts.get("identity")) or _word(facts.get("identity_id")),
        split=SPLIT_NAMES.get(split.casefold(), split),
        span=Span(video.offset_data, video.size),
        member=video.name,
        size=video.size,
    )


def _word(value: Any) -> str:
    """Read a name from JSON, where it may be a number."""
    return printable(str(value).strip()) if isinstance(value, str | int) else ""
