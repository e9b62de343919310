"""Shards: clips of one training size in tar files, with an index that finds each by its bytes.

A data set is a folder, local or any fsspec URL::

    shard-000000.tar   <key>.mp4, <key>.json, ... (stock webdataset reads it)
    index.json         one row a clip: shard, offset and size of its mp4, checksum, facts

A clip is read with one byte-range request and checked against its SHA-256, so no shard is ever
read from its start, and damage is seen before it is decoded. The index is written last: a folder
without one is no data set yet. Clips are appended in new shards; they show with the new index, all
at once.
"""

import hashlib
import io
import json
import re
import tarfile
import unicodedata
from collections import Counter
from collections.abc import Iterable
from types import TracebackType
from typing import IO, Annotated, Any, Literal, NamedTuple

import pydantic
from pydantic import BaseModel, ConfigDict, Field, StringConstraints

from prioritycut_ray.errors import UserError
from prioritycut_ray.storage.filesystem import ABSENT, filesystem
from prioritycut_ray.storage.reading import read_bytes

INDEX_NAME = "index.json"
TEMPORARY_NAME = ".writing.tmp"
SHARD_BYTES = 256 * 1024 * 1024
LONGEST_KEY = 60
_CHUNK = 1 << 20

Sha256 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]


class ShardError(UserError):
    """A clip that cannot be had from its shard: missing, cut off, or altered."""


class Clip(BaseModel):
    """One clip: where its bytes are, and what is known without decoding it.

    Attributes:
        key: its name in the shard; letters, digits, ``-`` and ``_`` only.
        shard: file name of the tar.
        offset: first byte of the mp4 inside the tar.
        size: bytes of the mp4.
        sha256: of the mp4.
        frames: number of frames that decode.
        fps: frames per second; an average if the original came at a variable rate.
        width: pixels.
        height: pixels.
        identity: who or what is shown; no identity should be in two splits.
        split: ``train``, ``test`` or a name of your own.
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
        fingerprint: SHA-256 over what the clips are, not where they lie; see :func:`fingerprint`.
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
    """Name the contents of a data set: the same for the same clips in any shard layout or order."""
    facts = sorted((c.key, c.sha256, c.frames, c.identity, c.split) for c in clips)
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def read_index(url: str) -> ClipIndex:
    """Read and check the index of a data set.

    Args:
        url: the folder, a local path or any fsspec URL.

    Raises:
        UserError: if there is no index, or a damaged one, or if the storage cannot be read.
    """
    fs, root = filesystem(url)
    path = f"{url.rstrip('/')}/{INDEX_NAME}"
    try:
        return ClipIndex.model_validate_json(read_bytes(fs, f"{root}/{INDEX_NAME}", path))
    except ABSENT as error:
        # An object store says here if it is the bucket that is missing; others repeat the path.
        said = "" if INDEX_NAME in str(error) else f" ({error})"
        raise UserError(
            f"{path}: there is no index{said}; check the place, or make one with "
            "`prioritycut shard`"
        ) from None
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        reason = f"{where + ': ' if where else ''}{first['msg']}"
        raise UserError(
            f"{path}: the index is damaged ({reason}); make it anew with `prioritycut shard`"
        ) from None


def clips_of(index: ClipIndex, split: str) -> tuple[Clip, ...]:
    """Take the clips of one split, in the order of the index.

    Raises:
        UserError: if there are none; it names the splits that exist.
    """
    clips = tuple(clip for clip in index.clips if clip.split == split)
    if not clips:
        splits = ", ".join(sorted({clip.split for clip in index.clips}))
        raise UserError(f"split {split!r} has no clips: choose one of {splits}")
    return clips


def read_clip(url: str, clip: Clip) -> bytes:
    """Fetch one clip by its byte range and verify it.

    Args:
        url: the folder that the index was read from.
        clip: the clip.

    Returns:
        The whole mp4.

    Raises:
        ShardError: if the shard is missing or the bytes are not those that were packed.
        UserError: if the storage cannot be read.
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
    """Whether these are the bytes of the clip that was packed."""
    return hashlib.sha256(data).hexdigest() == clip.sha256


def unread_rest(tar: tarfile.TarFile) -> str:
    """Why a tar reader stopped before the end of the file; empty if it did not.

    A reader silently takes a damaged header, or a block of zeros, for the end of the archive.

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
    return f"{where}: {reason}; restore the file or pack it anew"


# ---------------------------------------------------------------------------------------------
# Writing
# ---------------------------------------------------------------------------------------------


class Member(NamedTuple):
    """A clip on its way into a shard: the facts of :class:`Clip` without its place."""

    key: str
    data: bytes
    frames: int
    fps: float
    width: int
    height: int
    identity: str
    original: str  # The file's own name, which the key may not spell.
    variable_rate: bool
    first_frame: int = 0  # Where in the original the clip begins.
    split: str = ""  # For whoever packs the shard again; the index is what training reads.


class ShardWriter:
    """Writes members into shards; :meth:`finish` writes the index and makes the folder a data set.

    A context manager. Every file is written under a temporary name and renamed when complete.
    If the block is left by an exception, or without :meth:`finish`, all that it wrote is removed.
    """

    def __init__(
        self, url: str, shard_bytes: int = SHARD_BYTES, base: ClipIndex | None = None
    ) -> None:
        """Make the folder.

        Args:
            url: the folder, a local path or any fsspec URL.
            shard_bytes: a shard that has grown to this size is closed.
            base: the index of a data set that is there already and gets new shards; the old ones
                are not touched.
        """
        self._fs, self._root = filesystem(url)
        self._fs.makedirs(self._root, exist_ok=True)
        self._shard_bytes = shard_bytes
        self._base = base.clips if base is not None else ()
        self._first = 1 + max((int(clip.shard[6:12]) for clip in self._base), default=-1)
        self._clips: list[Clip] = []
        self._shards: list[str] = []
        self._temporary = f"{self._root}/{TEMPORARY_NAME}"
        self._file: IO[bytes] | None = None
        self._tar: tarfile.TarFile | None = None
        self._finished = False

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._finished:
            return
        if self._file is not None:
            self._file.close()
        for path in [self._temporary, *(f"{self._root}/{name}" for name in self._shards)]:
            if self._fs.exists(path):
                self._fs.rm_file(path)

    def add(self, member: Member) -> None:
        """Append one clip; its key must be new."""
        tar = self._open_shard()
        facts = member._asdict()
        data = facts.pop("data")
        offset = _append(tar, f"{member.key}.mp4", data)
        _append(tar, f"{member.key}.json", json.dumps(facts, sort_keys=True).encode())
        self._clips.append(
            Clip(
                key=member.key,
                shard=self._shard_name(),
                offset=offset,
                size=len(data),
                sha256=hashlib.sha256(data).hexdigest(),
                frames=member.frames,
                fps=member.fps,
                width=member.width,
                height=member.height,
                identity=member.identity,
                split="",
            )
        )
        if tar.offset >= self._shard_bytes:
            self._close_shard()

    def finish(self, split_of_key: dict[str, str]) -> ClipIndex:
        """Close the last shard and write the index.

        Args:
            split_of_key: the split of every key that was added.

        Returns:
            The index as written.
        """
        if self._tar is not None:
            self._close_shard()
        new = (c.model_copy(update={"split": split_of_key[c.key]}) for c in self._clips)
        clips = (*self._base, *new)
        index = ClipIndex(fingerprint=fingerprint(clips), clips=clips)
        self._fs.pipe_file(self._temporary, index.model_dump_json(indent=1).encode())
        self._fs.mv(self._temporary, f"{self._root}/{INDEX_NAME}")
        self._finished = True
        return index

    def _shard_name(self) -> str:
        return f"shard-{self._first + len(self._shards):06d}.tar"

    def _open_shard(self) -> tarfile.TarFile:
        if self._tar is None:
            self._file = self._fs.open(self._temporary, "wb")
            self._tar = tarfile.TarFile(fileobj=self._file, mode="w", format=tarfile.USTAR_FORMAT)
        return self._tar

    def _close_shard(self) -> None:
        assert self._tar is not None
        assert self._file is not None
        self._tar.close()
        self._file.close()
        self._fs.mv(self._temporary, f"{self._root}/{self._shard_name()}")
        self._shards.append(self._shard_name())
        self._tar = self._file = None


def _append(tar: tarfile.TarFile, name: str, data: bytes) -> int:
    """Append a file to a tar and return the offset of its first byte."""
    info = tarfile.TarInfo(name)  # Its time, owner and mode are constants: the same tar each time.
    info.size = len(data)
    offset = tar.offset + len(info.tobuf(tarfile.USTAR_FORMAT))
    tar.addfile(info, io.BytesIO(data))
    return offset


def make_keys(names: Iterable[str], used: Iterable[str] = ()) -> list[str]:
    """Make a key for every name (a relative path without extension), unique and safe.

    webdataset cuts a member's name at its first dot, so a key has none. A name of ASCII letters,
    digits, ``-`` and ``_`` (not first) is its own key; any other is spelled in those, with a short
    hash of the name behind.

    Args:
        names: of the clips.
        used: keys that are taken already.

    Returns:
        The keys, in the order of the names. Equal names are numbered.
    """
    keys: list[str] = []
    taken: Counter[str] = Counter(used)
    for name in names:
        key = _key(name)
        while taken[key]:
            key = f"{_key(name)}-{taken[_key(name)] + 1}"
            taken[_key(name)] += 1
        taken[key] += 1
        keys.append(key)
    return keys


def _key(name: str) -> str:
    plain = unicodedata.normalize("NFKD", name).encode("ascii", "ignore").decode()
    slug = re.sub(r"[^A-Za-z0-9]*[^A-Za-z0-9_-]+[^A-Za-z0-9]*", "-", plain).strip("-_")
    if slug and slug == name and len(name) <= LONGEST_KEY:
        return name
    digest = hashlib.sha256(name.encode("utf-8", "surrogatepass")).hexdigest()[:8]
    return f"{slug[:LONGEST_KEY].strip('-_') or 'clip'}-{digest}"
