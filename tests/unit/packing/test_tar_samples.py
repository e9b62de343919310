"""Samples of a WebDataset shard are found by byte range, and everything unusable is named."""

import csv
import shutil
import tarfile
from pathlib import Path

import pytest
from webdataset.tariterators import group_by_keys, tar_file_expander

from prioritycut_ray.packing.inputs import find_videos
from tests.packing_inputs import (
    FACTS,
    read,
    rejected,
    write_tar,
)
from tests.places import BAD


@pytest.mark.skipif(not BAD.exists(), reason="needs ../shared/data/bad")
def test_shards_match_their_expectation(tmp_path: Path) -> None:
    table = csv.DictReader((BAD / "EXPECTED.csv").read_text(encoding="utf-8").splitlines())
    for row in (row for row in table if row["kind"] == "shard"):
        shutil.copyfile(BAD / row["file"], tmp_path / row["file"])
        found = find_videos([str(tmp_path / row["file"])])
        assert len(found.entries) == int(row["frames"].split()[0] if row["frames"] else 0)
        assert bool(found.rejected) == (row["verdict"] != "accept"), row["file"]
        assert all(row["file"] in item.file for item in found.rejected)
        assert len({entry.name for entry in found.entries}) == len(found.entries)
        assert all(read(entry)[4:8] == b"ftyp" for entry in found.entries)


def test_samples_of_a_shard_are_found_by_byte_range(tmp_path: Path) -> None:
    members = [("a.mp4", b"one"), ("a.json", FACTS), ("d/b.x.mp4", b"no"), ("d/b.webm", b"two")]
    path = write_tar(tmp_path / "s.tar", [*members, ("d/b.json", b"{}"), ("d/b.txt", b"?")])
    entries, unusable, _ = find_videos([str(path)])
    assert unusable == []
    assert [read(entry) for entry in entries] == [b"one", b"two"]
    assert [entry.identity for entry in entries] == ["ann", "s/d/b"]
    assert [entry.by_name for entry in entries] == [False, True]
    assert [entry.name for entry in entries] == ["s/a", "s/d/b"]
    assert entries[1].shown == f"{path}/d/b.webm"
    # A folder of shards works too.
    assert find_videos([str(tmp_path)]).entries == entries


def test_names_are_divided_as_by_webdataset(tmp_path: Path) -> None:
    names = ["a.b/c.d.mp4", "a.b/c.mp4", "./e.mp4", ".mp4", "._f.mp4", "g", "H.MP4", "x/.i.mp4"]
    facts = [f"{name.removesuffix('mp4')}json" for name in names if name.endswith(".mp4")]
    members = [(name, FACTS) for name in [*names, *facts, "H.json"]]
    path = write_tar(tmp_path / "s.tar", members)
    with path.open("rb") as file:
        source = [{"url": str(path), "stream": file}]
        stock = [*group_by_keys(tar_file_expander(source))]
    found = find_videos([str(path)])
    keys = {sample["__key__"] for sample in stock if "mp4" in sample}
    assert {entry.name.removeprefix("s/") for entry in found.entries} == keys
    assert {"a.b/c", "./e", "H"} <= keys


def test_strange_members_are_named_and_the_others_used(tmp_path: Path) -> None:
    good = [("good.mp4", b"video"), ("good.json", FACTS)]
    path = write_tar(
        tmp_path / "s.tar",
        [
            ("link.mp4", b""),
            ("hard.mp4", b""),
            ("pipe.mp4", b""),
            ("sub/../../x.mp4", b"x"),
            ("list.json", b"[1]"),
            ("list.mp4", b"x"),
            ("deep.json", b"[" * 100_000),
            *good,
        ],
        **{
            "link.mp4": {"type": tarfile.SYMTYPE, "linkname": "/etc/passwd"},
            "hard.mp4": {"type": tarfile.LNKTYPE, "linkname": "good.mp4"},
            "pipe.mp4": {"type": tarfile.FIFOTYPE},
        },
    )
    found = find_videos([str(path)])
    assert [read(entry) for entry in found.entries] == [b"video"]
    reasons = rejected(path)
    assert {reasons[f"{name}.mp4"] for name in ("link", "hard", "pipe")} == {
        "is not a regular file"
    }
    assert "leads out of the archive" in reasons["x.mp4"]
    assert reasons["list.json"] == reasons["deep.json"] == "is not a JSON object"
    assert reasons["list.mp4"] == "has no usable JSON beside it"


def test_shard_cut_anywhere_gives_complete_samples_and_a_reason(tmp_path: Path) -> None:
    members = [
        (f"{n}.{kind}", data)
        for n in range(3)
        for kind, data in (("mp4", b"v" * 700), ("json", FACTS))
    ]
    whole = write_tar(tmp_path / "whole.tar", members).read_bytes()
    used = 3 * (512 + 1024 + 512 + 512)
    for length in range(1, used, 211):
        cut = tmp_path / "cut.tar"
        cut.write_bytes(whole[:length])
        entries, unusable, _ = find_videos([str(cut)])
        assert len(entries) <= length // 2048
        assert all(read(entry) == b"v" * 700 for entry in entries)
        assert any(item.file == str(cut) for item in unusable)


@pytest.mark.parametrize("damage", [b"\xff" * 100, b"\0" * 512], ids=["altered", "zeros"])
def test_a_damaged_header_in_the_middle_is_named(damage: bytes, tmp_path: Path) -> None:
    pairs = [[(f"{n}.mp4", b"v" * 700), (f"{n}.json", FACTS)] for n in range(4)]
    path = write_tar(tmp_path / "s.tar", [member for pair in pairs for member in pair])
    data = bytearray(path.read_bytes())
    place = 2 * (512 + 1024 + 512 + 512)
    data[place : place + len(damage)] = damage
    path.write_bytes(data)
    entries, unusable, _ = find_videos([str(path)])
    assert [entry.member for entry in entries] == ["0.mp4", "1.mp4"]
    [item] = unusable
    assert "is damaged, or several tars joined: nothing after byte 5,120" in item.reason


def test_joined_tars_are_named(tmp_path: Path) -> None:
    one = write_tar(tmp_path / "s.tar", [("a.mp4", b"x"), ("a.json", FACTS)])
    one.write_bytes(one.read_bytes() * 2)
    entries, [item], _ = find_videos([str(one)])
    assert len(entries) == 1
    assert "several tars joined" in item.reason


@pytest.mark.parametrize("data", [b"", b"<html>", b"\0" * 700, b"\x1f\x8b" + b"x" * 900])
def test_files_that_are_not_tars_are_named(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "s.tar").write_bytes(data)
    entries, [item], _ = find_videos([str(tmp_path / "s.tar")])
    assert entries == []
    assert item.reason in ("is not a tar archive", "contains no samples") or "(gzip)" in item.reason
