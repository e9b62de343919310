"""Shards: clips of one training size in tar files, each found by its bytes.

A data set is a folder, local or any fsspec URL::

    shard-000000.tar   <key>.mp4, <key>.json, ... (stock webdataset reads it)
    index.arrow        one row a clip: shard, offset and size of its mp4, checksum, facts

A clip is read with one byte-range request and checked against its SHA-256, so no shard is ever
read from its start, and damage is found before decoding. The index (:mod:`.index`) is written last:
without one, a folder is not a data set yet. Clips are appended in new shards, and the new index
makes all of them visible at once.
"""

import hashlib
import re
import tarfile
from typing import Any, NamedTuple

from prioritycut_ray.errors import UserError
from prioritycut_ray.storage.filesystem import ABSENT, FileSystem, filesystem
from prioritycut_ray.storage.paths import is_url
from prioritycut_ray.storage.reading import read_bytes

TEMPORARY_NAME = ".writing.tmp"
SHARD_NAME = re.compile(r"shard-(\d{6})\.tar")
"""Shards in the folder of the data set; any other shard is a URL or an absolute path."""
_CHUNK = 1 << 20


class ShardError(UserError):
    """A clip that cannot be read from its shard: it is missing, cut off or altered."""


class Clip(NamedTuple):
    """One clip: where its bytes are, and what is known about it without decoding.

    Attributes:
        key: its unique name; letters, digits, ``-`` and ``_`` only.
        shard: file name of a tar in the folder of the data set; or a URL or an absolute path.
        offset: first byte of the video inside the tar.
        size: bytes of the video.
        sha256: of the video, in hex; empty if it is not known.
        frames: number of frames that decode.
        fps: frames per second; an average if the original had a variable rate.
        width: pixels.
        height: pixels.
        identity: who or what is shown; no identity should be in two splits.
        split: ``train``, ``test`` or any other name.
        extra: what else is known, as a JSON object; empty if nothing is.
    """

    key: str
    shard: str
    offset: int
    size: int
    sha256: str
    frames: int
    fps: float
    width: int
    height: int
    identity: str
    split: str
    extra: str = ""


def is_elsewhere(shard: str) -> bool:
    """Return whether a shard is outside the folder of its data set: a URL or an absolute path."""
    return is_url(shard) or shard.startswith("/")


def shard_url(url: str, shard: str) -> str:
    """Return the path or URL of a shard of the data set at ``url``."""
    return shard if is_elsewhere(shard) else f"{url.rstrip('/')}/{shard}"


def locate_shard(url: str, shard: str) -> tuple[FileSystem, str]:
    """Return the file system of a shard of the data set at ``url``, and the shard's path on it."""
    if is_elsewhere(shard):
        return filesystem(shard)
    fs, root = filesystem(url)
    return fs, f"{root}/{shard}"


def read_clip(url: str, clip: Clip) -> bytes:
    """Fetch one clip by its byte range and verify it.

    Args:
        url: the folder of the data set.
        clip: the clip.

    Returns:
        The whole video.

    Raises:
        ShardError: the shard is missing, or the bytes are not those that were packed.
        UserError: the storage cannot be read.
    """
    fs, path = locate_shard(url, clip.shard)
    end = clip.offset + clip.size
    try:
        data = read_bytes(fs, path, shard_url(url, clip.shard), start=clip.offset, end=end)
    except ABSENT:
        raise ShardError(_no_clip(url, clip, "the shard is missing")) from None
    if len(data) < clip.size:
        raise ShardError(_no_clip(url, clip, f"cut off after {len(data)} of {clip.size} bytes"))
    if not is_whole(data, clip):
        raise ShardError(_no_clip(url, clip, "the checksum does not match"))
    return data


def is_whole(data: bytes, clip: Clip) -> bool:
    """Return whether these are the bytes of the clip, as far as its checksum is known."""
    if not clip.sha256:
        return len(data) == clip.size
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
    if len(file.read(tarfile.BLOCKSIZE)) < tarfile.BLOCKSIZE:
        return "is cut off"
    file.seek(end)
    while chunk := file.read(_CHUNK):
        if chunk.strip(b"\0"):
            return f"is damaged, or several tars joined: nothing after byte {end:,} can be read"
    return ""


def _no_clip(url: str, clip: Clip, reason: str) -> str:
    where = f"{shard_url(url, clip.shard)}: clip {clip.key!r}"
    return f"{where}: {reason}; restore the file or pack it again"
