"""Writing shards: clips with a JSON object each in tar files, then the index that lists them.

Reading a data set needs none of this, so it is a module of its own: webdataset imports torch.
"""

import hashlib
import json
import re
import tarfile
import unicodedata
from collections import Counter
from collections.abc import Iterable
from contextlib import suppress
from types import TracebackType
from typing import IO, NamedTuple

from webdataset import TarWriter

from prioritycut_ray.data.index import ClipIndex, build_index, write_index
from prioritycut_ray.data.shards import SHARD_NAME, TEMPORARY_NAME, Clip
from prioritycut_ray.storage.filesystem import filesystem

SHARD_BYTES = 256 * 1024 * 1024
LONGEST_KEY = 60


class Member(NamedTuple):
    """A clip to write: what :class:`Clip` says of it except its place.

    Attributes:
        key: name in the shard, see :func:`make_keys`.
        data: the whole mp4.
        frames: number of frames that decode.
        fps: frames per second.
        width: pixels.
        height: pixels.
        identity: who or what is shown.
        original: file name of the video, which the key may not spell out.
        variable_rate: whether ``fps`` is only an average.
        first_frame: where in the video the clip begins, from 0.
        split: used if the shard is packed again; training reads the split from the index.
    """

    key: str
    data: bytes
    frames: int
    fps: float
    width: int
    height: int
    identity: str
    original: str
    variable_rate: bool
    first_frame: int = 0
    split: str = ""


class ShardWriter:
    """Write clips into shards; :meth:`finish` writes the index and so completes the data set.

    A context manager. Every file is written under a temporary name and renamed when complete.
    If the block ends with an exception, or without :meth:`finish`, everything it wrote is removed.
    """

    def __init__(
        self, url: str, shard_bytes: int = SHARD_BYTES, base: ClipIndex | None = None
    ) -> None:
        """Create the folder.

        Args:
            url: the folder, a local path or any fsspec URL.
            shard_bytes: a shard that has reached this size is closed.
            base: index of an existing data set that gets new shards; its shards are not touched.
        """
        self._url = url
        self._fs, self._root = filesystem(url)
        self._fs.makedirs(self._root, exist_ok=True)
        self._shard_bytes = shard_bytes
        self._base = base
        there = [SHARD_NAME.fullmatch(name) for name in base.shards] if base is not None else []
        self._first = 1 + max((int(name[1]) for name in there if name), default=-1)
        self._clips: list[Clip] = []
        self._shards: list[str] = []
        self._temporary = f"{self._root}/{TEMPORARY_NAME}"
        self._file: IO[bytes] | None = None
        self._tar: TarWriter | None = None
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
        if self._tar is not None:
            with suppress(OSError):  # What fails to be written is removed anyway.
                self._tar.close()
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
        offset = _append(tar, member.key, "mp4", data)
        _append(tar, member.key, "json", json.dumps(facts, sort_keys=True).encode())
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
        if tar.tarstream.offset >= self._shard_bytes:
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
        new = (clip._replace(split=split_of_key[clip.key]) for clip in self._clips)
        index = build_index(new, self._base)
        write_index(index, self._url)
        self._finished = True
        return index

    def _shard_name(self) -> str:
        return f"shard-{self._first + len(self._shards):06d}.tar"

    def _open_shard(self) -> TarWriter:
        if self._tar is None:
            self._file = self._fs.open(self._temporary, "wb")
            # Constant owner, mode and time: the same clips give the same bytes.
            self._tar = TarWriter(
                self._file,
                user="",
                group="",
                mode=0o644,
                mtime=0,
                encoder=False,
                compress=False,
            )
        return self._tar

    def _close_shard(self) -> None:
        assert self._tar is not None
        assert self._file is not None
        self._tar.close()
        self._file.close()
        self._fs.mv(self._temporary, f"{self._root}/{self._shard_name()}")
        self._shards.append(self._shard_name())
        self._tar = self._file = None


def _append(tar: TarWriter, key: str, extension: str, data: bytes) -> int:
    """Append a file to a tar and return the offset of its first byte."""
    # One file at a time: TarWriter would sort the JSON before the video.
    tar.write({"__key__": key, extension: data})
    blocks = -(-len(data) // tarfile.BLOCKSIZE)
    offset: int = tar.tarstream.offset - blocks * tarfile.BLOCKSIZE
    return offset


def make_keys(names: Iterable[str], used: Iterable[str] = ()) -> list[str]:
    """Make a unique and safe key for every name (a relative path without extension).

    webdataset cuts a member's name at its first dot, so a key has none. A name of ASCII letters,
    digits, ``-`` and ``_`` (not first) is its own key; any other name is spelled with those and
    followed by a short hash of itself.

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
