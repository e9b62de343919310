"""Shards: clips of one training size in tar files, with an index that finds each by its bytes.

A data set is a folder, local or any fsspec URL::

    shard-000000.tar   <key>.mp4, <key>.json, ... (stock webdataset reads it)
    index.json         one row a clip: shard, offset and size of its mp4, checksum, facts

A clip is read with one byte-range request and checked against its SHA-256, so no shard is ever
read from its start, and damage is found before decoding. The index is written last: without one, a
folder is not a data set yet. Clips are appended in new shards, and the new index makes all of them
visible at once.
"""

import hashlib
import json
import tarfile
from collections.abc import Iterable
from typing import Annotated, Any, Literal

import pydantic
from pydantic import BaseModel, ConfigDict, Field, StringConstraints

from prioritycut_ray.errors import UserError
from prioritycut_ray.storage.filesystem import ABSENT, filesystem
from prioritycut_ray.storage.reading import read_bytes
from prioritycut_ray.validation import describe_problems

INDEX_NAME = "index.json"
TEMPORARY_NAME = ".writing.tmp"
_CHUNK = 1 << 20

Sha256 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]


class ShardError(UserError):
    """A clip that cannot be read from its shard: it is missing, cut off or altered."""


class Clip(BaseModel):
    """One clip: where its bytes are, and what is known about it without decoding.

    Attributes:
        key: its name in the shard; letters, digits, ``-`` and ``_`` only.
        shard: file name of the tar.
        offset: first byte of the mp4 inside the tar.
        size: bytes of the mp4.
        sha256: of the mp4.
        frames: number of frames that decode.
        fps: frames per second; an average if the original had a variable rate.
        width: pixels.
        height: pixels.
        identity: who or what is shown; no identity should be in two splits.
        split: ``train``, ``test`` or any other name.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    key: Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_-]+$")]
    shard: Annotated[str, StringConstraints(pattern=r"^shard-\d{6}\.tar$")]
    offset: int = Field(ge=0)
    size: int = Field(gt=0)
    sha256: Sha256
    frames: int = Field(gt=0)
    fps: float = Field(gt=0)
    width: int = Field(gt=0)
    height: int = Field(gt=0)
    identity: str
    split: str


class ClipIndex(BaseModel):
    """All clips of a data set, as stored in ``index.json``.

    Attributes:
        format: version of the layout.
        fingerprint: SHA-256 of what the clips are, not where they lie; see :func:`fingerprint`.
        clips: in the order of the shards.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal[1] = 1
    fingerprint: Sha256
    clips: tuple[Clip, ...] = Field(min_length=1)

    @pydantic.model_validator(mode="after")
    def _is_whole(self) -> "ClipIndex":
        if len({clip.key for clip in self.clips}) < len(self.clips):
            raise ValueError("two clips have the same key")
        if self.fingerprint != fingerprint(self.clips):
            raise ValueError("the fingerprint does not match the clips")
        return self


def fingerprint(clips: Iterable[Clip]) -> str:
    """Hash the contents of a data set; the same clips give the same hash in any layout or order."""
    facts = sorted((c.key, c.sha256, c.frames, c.identity, c.split) for c in clips)
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def read_index(url: str) -> ClipIndex:
    """Read and check the index of a data set.

    Args:
        url: the folder, a local path or any fsspec URL.

    Raises:
        UserError: the index is missing or damaged, or the storage cannot be read.
    """
    fs, root = filesystem(url)
    path = f"{url.rstrip('/')}/{INDEX_NAME}"
    try:
        return ClipIndex.model_validate_json(read_bytes(fs, f"{root}/{INDEX_NAME}", path))
    except ABSENT as error:
        # An object store says here that the bucket is missing; others repeat the path.
        said = "" if INDEX_NAME in str(error) else f" ({error})"
        names_shards = url.endswith(".tar") or "{" in url
        way_out = "name the folder of a data set" if names_shards else "check the path"
        raise UserError(
            f"{path}: there is no index{said}; {way_out}, or make one with `prioritycut shard`"
        ) from None
    except pydantic.ValidationError as error:
        raise UserError(
            f"{path}: the index is damaged ({describe_problems(error, ClipIndex)}); rebuild it "
            "with `prioritycut shard`"
        ) from None


def clips_of(index: ClipIndex, split: str) -> tuple[Clip, ...]:
    """Return the clips of one split, in the order of the index.

    Raises:
        UserError: there are none; the message names the splits that exist.
    """
    clips = tuple(clip for clip in index.clips if clip.split == split)
    if not clips:
        splits = ", ".join(sorted({clip.split for clip in index.clips}))
        raise UserError(f"split {split!r} has no clips: choose one of {splits}")
    return clips


def were_seen(clips: Iterable[Clip], earlier: ClipIndex) -> list[bool]:
    """Return for each clip whether an earlier index lists it, with the same bytes."""
    seen = {(clip.key, clip.sha256) for clip in earlier.clips}
    return [(clip.key, clip.sha256) in seen for clip in clips]


def read_clip(url: str, clip: Clip) -> bytes:
    """Fetch one clip by its byte range and verify it.

    Args:
        url: the folder that the index was read from.
        clip: the clip.

    Returns:
        The whole mp4.

    Raises:
        ShardError: the shard is missing, or the bytes are not those that were packed.
        UserError: the storage cannot be read.
    """
    fs, root = filesystem(url)
    name = f"{url.rstrip('/')}/{clip.shard}"
    end = clip.offset + clip.size
    try:
        data = read_bytes(fs, f"{root}/{clip.shard}", name, start=clip.offset, end=end)
    except ABSENT:
        raise ShardError(_no_clip(url, clip, "the shard is missing")) from None
    if len(data) < clip.size:
        raise ShardError(_no_clip(url, clip, f"cut off after {len(data)} of {clip.size} bytes"))
    if not is_whole(data, clip):
        raise ShardError(_no_clip(url, clip, "the checksum does not match"))
    return data


def is_whole(data: bytes, clip: Clip) -> bool:
    """Return whether these are the bytes of the clip as packed."""
    return hashlib.sha256(data).hexdigest() == clip.sha256


def unread_rest(tar: tarfile.TarFile) -> str:
    """Say why a tar reader stopped before the end of the file; empty if it did not.

    A reader silently takes a damaged header or a block of zeros for the end of the archive.

    Args:
        tar: read until it stopped; its file must be seekable.
    """
    file: Any = tar.fileobj
    end: int = tar.offset
    file.seek(end)
    if not file.read(tarfile.BLOCKSIZE):
        return "is cut off"
    file.seek(end)
    while chunk := file.read(_CHUNK):
        if chunk.strip(b"\0"):
            return f"is damaged, or several tars joined: nothing after byte {end:,} can be read"
    return ""


def _no_clip(url: str, clip: Clip, reason: str) -> str:
    where = f"{url.rstrip('/')}/{clip.shard}: clip {clip.key!r}"
    return f"{where}: {reason}; restore the file or pack it again"
