"""The shard format: found by bytes, checked, readable by stock webdataset, never half there."""

import hashlib
import io
import json
import os
import shutil
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset
from fsspec.implementations.memory import MemoryFileSystem
from hypothesis import given
from hypothesis import strategies as st

from prioritycut_ray.data.shards import (
    LONGEST_KEY,
    ClipIndex,
    Member,
    ShardError,
    ShardWriter,
    clips_of,
    fingerprint,
    make_keys,
    read_clip,
    read_index,
)
from prioritycut_ray.errors import UserError
from tests.places import BAD


def member(number: int, size: int = 3000) -> Member:
    return Member(
        key=f"clip{number}",
        data=np.random.default_rng(number).bytes(size),
        frames=10 + number,
        fps=25.0,
        width=64,
        height=64,
        identity=f"person {number}",
        original=f"clip{number}.MOV",
        variable_rate=False,
    )


def write(url: str, numbers: list[int], shard_bytes: int = 10_000) -> ClipIndex:
    with ShardWriter(url, shard_bytes) as writer:
        for number in numbers:
            writer.add(member(number))
        return writer.finish({f"clip{n}": "test" if n == 0 else "train" for n in numbers})


@pytest.fixture
def folder(tmp_path: Path) -> str:
    write(str(tmp_path / "set"), [0, 1, 2, 3, 4])
    return str(tmp_path / "set")


def files_below(path: Path) -> list[str]:
    return sorted(str(p.relative_to(path)) for p in path.rglob("*"))


@pytest.mark.parametrize("slash", ["", "/"])
def test_clips_come_back(folder: str, slash: str) -> None:
    index = read_index(folder + slash)
    assert [clip.key for clip in index.clips] == [f"clip{n}" for n in range(5)]
    assert {clip.shard for clip in index.clips} == {"shard-000000.tar", "shard-000001.tar"}
    for number, clip in enumerate(index.clips):
        assert read_clip(folder + slash, clip) == member(number).data
        assert (clip.frames, clip.identity) == (10 + number, f"person {number}")
    assert files_below(Path(folder)) == ["index.json", "shard-000000.tar", "shard-000001.tar"]


def test_any_file_system_will_do() -> None:
    MemoryFileSystem.store.clear()
    written = write("memory://bucket/set", [0, 1, 2, 3, 4])
    assert read_index("memory://bucket/set") == written
    for number, clip in enumerate(written.clips):
        assert read_clip("memory://bucket/set", clip) == member(number).data
    names = sorted(os.path.basename(path) for path in MemoryFileSystem.store)
    assert names == ["index.json", "shard-000000.tar", "shard-000001.tar"]
    MemoryFileSystem.store.clear()


def test_unknown_scheme_is_refused() -> None:
    with pytest.raises(UserError, match=r"nowhere://x: cannot be reached"):
        read_index("nowhere://x")


# webdataset leaves its files to the garbage collector.
@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_stock_webdataset_reads_the_shards(folder: str) -> None:
    tars = sorted(str(path) for path in Path(folder).glob("*.tar"))
    samples = list(webdataset.WebDataset(tars, shardshuffle=False))
    assert [sample["__key__"] for sample in samples] == [f"clip{n}" for n in range(5)]
    for number, sample in enumerate(samples):
        assert sample["mp4"] == member(number).data
        facts = json.loads(sample["json"])
        assert facts["original"] == f"clip{number}.MOV"
        assert facts["identity"] == f"person {number}"


def test_same_clips_make_the_same_files(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write(str(tmp_path / name), [0, 1, 2])
    for file in files_below(tmp_path / "a"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_fingerprint_is_of_the_clips_and_not_of_the_layout(tmp_path: Path) -> None:
    one = write(str(tmp_path / "one"), [0, 1, 2], shard_bytes=1)
    other = write(str(tmp_path / "other"), [2, 0, 1], shard_bytes=1_000_000)
    assert {clip.shard for clip in one.clips} != {clip.shard for clip in other.clips}
    assert one.fingerprint == other.fingerprint
    assert write(str(tmp_path / "less"), [0, 1]).fingerprint != one.fingerprint
    for change in ({"split": "x"}, {"identity": "x"}, {"frames": 99}, {"sha256": "0" * 64}):
        changed = [one.clips[0].model_copy(update=change), *one.clips[1:]]
        assert fingerprint(changed) != one.fingerprint


# ---------------------------------------------------------------------------------------------
# Damage
# ---------------------------------------------------------------------------------------------


def test_altered_clip_is_told_by_shard_and_key(folder: str) -> None:
    clip = read_index(folder).clips[2]
    shard = Path(folder, clip.shard)
    data = bytearray(shard.read_bytes())
    data[clip.offset + 1500] ^= 1
    shard.write_bytes(data)
    with pytest.raises(ShardError, match=rf"{clip.shard}: clip 'clip2': the checksum"):
        read_clip(folder, clip)
    assert read_clip(folder, read_index(folder).clips[1]) == member(1).data


def test_cut_off_and_missing_shards_are_told(folder: str) -> None:
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
def test_foreign_tar_in_the_place_of_a_shard_is_refused(name: str, folder: str) -> None:
    before = files_below(Path(folder).parent)
    clip = read_index(folder).clips[0]
    Path(folder, clip.shard).unlink()
    shutil.copyfile(BAD / name, Path(folder, clip.shard))
    with pytest.raises(ShardError, match="clip 'clip0'"):
        read_clip(folder, clip)
    assert files_below(Path(folder).parent) == before


def test_missing_index_says_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"index\.json: there is no index.*prioritycut shard"):
        read_index(str(tmp_path))
    with pytest.raises(UserError, match="there is no index"):
        read_index(str(tmp_path / "nowhere"))
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="there is no index"):
        read_index(str(tmp_path / "file"))


def damaged_index(text: str, how: str) -> bytes:
    index: dict[str, Any] = json.loads(text)
    clip = index["clips"][0]
    match how:
        case "empty":
            return b""
        case "cut off":
            return text[: len(text) // 2].encode()
        case "no text":
            return b"\xff\xfe\x00"
        case "other format":
            index["format"] = 2
        case "key missing":
            del clip["sha256"]
        case "key too many":
            clip["mood"] = "good"
        case "no clips":
            index["clips"] = []
        case "twice":
            index["clips"].append(clip)
        case "elsewhere":
            clip["shard"] = "../../etc/passwd"
        case "negative":
            clip["offset"] = -1
        case "edited":
            clip["split"] = "train"
    return json.dumps(index).encode()


@pytest.mark.parametrize(
    "how",
    [
        *("empty", "cut off", "no text", "other format", "key missing", "key too many"),
        *("no clips", "twice", "elsewhere", "negative", "edited"),
    ],
)
def test_damaged_index_is_refused_in_one_line(folder: str, how: str) -> None:
    path = Path(folder, "index.json")
    path.write_bytes(damaged_index(path.read_text(), how))
    with pytest.raises(
        UserError, match=r"index\.json: the index is damaged.*prioritycut shard"
    ) as e:
        read_index(folder)
    assert "\n" not in str(e.value)


def test_splits_are_chosen_by_name(folder: str) -> None:
    index = read_index(folder)
    assert [clip.key for clip in clips_of(index, "test")] == ["clip0"]
    assert len(clips_of(index, "train")) == 4
    with pytest.raises(UserError, match="'val' has no clips: choose one of test, train"):
        clips_of(index, "val")


# ---------------------------------------------------------------------------------------------
# Unfinished writing
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("added", [0, 1, 3, 4])
def test_failure_in_the_middle_leaves_nothing(tmp_path: Path, added: int) -> None:
    def fail() -> None:
        with ShardWriter(str(tmp_path / "set"), 10_000) as writer:
            for number in range(added):
                writer.add(member(number))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert files_below(tmp_path / "set") == []


def test_no_file_has_its_name_before_it_is_whole(tmp_path: Path) -> None:
    with ShardWriter(str(tmp_path), 10_000) as writer:
        for number in range(6):
            writer.add(member(number))
            shown = [path for path in tmp_path.iterdir() if not path.name.startswith(".")]
            for path in shown:
                with tarfile.open(path) as tar:
                    assert len(tar.getmembers()) == 6
            assert len(shown) == (number + 1) // 3
        writer.finish({f"clip{number}": "train" for number in range(6)})
    assert files_below(tmp_path) == ["index.json", "shard-000000.tar", "shard-000001.tar"]


def test_killed_writer_leaves_no_index(tmp_path: Path) -> None:
    """A process that dies has no time to tidy up; what it leaves must not pass for a data set."""
    child = os.fork()
    if child == 0:
        writer = ShardWriter(str(tmp_path), 10_000)
        for number in range(5):
            writer.add(member(number))
        os._exit(9)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    assert "shard-000000.tar" in files_below(tmp_path)
    with pytest.raises(UserError, match="there is no index"):
        read_index(str(tmp_path))


# ---------------------------------------------------------------------------------------------
# Keys
# ---------------------------------------------------------------------------------------------


def test_plain_names_are_their_own_keys() -> None:
    assert make_keys(["id10001-7", "clip_2", "a"]) == ["id10001-7", "clip_2", "a"]


def test_other_names_stay_readable() -> None:
    names = ["UPPER.CASE.v2", "ünï cödé name #1 (copy)", "-dash", "id1/clip", "視頻", "../../x"]
    stems = [key.rsplit("-", 1)[0] for key in make_keys(names)]
    assert stems == ["UPPER-CASE-v2", "uni-code-name-1-copy", "dash", "id1-clip", "clip", "x"]


def test_equal_names_are_numbered() -> None:
    assert make_keys(["a", "a-2", "a", "a"]) == ["a", "a-2", "a-3", "a-4"]


@given(st.lists(st.one_of(st.text(max_size=90), st.sampled_from(["a", "a-2", "a.", "-a", "Ä"]))))
def test_keys_are_unique_and_survive_webdataset(names: list[str]) -> None:
    keys = make_keys(names)
    assert len(set(keys)) == len(names)
    assert make_keys(names) == keys
    for key in keys:
        assert webdataset.tariterators.base_plus_ext(f"{key}.mp4") == (key, "mp4")
        assert key.isascii()
        assert key.replace("-", "").replace("_", "").isalnum()
        assert len(key) <= LONGEST_KEY + 20


def test_strangest_key_is_found_by_its_offset(tmp_path: Path) -> None:
    [key] = make_keys(["x" * 500])
    with ShardWriter(str(tmp_path)) as writer:
        writer.add(member(0)._replace(key=key))
        [clip] = writer.finish({key: "train"}).clips
    with tarfile.open(tmp_path / clip.shard) as tar:
        assert tar.getmembers()[0].offset_data == clip.offset
    assert hashlib.sha256(read_clip(str(tmp_path), clip)).hexdigest() == clip.sha256
    assert io.BytesIO(read_clip(str(tmp_path), clip)).read() == member(0).data
