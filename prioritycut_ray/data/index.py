"""The index of a data set: one row a clip, in an Arrow file that is mapped instead of read.

``index.arrow`` is one uncompressed record batch (:data:`SCHEMA`), so every column lies in the file
as it is used in memory. Rows are sorted by split, identity and key: a split is a range of rows, and
so is an identity within it. Nothing but the row of a clip is touched to find the clip, and
processes of one machine share the pages.

The file carries a SHA-256 of itself, the *seal*. It is verified once per machine, not by every
process: see :mod:`.index_files`.
"""

import hashlib
import itertools
import os
import tempfile
from bisect import bisect_left, bisect_right
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, overload

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from prioritycut_ray.data.index_files import (
    SMALL_BYTES,
    IndexDamaged,
    fetch_index,
    note_verified,
    seal_file,
    seal_text,
    verify_bytes,
    verify_file,
)
from prioritycut_ray.data.old_index import OLD_INDEX_NAME, read_old_clips
from prioritycut_ray.data.shards import SHARD_NAME, TEMPORARY_NAME, Clip, is_elsewhere
from prioritycut_ray.errors import UserError
from prioritycut_ray.storage.atomic import flush
from prioritycut_ray.storage.filesystem import (
    ABSENT,
    FileSystem,
    filesystem,
    is_local,
    is_network_mount,
)
from prioritycut_ray.storage.reading import read_bytes

INDEX_NAME = "index.arrow"
FINGERPRINT_VERSION = "v2"
"""Increased when the same clips would give another fingerprint or another order of samples."""

_NAMES = pa.dictionary(pa.int32(), pa.large_string())
SCHEMA = pa.schema(
    [
        ("key", pa.large_string()),
        ("shard", _NAMES),
        ("offset", pa.int64()),
        ("size", pa.int64()),
        ("sha256", pa.binary(32)),  # zeros if it is not known
        ("frames", pa.int32()),
        ("fps", pa.float64()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("identity", _NAMES),
        ("split", _NAMES),
        ("extra", pa.large_string()),
    ]
)
"""The columns of an index, named after the fields of :class:`Clip`."""
PLAIN_SCHEMA = pa.schema(
    [
        field.with_type(pa.large_string()) if field.type == _NAMES else field
        for field in SCHEMA.remove_metadata()
    ]
)
"""The columns that :func:`index_of_table` takes: names are not encoded yet."""

_DICTIONARIES = [field.name for field in SCHEMA if field.type == _NAMES]
_POSITIVE = ("size", "frames", "fps", "width", "height")
_KEY_PATTERN = r"\A[A-Za-z0-9_-]+\z"
_FINGERPRINT = b"fingerprint"
_UNKNOWN = bytes(32)
_ROWS_AT_ONCE = 1 << 16
_KEYS_AT_ONCE = 1 << 20


class ClipIndex:
    """All clips of a data set.

    Attributes:
        fingerprint: SHA-256 of what the clips are, not of where they lie, after its version.
        clips: sorted by split, identity and key.
    """

    def __init__(self, batch: pa.RecordBatch, fingerprint: str) -> None:
        """Wrap a batch of :data:`SCHEMA` that is sorted and whose dictionaries are sorted."""
        self.batch = batch
        self.fingerprint = fingerprint
        self.clips = Clips(self, range(batch.num_rows))

    def __len__(self) -> int:
        return int(self.batch.num_rows)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, ClipIndex):
            return NotImplemented
        return self.fingerprint == other.fingerprint and bool(self.batch.equals(other.batch))

    __hash__ = None  # type: ignore[assignment]

    @property
    def splits(self) -> list[str]:
        """Names of the splits, sorted."""
        return self.names("split")

    @property
    def shards(self) -> list[str]:
        """Shards with clips, sorted; see :class:`Clip`."""
        return self.names("shard")

    def names(self, column: str) -> list[str]:
        """Return the different values of a column ``shard``, ``identity`` or ``split``, sorted."""
        values: list[str] = self.batch.column(column).dictionary.to_pylist()
        return values

    def values(self, column: str) -> NDArray[Any]:
        """Return a column of numbers without copying it; of names, their places in :meth:`names`.

        ``sha256`` is ``uint8 [rows, 32]``; a checksum that is not known is zero.
        """
        array = self.batch.column(column)
        if column == "sha256":
            return np.frombuffer(array.buffers()[1], np.uint8)[: 32 * len(self)].reshape(-1, 32)
        if column in _DICTIONARIES:
            array = array.indices
        numbers: NDArray[Any] = array.to_numpy(zero_copy_only=True)
        return numbers

    def keys(self) -> Iterator[str]:
        """Iterate over the keys of all clips."""
        column = self.batch.column("key")
        for first in range(0, len(self), _KEYS_AT_ONCE):
            yield from column.slice(first, _KEYS_AT_ONCE).to_pylist()

    def rows_of(self, split: str) -> range:
        """Return the rows of a split; they are empty if there is no such split."""
        names = self.splits
        if split not in names:
            return range(0)
        codes, code = self.values("split"), names.index(split)
        return range(bisect_left(codes, code), bisect_right(codes, code))

    def frame_sizes(self) -> set[tuple[int, int]]:
        """Return the different widths and heights."""
        pairs = pa.table([self.batch.column("width"), self.batch.column("height")], ["w", "h"])
        found = pairs.group_by(["w", "h"]).aggregate([]).to_pydict()
        return set(zip(found["w"], found["h"], strict=True))

    def shared_identities(self) -> list[str]:
        """Return the identities that are in several splits, sorted."""
        times = np.zeros(len(self.batch.column("identity").dictionary), np.int32)
        for split in self.splits:
            times[self.clips_of(split).identity_codes()] += 1
        several = np.flatnonzero(times > 1)
        shared: list[str] = self.batch.column("identity").dictionary.take(several).to_pylist()
        return shared

    def splits_of_identities(self) -> dict[str, list[str]]:
        """Return the splits of each identity, sorted."""
        found: dict[int, list[str]] = defaultdict(list)
        for split in self.splits:
            for code in self.clips_of(split).identity_codes().tolist():
                found[code].append(split)
        names = self.names("identity")
        return {names[code]: splits for code, splits in sorted(found.items())}

    def clips_of(self, split: str) -> "Clips":
        """Return the clips of a split, which may be none."""
        return Clips(self, self.rows_of(split))

    def known_checksums(self, checksums: Iterable[str]) -> set[str]:
        """Return those SHA-256 of videos, in hex, that clips of this index have."""
        wanted = pa.array({bytes.fromhex(text) for text in checksums if text}, pa.binary(32))
        column = self.batch.column("sha256")
        found = column.filter(pc.is_in(column, value_set=wanted))
        return {value.hex() for value in found.unique().to_pylist()}


class Clips(Sequence[Clip]):
    """Rows of an index as a sequence; a :class:`Clip` is made when it is asked for."""

    def __init__(self, index: ClipIndex, rows: range) -> None:
        self.source = index
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    @overload
    def __getitem__(self, place: int) -> Clip: ...

    @overload
    def __getitem__(self, place: slice) -> "Clips": ...

    def __getitem__(self, place: int | slice) -> "Clip | Clips":
        if isinstance(place, slice):
            return Clips(self.source, self.rows[place])
        row = self.rows[place]
        values = {name: self.source.batch.column(name)[row].as_py() for name in SCHEMA.names}
        values["sha256"] = values["sha256"].hex() if values["sha256"] != _UNKNOWN else ""
        return Clip(**values)

    def __iter__(self) -> Iterator[Clip]:
        return (self[place] for place in range(len(self)))

    def values(self, column: str) -> NDArray[Any]:
        """Return a column as :meth:`ClipIndex.values` does, for these rows."""
        values = self.source.values(column)
        return values[self.rows.start : self.rows.stop : self.rows.step]

    def keys(self) -> pa.Array:
        """Return the keys; the rows must be consecutive."""
        return self.source.batch.column("key").slice(self.rows.start, len(self.rows))

    def identity_codes(self) -> NDArray[np.int32]:
        """Return the different identities, as places in :meth:`ClipIndex.names`.

        The clips must be of one split, so that they are sorted by identity.
        """
        codes = self.values("identity")
        return codes[identity_starts(codes)]


def identity_starts(codes: NDArray[np.int32]) -> NDArray[np.int64]:
    """Return the places in a sorted column at which another value begins."""
    return np.flatnonzero(np.diff(codes, prepend=np.int32(-1)))


# ---------------------------------------------------------------------------------------------
# Make an index
# ---------------------------------------------------------------------------------------------


def build_index(clips: Iterable[Clip], base: ClipIndex | None = None) -> ClipIndex:
    """Make an index of clips, in memory.

    Args:
        clips: in any order.
        base: an index whose clips are added.

    Raises:
        ValueError: there are no clips, or one of them cannot be: two have the same key, its shard
            is not a name that :class:`Clip` allows, its size is not positive, and so on.
    """
    batches = [] if base is None else [_plain(base.batch)]
    rest = iter(clips)
    while chunk := list(itertools.islice(rest, _ROWS_AT_ONCE)):
        columns = dict(zip(Clip._fields, map(list, zip(*chunk, strict=True)), strict=True))
        columns["sha256"] = [bytes.fromhex(text) or _UNKNOWN for text in columns["sha256"]]
        batches.append(pa.RecordBatch.from_pydict(columns, PLAIN_SCHEMA))
    return index_of_table(pa.Table.from_batches(batches, PLAIN_SCHEMA))


def index_of_table(table: pa.Table) -> ClipIndex:
    """Make an index of a table of :data:`PLAIN_SCHEMA`, whose rows may be in any order.

    Raises:
        ValueError: as for :func:`build_index`.
    """
    columns = {name: table.column(name).combine_chunks() for name in SCHEMA.names}
    _check_columns(columns)
    for name in _DICTIONARIES:
        columns[name] = _encoded(columns[name])
    sort_keys = {
        "split": columns["split"].indices,
        "identity": columns["identity"].indices,
        "key": columns["key"],
    }
    order = pc.sort_indices(
        pa.table(sort_keys), sort_keys=[(name, "ascending") for name in sort_keys]
    )
    batch = pa.RecordBatch.from_arrays(
        [columns.pop(name).take(order) for name in SCHEMA.names], schema=SCHEMA
    )
    return ClipIndex(batch, fingerprint(batch))


def fingerprint(batch: pa.RecordBatch) -> str:
    """Hash the contents of a data set; the same clips give the same hash in any layout or order.

    Args:
        batch: as for :class:`ClipIndex`.

    Returns:
        The version of the fingerprint, a hyphen, and the hash in hex.
    """
    index = ClipIndex(batch, "")
    digest = hashlib.sha256()

    def add_numbers(numbers: NDArray[Any], dtype: str) -> None:
        digest.update(np.ascontiguousarray(numbers, dtype).data)

    def add_strings(array: pa.Array) -> None:
        add_numbers(pc.binary_length(array).to_numpy(zero_copy_only=False), "<i8")
        _, offsets, data = array.buffers()
        begin, end = np.frombuffer(offsets, np.int64)[[array.offset, array.offset + len(array)]]
        digest.update(memoryview(data)[begin:end] if data is not None else b"")

    add_strings(batch.column("key"))
    for name in ("identity", "split"):
        add_strings(batch.column(name).dictionary)
        add_numbers(index.values(name), "<i4")
    add_numbers(index.values("sha256"), "u1")
    for name in ("size", "frames"):
        add_numbers(index.values(name), "<i8")
    return f"{FINGERPRINT_VERSION}-{digest.hexdigest()}"


def _plain(batch: pa.RecordBatch) -> pa.RecordBatch:
    arrays = [
        column.dictionary_decode() if name in _DICTIONARIES else column
        for name, column in zip(SCHEMA.names, batch.columns, strict=True)
    ]
    return pa.RecordBatch.from_arrays(arrays, schema=PLAIN_SCHEMA)


def _encoded(names: pa.Array) -> pa.DictionaryArray:
    """Encode names by their places among the different ones, sorted."""
    encoded = names.dictionary_encode()
    order = pc.sort_indices(encoded.dictionary).to_numpy()
    place = np.empty(len(order), np.int32)
    place[order] = np.arange(len(order), dtype=np.int32)
    codes = place[encoded.indices.to_numpy(zero_copy_only=False)]
    return pa.DictionaryArray.from_arrays(pa.array(codes), encoded.dictionary.take(order))


def _check_columns(columns: dict[str, pa.Array]) -> None:
    """Check everything about an index that reading it relies on.

    Raises:
        ValueError: names the first clip that is wrong, and why.
    """
    keys = columns["key"]
    if not len(keys):
        raise ValueError("there are no clips")
    for name in SCHEMA.names:
        if columns[name].null_count:
            raise ValueError(f"{name} is missing")

    def check(good: pa.Array, reason: str) -> None:
        wrong = pc.index(good, False).as_py()
        if wrong >= 0:
            raise ValueError(f"clip {keys[wrong].as_py()!r}: {reason}")

    check(pc.match_substring_regex(keys, _KEY_PATTERN), "the key has other characters")
    for name in _POSITIVE:
        check(pc.greater(columns[name], 0), f"{name} is not positive")
    check(pc.greater_equal(columns["offset"], 0), "offset is negative")
    for shard in columns["shard"].unique().to_pylist():
        _check_shard(shard)
    if pc.count_distinct(keys).as_py() < len(keys):
        counts = pc.value_counts(keys)
        twice = pc.index(pc.greater(counts.field("counts"), 1), True).as_py()
        raise ValueError(f"two clips have the same key {counts.field('values')[twice].as_py()!r}")


def _check_shard(shard: str) -> None:
    if not SHARD_NAME.fullmatch(shard) and not is_elsewhere(shard):
        raise ValueError(f"shard {shard!r} is neither shard-NNNNNN.tar, nor absolute, nor a URL")


# ---------------------------------------------------------------------------------------------
# Read and write
# ---------------------------------------------------------------------------------------------


def read_index(url: str, *, cache_dir: str | None = None, again: bool = False) -> ClipIndex:
    """Open the index of a data set.

    An index on a local disk is mapped. A remote one, or one on a network mount, is fetched once per
    machine and then mapped too, unless it is small. The ``index.json`` of older versions is also
    read.

    Args:
        url: the folder, a local path or any fsspec URL.
        cache_dir: local folder for fetched indexes; one below the user's cache by default.
        again: verify the checksum of a large local index even if this machine has done so.

    Raises:
        UserError: the index is missing or damaged, or the storage cannot be read.
    """
    fs, root = filesystem(url)
    name = f"{url.rstrip('/')}/{INDEX_NAME}"
    try:
        # A file that is mapped over a network kills the process if another machine replaces it.
        if is_local(url) and not is_network_mount(root):
            return _open_local(Path(root, INDEX_NAME), cache_dir, again=again)
        return _open(fetch_index(fs, f"{root}/{INDEX_NAME}", name, cache_dir))
    except ABSENT as error:
        return _read_old(fs, root, url, error)
    except (IndexDamaged, pa.ArrowException, ValueError, KeyError) as error:
        raise UserError(
            f"{name}: the index is damaged ({' '.join(str(error).split())}); restore it from a "
            "backup, or rebuild it with `prioritycut shard`"
        ) from None


def write_index(index: ClipIndex, url: str) -> None:
    """Write the index of a data set, which replaces an older one atomically.

    Args:
        index: the index.
        url: the folder, a local path or any fsspec URL.
    """
    fs, root = filesystem(url)
    fs.makedirs(root, exist_ok=True)
    here = is_local(url)
    descriptor, name = tempfile.mkstemp(prefix=".", suffix=".tmp", dir=root if here else None)
    temporary = Path(name)
    try:
        os.close(descriptor)
        _write_sealed(index, temporary)
        if here:
            os.chmod(temporary, 0o644)  # mkstemp creates private files.
            os.replace(temporary, Path(root, INDEX_NAME))
            flush(Path(root))
            note_verified(Path(root, INDEX_NAME))
        else:
            fs.put_file(name, f"{root}/{TEMPORARY_NAME}")
            fs.mv(f"{root}/{TEMPORARY_NAME}", f"{root}/{INDEX_NAME}")
    finally:
        temporary.unlink(missing_ok=True)
    _remove_old(fs, root)


def upgrade_index(url: str) -> bool:
    """Replace an ``index.json`` by an index of the current format.

    Args:
        url: the folder of a data set, a local path or any fsspec URL.

    Returns:
        Whether there was anything to do.

    Raises:
        UserError: the index is missing or damaged.
    """
    index = read_index(url)
    fs, root = filesystem(url)
    if fs.exists(f"{root}/{INDEX_NAME}"):
        _remove_old(fs, root)  # An upgrade that was killed has left it.
        return False
    write_index(index, url)
    return True


def has_index(names: Iterable[str]) -> bool:
    """Return whether a folder with files of these names contains an index, of any version."""
    return not {INDEX_NAME, OLD_INDEX_NAME}.isdisjoint(names)


def _write_sealed(index: ClipIndex, path: Path) -> None:
    metadata = {_FINGERPRINT: index.fingerprint.encode(), b"seal": seal_text()}
    schema = SCHEMA.with_metadata(metadata)
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, schema) as writer:
        writer.write_batch(index.batch.replace_schema_metadata(metadata))
    seal_file(path)
    flush(path)


def _open_local(path: Path, cache_dir: str | None, *, again: bool) -> ClipIndex:
    if path.stat().st_size <= SMALL_BYTES:
        data = path.read_bytes()
        verify_bytes(data)
        return _open(data)
    verify_file(path, cache_dir, again=again)
    return _open(path)


def _open(source: bytes | Path) -> ClipIndex:
    """Open a verified index, mapped or in memory."""
    file = pa.BufferReader(source) if isinstance(source, bytes) else pa.memory_map(str(source))
    reader = pa.ipc.open_file(file)
    if not reader.schema.equals(SCHEMA) or reader.num_record_batches != 1:
        raise ValueError("its columns are not those of an index")
    index = ClipIndex(reader.get_batch(0), reader.schema.metadata[_FINGERPRINT].decode())
    for shard in index.shards:
        _check_shard(shard)
    return index


def _remove_old(fs: FileSystem, root: str) -> None:
    if fs.exists(f"{root}/{OLD_INDEX_NAME}"):
        fs.rm_file(f"{root}/{OLD_INDEX_NAME}")


def _read_old(fs: FileSystem, root: str, url: str, absent: Exception) -> ClipIndex:
    """Read the index of an older version, after the current one was found to be absent."""
    name = f"{url.rstrip('/')}/{OLD_INDEX_NAME}"
    try:
        data = read_bytes(fs, f"{root}/{OLD_INDEX_NAME}", name)
    except ABSENT:
        # An object store says here that the bucket is missing; others repeat the path.
        said = "" if INDEX_NAME in str(absent) else f" ({absent})"
        names_shards = url.endswith(".tar") or "{" in url
        way_out = "name the folder of a data set" if names_shards else "check the path"
        raise UserError(
            f"{url.rstrip('/')}/{INDEX_NAME}: there is no index{said}; {way_out}, or make one with "
            "`prioritycut shard`"
        ) from None
    return build_index(read_old_clips(data, name))


# ---------------------------------------------------------------------------------------------
# Parts of an index
# ---------------------------------------------------------------------------------------------


def clips_of(index: ClipIndex, split: str) -> Clips:
    """Return the clips of one split.

    Raises:
        UserError: there are none; the message names the splits that exist.
    """
    clips = index.clips_of(split)
    if not clips:
        raise UserError(f"split {split!r} has no clips: choose one of {', '.join(index.splits)}")
    return clips


def were_seen(clips: Clips, earlier: ClipIndex) -> NDArray[np.bool_]:
    """Return for each clip whether an earlier index lists it, with the same bytes.

    Args:
        clips: consecutive rows.
        earlier: the other index.
    """
    seen = np.zeros(len(clips), np.bool_)
    mine, theirs = clips.values("sha256"), earlier.values("sha256")
    my_keys, their_keys = clips.keys(), earlier.batch.column("key")
    # Clips whose checksums begin alike are compared at a time: a table of all keys takes gigabytes.
    parts = 1 + len(earlier) // _KEYS_AT_ONCE
    for part in range(parts):
        of_mine, of_theirs = (
            np.flatnonzero((sums[:, 0] | sums[:, 1].astype(np.uint16) << 8) % parts == part)
            for sums in (mine, theirs)
        )
        found = pc.index_in(my_keys.take(of_mine), value_set=their_keys.take(of_theirs))
        place = found.fill_null(-1).to_numpy()
        here, there = of_mine[place >= 0], of_theirs[place[place >= 0]]
        seen[here] = (mine[here] == theirs[there]).all(axis=1)
    return seen
