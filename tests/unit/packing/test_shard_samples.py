"""Shards of others are listed as webdataset reads them, and what is lost is named."""

import gzip
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset
from webdataset.tariterators import group_by_keys, tar_file_expander

from prioritycut_ray.errors import UserError
from prioritycut_ray.packing.entries import Entry, Rejected
from prioritycut_ray.packing.shard_inputs import find_shards
from prioritycut_ray.packing.shard_samples import (
    IndexedSample,
    ShardOptions,
    ShardOutcome,
    check_shard,
    list_samples,
)
from prioritycut_ray.packing.tar_members import NoTar
from prioritycut_ray.video.encoding import write_video
from tests.packing_inputs import FACTS, touched, write_tar
from tests.places import BAD

PLAIN = ShardOptions("mp4", "json", False)
SAMPLE = 512 + 1024 + 512 + 512
"""Bytes of a sample in a tar: two headers, a video of 700 bytes, a short JSON object."""


def entry(path: Path) -> Entry:
    [shard] = find_shards([str(path)])
    return shard


def listed(path: Path, options: ShardOptions = PLAIN) -> tuple[list[IndexedSample], dict[str, str]]:
    rejected: list[Rejected] = []
    samples = list_samples(entry(path), options, rejected)
    return samples, {
        item.file.removeprefix(f"{path}").lstrip("/"): item.reason for item in rejected
    }


def stock_samples(path: Path) -> list[dict[str, Any]]:
    # Its WebDataset reads in the same way, but leaves the files open.
    with path.open("rb") as file:
        return [*group_by_keys(tar_file_expander([{"url": str(path), "stream": file}]))]


def pairs(count: int) -> list[tuple[str, bytes]]:
    kinds = (("mp4", b"v" * 700), ("json", FACTS))
    return [(f"{n}.{kind}", data) for n in range(count) for kind, data in kinds]


def video(path: Path, count: int = 6, height: int = 64, width: int = 64, **how: Any) -> bytes:
    frames = []
    for index in range(count):
        frame = np.full((height, width, 3), 60, np.uint8)
        frame[10:30, 2 * index : 2 * index + 20] = (200, 80, 40)
        frames.append(frame)
    write_video(path, frames, 25.0, **how)
    return path.read_bytes()


# ---------------------------------------------------------------------------------------------
# Which samples are there
# ---------------------------------------------------------------------------------------------


def test_samples_and_bytes_are_those_of_webdataset(tmp_path: Path) -> None:
    """Written by its ShardWriter, listed here, and compared with what its own iteration reads."""
    with webdataset.ShardWriter(f"{tmp_path}/s-%06d.tar", maxcount=3, verbose=0) as writer:
        for number in range(7):
            writer.write(
                {
                    "__key__": f"vox/id{number % 2}#clip{number:03}",
                    "mp4": bytes([number]) * (600 + number),
                    "face.mp4": b"another" * (number + 1),
                    "json": {"identity": f"id{number % 2}", "split": "train", "fps": 25},
                    "txt": "no clip",
                }
            )
    for options in (PLAIN, PLAIN._replace(video="face.mp4")):
        found = {}
        for shard in find_shards([f"{tmp_path}/s-{{000000..000002}}.tar"]):
            rejected: list[Rejected] = []
            for sample in list_samples(shard, options, rejected):
                data = Path(shard.source).read_bytes()
                found[sample.key] = data[sample.offset : sample.offset + sample.size]
                assert (sample.identity, sample.split) == (sample.key[4:7], "train")
            assert rejected == []
        assert found == {
            sample["__key__"]: sample[options.video]
            for path in sorted(tmp_path.glob("*.tar"))
            for sample in stock_samples(path)
        }
        assert len(found) == 7


def test_names_are_divided_at_the_first_dot(tmp_path: Path) -> None:
    names = ["a.b/c.MP4", "a.b/c.json", "d.left.mp4", "d.json", "H.mp4", "H.Json"]
    path = write_tar(tmp_path / "s.tar", [(name, FACTS) for name in names])
    samples, reasons = listed(path)
    assert [(sample.key, sample.member) for sample in samples] == [
        ("a.b/c", "a.b/c.MP4"),
        ("H", "H.mp4"),
    ]
    assert reasons == {"d": "has no .mp4 beside its .json"}
    [left], reasons = listed(path, ShardOptions("left.mp4", "json", False))
    assert left.member == "d.left.mp4"


def test_videos_without_json(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "s.tar", [("a.mp4", b"x"), ("b.mp4", b"x"), ("b.cls", b"7")])
    samples, reasons = listed(path)
    assert samples == []
    assert all("name another with --json-extension, or `none`" in one for one in reasons.values())
    samples, reasons = listed(path, PLAIN._replace(json="none"))
    assert [sample.key for sample in samples] == ["a", "b"]
    assert reasons == {}


def test_everything_that_belongs_to_no_sample_is_named(tmp_path: Path) -> None:
    path = write_tar(
        tmp_path / "s.tar",
        [
            ("readme.txt", b"hello"),
            ("._a.mp4", b"x"),
            ("noextension", b"x"),
            ("link.mp4", b""),
            ("../out.mp4", b"x"),
            ("a.mp4", b"x"),
            ("a.MP4", b"x"),
            ("a.json", FACTS),
            ("a.mp4", b"x"),
            ("bad.mp4", b"x"),
            ("bad.json", b"[1]"),
            ("empty.mp4", b""),
            ("empty.json", FACTS),
            ("apart.mp4", b"x"),
            ("z.mp4", b"x"),
            ("z.json", FACTS),
            ("apart.json", FACTS),
        ],
        **{"link.mp4": {"type": tarfile.SYMTYPE, "linkname": "/etc/passwd"}},
    )
    samples, reasons = listed(path)
    assert [sample.key for sample in samples] == ["a", "z"]
    assert reasons == {
        "": "has no sample for 3 members: ._a.mp4, noextension, readme.txt",
        "link.mp4": "is not a regular file",
        "../out.mp4": "its name leads out of the archive; it is not read",
        "a.MP4": "is in its sample already",
        "a.mp4": "occurs twice; the first one is used",
        "bad.mp4": "its .json is not a JSON object",
        "empty.mp4": "is empty (0 bytes)",
        "empty": "has no .mp4 beside its .json",
        "apart.mp4": "has no .json beside it; name another with --json-extension, or `none` to use "
        "videos without",
        "apart": "has no .mp4 beside its .json",
    }


@pytest.mark.parametrize("damage", [b"\xff" * 100, b"\0" * 512], ids=["altered", "zeros"])
def test_an_archive_that_ends_early_says_what_is_lost(damage: bytes, tmp_path: Path) -> None:
    path = write_tar(tmp_path / "s.tar", pairs(4))
    data = bytearray(path.read_bytes())
    data[2 * SAMPLE : 2 * SAMPLE + len(damage)] = damage
    path.write_bytes(data)
    samples, reasons = listed(path)
    assert [sample.key for sample in samples] == ["0", "1"]
    [reason] = reasons.values()
    assert f"nothing after byte {2 * SAMPLE:,} can be read" in reason
    lost = f"{len(data) - 2 * SAMPLE:,} of its {len(data):,} bytes are lost"
    names = "3 members: 2.json, 3.mp4, 3.json"
    assert reason.endswith(f"{lost}, with {names}; the samples before that are used")


def test_an_archive_cut_anywhere_is_named(tmp_path: Path) -> None:
    whole = write_tar(tmp_path / "whole.tar", pairs(3)).read_bytes()
    cut = tmp_path / "cut.tar"
    cut.write_bytes(whole[:511])
    with pytest.raises(NoTar, match="is not a tar archive"):
        listed(cut)
    for length in range(512, 3 * SAMPLE, 211):
        cut.write_bytes(whole[:length])
        samples, reasons = listed(cut)
        assert len(samples) <= length // 2048
        assert "lost" in reasons[""]


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (gzip.compress(b"x" * 900), r"is compressed \(gzip\), so all of it is lost.* gunzip"),
        (b"\x28\xb5\x2f\xfd" + b"x" * 900, r"is compressed \(zstd\)"),
        (b"<html>", "is not a tar archive"),
        (b"", "is not a tar archive"),
    ],
    ids=["gzip", "zstd", "html", "empty"],  # gzip's header has the time in it
)
def test_files_that_are_not_plain_tars_are_named(data: bytes, reason: str, tmp_path: Path) -> None:
    (tmp_path / "s.tar").write_bytes(data)
    with pytest.raises(NoTar, match=reason):
        listed(tmp_path / "s.tar")


def test_shards_are_found_like_other_inputs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    touched(tmp_path, "a/train-0.tar", "a/b/train-1.tar.gz", "a/.hidden/2.tar", "a/n.txt", "c.tgz")
    monkeypatch.chdir(tmp_path)
    for place in ("", f"file://{tmp_path}/"):
        named = [(Path(one.source).name, one.name) for one in find_shards([f"{place}a"])]
        assert named == [("train-1.tar.gz", "b/train-1.tar"), ("train-0.tar", "train-0")]
        for given in ("a/train-{0..0}.tar", "a/*.tar", "*/train-0.*"):
            [one] = find_shards([f"{place}{given}"])
            assert one.source.removeprefix("file://") == f"{tmp_path}/a/train-0.tar"
        assert len(find_shards([f"{place}a", f"{place}a/train-0.tar", f"{place}c.tgz"])) == 3
    for given, reason in (("none.tar", "does not exist"), ("*.mp4", "no tars found")):
        with pytest.raises(UserError, match=reason):
            find_shards([given])


# ---------------------------------------------------------------------------------------------
# Are they fit for training
# ---------------------------------------------------------------------------------------------


def checked(path: Path, *, trust: bool = False) -> tuple[ShardOutcome, dict[str, str]]:
    outcome = check_shard(entry(path), PLAIN._replace(trust=trust))
    return outcome, {Path(file).stem: reason for file, reason in outcome.rejected}


def test_videos_are_checked_where_they_lie(tmp_path: Path) -> None:
    good = video(tmp_path / "good.mp4")
    torn = bytearray(video(tmp_path / "torn.mp4", count=40))
    torn[-1200:-100] = b"\xff" * 1100
    members = {
        "good": good,
        "wide": video(tmp_path / "wide.mp4", width=96),
        "odd": video(tmp_path / "odd.mp4", height=80, width=80),
        "one": video(tmp_path / "one.mp4", count=1),
        "html": b"<html>",
        "torn": bytes(torn),
    }
    parts = [
        (f"{name}.{kind}", data if kind == "mp4" else b'{"identity": 7, "split": "Training"}')
        for name, data in members.items()
        for kind in ("mp4", "json")
    ]
    path = write_tar(tmp_path / "s.tar", parts)
    outcome, reasons = checked(path)
    [sample] = outcome.samples
    assert (sample.key, sample.frames, sample.fps, sample.side) == ("good", 6, 25.0, 64)
    assert (sample.identity, sample.split, sample.key_distance) == ("7", "train", 6)
    assert path.read_bytes()[sample.offset : sample.offset + sample.size] == good
    assert reasons["wide"] == "cannot be read where it lies: it is 96x64, not 96x96"
    assert reasons["odd"] == "is 80 pixels wide; training reads multiples of 32"
    assert reasons["one"].startswith("1 frame:")
    assert "is not a video" in reasons["html"]
    assert "damaged" in reasons["torn"]
    # Headers do not tell that frames are damaged.
    trusted, reasons = checked(path, trust=True)
    assert [one.key for one in trusted.samples] == ["good", "torn"]
    assert trusted.samples[0] == sample
    assert outcome.lasting
    assert trusted.lasting


def test_a_tar_that_cannot_be_opened_is_tried_again(tmp_path: Path) -> None:
    shard = entry(write_tar(tmp_path / "s.tar", pairs(1)))
    (tmp_path / "s.tar").unlink()
    outcome = check_shard(shard, PLAIN)
    assert outcome.rejected == ((str(tmp_path / "s.tar"), "No such file or directory"),)
    assert not outcome.lasting


@pytest.mark.skipif(not BAD.exists(), reason="needs ../shared/data/bad")
def test_malformed_shards(tmp_path: Path) -> None:
    expected = {
        "shard_ok.tar": 4,
        "shard_truncated.tar": 2,
        "shard_path_traversal.tar": 2,
        "shard_duplicate_keys.tar": 3,
        "shard_missing_parts.tar": 1,
        "shard_empty.tar": 0,
        "shard_html.tar": 0,
    }
    for name, count in expected.items():
        outcome = check_shard(entry(BAD / name), PLAIN)
        assert len(outcome.samples) == count, name
        assert bool(outcome.rejected) == (name != "shard_ok.tar"), name
        assert all(name in file for file, _ in outcome.rejected)
