"""Clips are found by their bytes and checked; damaged shards and indexes are named."""

import os
import shutil
from pathlib import Path

import pytest
from fsspec.implementations.memory import MemoryFileSystem

from prioritycut_ray.data.index import build_index, read_index
from prioritycut_ray.data.shards import ShardError, read_clip
from prioritycut_ray.errors import UserError
from tests.clip_sets import files_below, random_member, write_random
from tests.places import BAD


@pytest.fixture
def folder(tmp_path: Path) -> str:
    write_random(str(tmp_path / "set"), [0, 1, 2, 3, 4])
    return str(tmp_path / "set")


@pytest.mark.parametrize("slash", ["", "/"])
def test_clips_come_back(folder: str, slash: str) -> None:
    index = read_index(folder + slash)
    assert [clip.key for clip in index.clips] == [f"clip{n}" for n in range(5)]
    assert {clip.shard for clip in index.clips} == {"shard-000000.tar", "shard-000001.tar"}
    for number, clip in enumerate(index.clips):
        assert read_clip(folder + slash, clip) == random_member(number).data
        assert (clip.frames, clip.identity) == (10 + number, f"person {number}")
    assert files_below(Path(folder)) == ["index.arrow", "shard-000000.tar", "shard-000001.tar"]


def test_any_file_system_works() -> None:
    MemoryFileSystem.store.clear()
    written = write_random("memory://bucket/set", [0, 1, 2, 3, 4])
    assert read_index("memory://bucket/set") == written
    for number, clip in enumerate(written.clips):
        assert read_clip("memory://bucket/set", clip) == random_member(number).data
    names = sorted(os.path.basename(path) for path in MemoryFileSystem.store)
    assert names == ["index.arrow", "shard-000000.tar", "shard-000001.tar"]
    MemoryFileSystem.store.clear()


def test_unknown_scheme_is_refused() -> None:
    with pytest.raises(UserError, match=r"nowhere://x: cannot be reached"):
        read_index("nowhere://x")


def test_fingerprint_depends_on_the_clips_and_not_on_the_layout(tmp_path: Path) -> None:
    one = write_random(str(tmp_path / "one"), [0, 1, 2], shard_bytes=1)
    other = write_random(str(tmp_path / "other"), [2, 0, 1], shard_bytes=1_000_000)
    assert {clip.shard for clip in one.clips} != {clip.shard for clip in other.clips}
    assert one.fingerprint == other.fingerprint
    assert write_random(str(tmp_path / "less"), [0, 1]).fingerprint != one.fingerprint
    for change in ({"split": "x"}, {"identity": "x"}, {"frames": 99}, {"sha256": "1" * 64}):
        changed = [one.clips[0]._replace(**change), *one.clips[1:]]
        assert build_index(changed).fingerprint != one.fingerprint


# ---------------------------------------------------------------------------------------------
# Damage
# ---------------------------------------------------------------------------------------------


def test_altered_clip_is_named_by_shard_and_key(folder: str) -> None:
    clip = read_index(folder).clips[2]
    shard = Path(folder, clip.shard)
    data = bytearray(shard.read_bytes())
    data[clip.offset + 1500] ^= 1
    shard.write_bytes(data)
    with pytest.raises(ShardError, match=rf"{clip.shard}: clip 'clip2': the checksum"):
        read_clip(folder, clip)
    assert read_clip(folder, read_index(folder).clips[1]) == random_member(1).data


def test_cut_off_and_missing_shards_are_named(folder: str) -> None:
    clip = read_index(folder).clips[2]
    shard = Path(folder, clip.shard)
    os.truncate(shard, clip.offset + 1000)
    with pytest.raises(ShardError, match="cut off after 1000 of 3000 bytes"):
        read_clip(folder, clip)
    os.truncate(shard, clip.offset - 100)
    with pytest.raises(ShardError, match="cut off after 0 of 3000 bytes"):
        read_clip(folder, clip)
    shard.unlink()
    with pytest.raises(ShardError, match=rf"{clip.shard}.*the shard is missing"):
        read_clip(folder, clip)


@pytest.mark.skipif(not BAD.exists(), reason="needs ../shared/data/bad")
@pytest.mark.parametrize("name", sorted(path.name for path in BAD.glob("*.tar")))
def test_foreign_tar_in_place_of_a_shard_is_refused(name: str, folder: str) -> None:
    before = files_below(Path(folder).parent)
    clip = read_index(folder).clips[0]
    Path(folder, clip.shard).unlink()
    shutil.copyfile(BAD / name, Path(folder, clip.shard))
    with pytest.raises(ShardError, match="clip 'clip0'"):
        read_clip(folder, clip)
    assert files_below(Path(folder).parent) == before


def test_missing_index_says_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"index\.arrow: there is no index.*prioritycut shard"):
        read_index(str(tmp_path))
    with pytest.raises(UserError, match="there is no index"):
        read_index(str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match=r"no index; name the folder of a data set, or make one"):
        read_index(str(tmp_path / "shard-{000000..000003}.tar"))
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="there is no index"):
        read_index(str(tmp_path / "file"))
