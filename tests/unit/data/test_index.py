"""An index is mapped, sealed, and the same for the same clips; old ones are read and upgraded."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from prioritycut_ray.data import index_files
from prioritycut_ray.data.index import (
    build_index,
    clips_of,
    read_index,
    upgrade_index,
    were_seen,
    write_index,
)
from prioritycut_ray.data.shards import Clip, read_clip
from prioritycut_ray.errors import UserError
from tests.clip_sets import as_packed, files_below, make_old, random_member, write_random


@pytest.fixture
def folder(tmp_path: Path) -> str:
    write_random(str(tmp_path / "set"), [0, 1, 2, 3, 4])
    return str(tmp_path / "set")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of this machine, for which every index is a large one."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(index_files, "SMALL_BYTES", 1000)
    monkeypatch.setattr("prioritycut_ray.data.index.SMALL_BYTES", 1000)
    return tmp_path / "cache/prioritycut/indexes"


def clip(number: int, **changes: Any) -> Clip:
    clip = Clip(
        key=f"clip{number}",
        shard="shard-000000.tar",
        offset=1000 * number,
        size=500,
        sha256=hashlib.sha256(b"%d" % number).hexdigest(),
        frames=10,
        fps=29.97,
        width=64,
        height=64,
        identity=f"person {number % 3}",
        split="train",
    )
    return clip._replace(**changes)


# ---------------------------------------------------------------------------------------------
# What it holds
# ---------------------------------------------------------------------------------------------


def test_clips_come_back_as_they_are_sorted_by_split_identity_and_key(tmp_path: Path) -> None:
    clips = [
        clip(5),
        clip(0, sha256="", extra='{"member": "a.b.mp4"}', shard="s3://bucket/x/part 1.tar"),
        clip(3, identity="Zoë", split="test"),
        clip(2, shard="/data/others.tar", fps=1 / 3, offset=1 << 40),
        clip(4, identity=""),
    ]
    write_index(build_index(clips), str(tmp_path))
    index = read_index(str(tmp_path))
    assert [*index.clips] == sorted(clips, key=lambda c: (c.split, c.identity, c.key))
    assert index.splits == ["test", "train"]
    assert index.shards == ["/data/others.tar", "s3://bucket/x/part 1.tar", "shard-000000.tar"]
    assert [c.key for c in index.clips[1:3]] == [c.key for c in index.clips][1:3]
    assert index.clips[-1] == index.clips[4]
    with pytest.raises(IndexError):
        index.clips[5]


def test_any_table_reader_can_read_it(folder: str) -> None:
    with pa.memory_map(f"{folder}/index.arrow") as file:
        rows = pa.ipc.open_file(file).read_all().to_pylist()
    assert [row["key"] for row in rows] == [c.key for c in read_index(folder).clips]
    assert {row["split"] for row in rows} == {"train", "test"}


def test_the_fingerprint_is_that_of_the_same_clips_in_any_layout() -> None:
    clips = [clip(number) for number in range(9)]
    index = build_index(clips)
    assert index.fingerprint.startswith("v2-")
    moved = [c._replace(shard="shard-000007.tar", offset=c.offset + 5) for c in clips[::-1]]
    assert build_index(moved).fingerprint == index.fingerprint
    assert build_index(clips[4:], build_index(clips[:4])) == index
    changes: list[dict[str, Any]] = [
        {"key": "other"},
        {"sha256": "1" * 64},
        {"frames": 11},
        {"identity": "x"},
        {"split": "x"},
    ]
    others = {build_index([clips[0]._replace(**c), *clips[1:]]).fingerprint for c in changes}
    assert len(others | {index.fingerprint}) == 6
    # Not one string that moves from one name to the next.
    one, two = (build_index([clip(0, identity=a, split=b)]) for a, b in (("ab", "c"), ("a", "bc")))
    assert one.fingerprint != two.fingerprint


def test_the_fingerprint_is_stable() -> None:
    """Runs store it: it may only change together with its version."""
    expected = "v2-51693b036726786c91297ef9059f722d1a558c427d059684f160fde10f81da7b"
    assert build_index([clip(number) for number in range(3)]).fingerprint == expected


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"key": "a/b"}, "'a/b': the key has other characters"),
        ({"key": ""}, "the key has other characters"),
        ({"key": "clip1"}, "two clips have the same key 'clip1'"),
        ({"shard": "../../etc/passwd"}, "'../../etc/passwd' is neither"),
        ({"offset": -1}, "'clip0': offset is negative"),
        ({"size": 0}, "'clip0': size is not positive"),
        ({"frames": 0}, "frames is not positive"),
        ({"fps": float("nan")}, "fps is not positive"),
    ],
)
def test_what_cannot_be_a_clip_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_index([clip(0, **changes), clip(1)])
    with pytest.raises(ValueError, match="there are no clips"):
        build_index([])


def test_splits_are_chosen_by_name(folder: str) -> None:
    index = read_index(folder)
    assert [clip.key for clip in clips_of(index, "test")] == ["clip0"]
    assert len(clips_of(index, "train")) == 4
    with pytest.raises(UserError, match="'val' has no clips: choose one of test, train"):
        clips_of(index, "val")


def test_identities_of_splits_are_found() -> None:
    index = build_index([clip(0), clip(1, split="test"), clip(3), clip(4, split="val"), clip(5)])
    assert index.splits_of_identities() == {
        "person 0": ["train"],
        "person 1": ["test", "val"],
        "person 2": ["train"],
    }
    assert index.shared_identities() == ["person 1"]


def test_a_clip_was_seen_if_an_earlier_index_has_its_key_and_bytes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clips = [clip(number) for number in range(200)]
    index = build_index(clips)
    altered = [c._replace(sha256="0" * 63 + "1") for c in clips[:20]]
    renamed = [c._replace(key=f"other{c.offset}") for c in clips[20:40]]
    earlier = build_index([*altered, *renamed, *clips[60:]])
    expected = [int(c.key[4:]) >= 60 for c in index.clips]
    assert were_seen(index.clips, earlier).tolist() == expected
    monkeypatch.setattr("prioritycut_ray.data.index._KEYS_AT_ONCE", 30)
    assert were_seen(index.clips, earlier).tolist() == expected, "in parts"
    assert were_seen(index.clips[5:50], earlier).tolist() == expected[5:50]


# ---------------------------------------------------------------------------------------------
# The file
# ---------------------------------------------------------------------------------------------


def test_the_same_clips_give_the_same_bytes(tmp_path: Path) -> None:
    clips = [clip(number) for number in range(50)]
    for name, order in (("a", clips), ("b", clips[::-1])):
        write_index(build_index(order), str(tmp_path / name))
    assert (tmp_path / "a/index.arrow").read_bytes() == (tmp_path / "b/index.arrow").read_bytes()
    assert files_below(tmp_path / "a") == ["index.arrow"]


def test_every_altered_byte_is_noticed(folder: str) -> None:
    path = Path(folder, "index.arrow")
    whole = path.read_bytes()
    for place in [*range(0, len(whole), 97), len(whole) - 1]:
        altered = bytearray(whole)
        altered[place] ^= 1
        path.write_bytes(altered)
        with pytest.raises(UserError, match=r"index\.arrow: the index is damaged|format") as caught:
            read_index(folder)
        assert "\n" not in str(caught.value)
    path.write_bytes(whole)
    assert len(read_index(folder)) == 5


@pytest.mark.parametrize("content", [b"", b"\xff\xfe\x00", b"{}", "half"])
def test_a_damaged_index_is_refused_in_one_line(folder: str, content: bytes | str) -> None:
    path = Path(folder, "index.arrow")
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2] if isinstance(content, str) else content)
    with pytest.raises(UserError, match=r"index\.arrow: the index is damaged.*prioritycut shard"):
        read_index(folder)


def test_a_newer_format_is_named(folder: str) -> None:
    path = Path(folder, "index.arrow")
    path.write_bytes(path.read_bytes().replace(b"prioritycut index 2,", b"prioritycut index 3,"))
    with pytest.raises(UserError, match=r"index of format 3 .* which reads 2; upgrade"):
        read_index(folder)


def test_a_large_index_is_mapped_and_verified_once(folder: str, cache: Path) -> None:
    path = Path(folder, "index.arrow")
    before = pa.total_allocated_bytes()
    index = read_index(folder)
    assert pa.total_allocated_bytes() == before, "no column is copied"
    assert [c.key for c in as_packed(index)] == [f"clip{number}" for number in range(5)]
    maps = Path("/proc/self/maps").read_text()
    assert str(path) in maps, "it is mapped, not read"
    assert len(list(cache.glob("*.verified"))) == 1
    # A second process trusts the note, unless the file is another one or it is told not to.
    whole, status = path.read_bytes(), path.stat()
    altered = bytearray(whole)
    altered[whole.index(b"clip3")] ^= 1
    path.write_bytes(altered)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert len(read_index(folder)) == 5
    with pytest.raises(UserError, match="the index is damaged"):
        read_index(folder, again=True)
    os.utime(path)
    with pytest.raises(UserError, match="the index is damaged"):
        read_index(folder)


def test_writing_a_large_index_notes_that_it_is_intact(tmp_path: Path, cache: Path) -> None:
    write_index(build_index([clip(number) for number in range(50)]), str(tmp_path / "set"))
    assert len(list(cache.glob("*.verified"))) == 1


def test_a_remote_index_is_fetched_once_per_machine(cache: Path) -> None:
    MemoryFileSystem.store.clear()
    written = write_random("memory://bucket/set", [0, 1, 2, 3, 4])
    assert read_index("memory://bucket/set") == written
    [copy] = cache.glob("*.arrow")
    before = copy.stat().st_ino
    assert read_index("memory://bucket/set") == written
    assert [path.stat().st_ino for path in cache.glob("*.arrow")] == [before]
    for number, found in enumerate(as_packed(written)):
        assert read_clip("memory://bucket/set", found) == random_member(number).data
    # Another version of the data set is another file.
    more = write_random("memory://bucket/set", [0, 1, 2])
    assert read_index("memory://bucket/set") == more
    assert len(list(cache.glob("*.arrow"))) == 2
    assert [*cache.glob(".*")] == []
    MemoryFileSystem.store.clear()


def test_old_copies_are_removed_from_the_cache(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(index_files, "KEPT_COPIES", 2)
    MemoryFileSystem.store.clear()
    for count in (2, 3, 4, 5):
        index = write_random("memory://bucket/set", list(range(count)))
        opened = read_index("memory://bucket/set")
    assert len(list(cache.glob("*.arrow"))) == 2
    assert opened == index, "the last one is there"
    MemoryFileSystem.store.clear()


def test_a_damaged_remote_index_is_not_cached(cache: Path) -> None:
    MemoryFileSystem.store.clear()
    write_random("memory://bucket/set", [0, 1, 2, 3, 4])
    fs = MemoryFileSystem()
    data = bytearray(fs.cat_file("/bucket/set/index.arrow"))
    data[data.index(b"clip3")] ^= 1
    fs.pipe_file("/bucket/set/index.arrow", bytes(data))
    with pytest.raises(UserError, match="the index is damaged"):
        read_index("memory://bucket/set")
    assert [path for path in cache.iterdir() if path.suffix != ".lock"] == []
    MemoryFileSystem.store.clear()


def test_a_cache_that_cannot_be_used_is_named(tmp_path: Path, cache: Path) -> None:
    MemoryFileSystem.store.clear()
    write_random("memory://bucket/set", [0, 1, 2])
    (tmp_path / "file").touch()
    with pytest.raises(
        UserError, match=r"index\.arrow: the index cannot be cached .* set data\.cache_dir"
    ):
        read_index("memory://bucket/set", cache_dir=str(tmp_path / "file"))
    MemoryFileSystem.store.clear()


# ---------------------------------------------------------------------------------------------
# The index of older versions
# ---------------------------------------------------------------------------------------------


def test_an_old_index_is_read_and_upgraded(folder: str) -> None:
    expected = make_old(folder)
    assert read_index(folder) == expected
    assert upgrade_index(folder)
    assert files_below(Path(folder)) == ["index.arrow", "shard-000000.tar", "shard-000001.tar"]
    assert read_index(folder) == expected
    assert not upgrade_index(folder)
    Path(folder, "index.json").write_text("left by an upgrade that was killed")
    assert read_index(folder) == expected
    assert not upgrade_index(folder)
    assert not Path(folder, "index.json").exists()


def damaged_old_index(text: str, how: str) -> bytes:
    index: dict[str, Any] = json.loads(text)
    clip = index["clips"][0]
    match how:
        case "empty":
            return b""
        case "cut off":
            return text[: len(text) // 2].encode()
        case "other format":
            index["format"] = 3
        case "key missing":
            del clip["sha256"]
        case "no clips":
            index["clips"] = []
        case "twice":
            index["clips"].append(clip)
        case "elsewhere":
            clip["shard"] = "../../etc/passwd"
        case "edited":
            clip["split"] = "train"
    return json.dumps(index).encode()


@pytest.mark.parametrize(
    "how",
    [
        *("empty", "cut off", "other format", "key missing", "no clips", "twice", "elsewhere"),
        "edited",
    ],
)
def test_a_damaged_old_index_is_refused_in_one_line(folder: str, how: str) -> None:
    make_old(folder)
    path = Path(folder, "index.json")
    path.write_bytes(damaged_old_index(path.read_text(), how))
    for use in (read_index, upgrade_index):
        with pytest.raises(UserError, match=r"index\.json: the index is damaged.*shard") as caught:
            use(folder)
        assert "\n" not in str(caught.value)
    assert path.exists()


def test_summaries_do_not_read_rows_one_by_one() -> None:
    index = build_index([clip(number, width=64 if number else 32) for number in range(10)])
    assert index.frame_sizes() == {(32, 64), (64, 64)}
    assert index.known_checksums([clip(3).sha256, "1" * 64]) == {clip(3).sha256}
    assert sorted(index.keys()) == sorted(c.key for c in index.clips)
    assert index.values("offset").dtype == np.int64
