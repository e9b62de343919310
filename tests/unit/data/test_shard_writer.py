"""Shards are readable by stock webdataset, have exact offsets, and never appear half-written."""

import hashlib
import io
import json
import os
import tarfile
from pathlib import Path

import pytest
import webdataset
from hypothesis import given
from hypothesis import strategies as st

from prioritycut_ray.data.index import read_index
from prioritycut_ray.data.shard_writer import LONGEST_KEY, ShardWriter, make_keys
from prioritycut_ray.data.shards import read_clip
from prioritycut_ray.errors import UserError
from tests.clip_sets import files_below, random_member, write_random


@pytest.fixture
def folder(tmp_path: Path) -> str:
    write_random(str(tmp_path / "set"), [0, 1, 2, 3, 4])
    return str(tmp_path / "set")


# webdataset leaves its files to the garbage collector.
@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_stock_webdataset_reads_the_shards(folder: str) -> None:
    tars = sorted(str(path) for path in Path(folder).glob("*.tar"))
    samples = list(webdataset.WebDataset(tars, shardshuffle=False))
    assert [sample["__key__"] for sample in samples] == [f"clip{n}" for n in range(5)]
    for number, sample in enumerate(samples):
        assert sample["mp4"] == random_member(number).data
        facts = json.loads(sample["json"])
        assert facts["original"] == f"clip{number}.MOV"
        assert facts["identity"] == f"person {number}"


def test_shards_are_plain_ustar_archives(tmp_path: Path) -> None:
    """The same bytes as those of the standard library: constant owner, mode and time."""
    [clip] = write_random(str(tmp_path / "set"), [0]).clips
    expected = io.BytesIO()
    with tarfile.open(tmp_path / "set" / clip.shard) as shard:
        members = [(info.name, shard.extractfile(info)) for info in shard]
        with tarfile.open(fileobj=expected, mode="w", format=tarfile.USTAR_FORMAT) as tar:
            for name, file in members:
                assert file is not None
                info = tarfile.TarInfo(name)
                info.size = len(data := file.read())
                tar.addfile(info, io.BytesIO(data))
    assert [name for name, _ in members] == ["clip0.mp4", "clip0.json"]
    assert (tmp_path / "set" / clip.shard).read_bytes() == expected.getvalue()


def test_same_clips_make_the_same_files(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_random(str(tmp_path / name), [0, 1, 2])
    for file in files_below(tmp_path / "a"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


@pytest.mark.parametrize("added", [0, 1, 3, 4])
def test_failure_in_the_middle_leaves_nothing(tmp_path: Path, added: int) -> None:
    def fail() -> None:
        with ShardWriter(str(tmp_path / "set"), 10_000) as writer:
            for number in range(added):
                writer.add(random_member(number))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert files_below(tmp_path / "set") == []


def test_files_get_their_name_when_complete(tmp_path: Path) -> None:
    with ShardWriter(str(tmp_path), 10_000) as writer:
        for number in range(6):
            writer.add(random_member(number))
            shown = [path for path in tmp_path.iterdir() if not path.name.startswith(".")]
            for path in shown:
                with tarfile.open(path) as tar:
                    assert len(tar.getmembers()) == 6
            assert len(shown) == (number + 1) // 3
        writer.finish({f"clip{number}": "train" for number in range(6)})
    assert files_below(tmp_path) == ["index.arrow", "shard-000000.tar", "shard-000001.tar"]


def test_killed_writer_leaves_no_index(tmp_path: Path) -> None:
    """A process that dies has no time to tidy up; what it leaves must not pass for a data set."""
    child = os.fork()
    if child == 0:
        writer = ShardWriter(str(tmp_path), 10_000)
        for number in range(5):
            writer.add(random_member(number))
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
        writer.add(random_member(0)._replace(key=key))
        [clip] = writer.finish({key: "train"}).clips
    with tarfile.open(tmp_path / clip.shard) as tar:
        assert tar.getmembers()[0].offset_data == clip.offset
    assert hashlib.sha256(read_clip(str(tmp_path), clip)).hexdigest() == clip.sha256
    assert io.BytesIO(read_clip(str(tmp_path), clip)).read() == random_member(0).data
