"""Shards of others are indexed on a real Ray cluster, and training reads them where they lie."""

import json
from pathlib import Path

import pytest
import webdataset

from prioritycut_ray.config import load_config
from prioritycut_ray.data.index import read_index
from prioritycut_ray.data.shards import ShardError, read_clip
from prioritycut_ray.errors import UserError
from prioritycut_ray.launch.in_process import train_in_process
from prioritycut_ray.packing.inspection import verify
from prioritycut_ray.packing.shard_index import IndexProgress, index_shards
from prioritycut_ray.video.encoding import write_video
from tests.packing_inputs import contents, film, run_and_die
from tests.places import TINY
from tests.runs import assert_same_weights

pytestmark = [
    pytest.mark.integration,
    pytest.mark.usefixtures("local_ray"),
    # Ray leaves sockets and files to the garbage collector, and warns of its own future.
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning:ray"),
]
NAMES = [f"p{number}" for number in range(6)]


@pytest.fixture
def pattern(tmp_path: Path) -> str:
    """Two shards that webdataset's ShardWriter wrote, as a pattern with braces."""
    (tmp_path / "films").mkdir()
    (tmp_path / "theirs").mkdir()
    with webdataset.ShardWriter(f"{tmp_path}/theirs/s-%06d.tar", maxcount=3, verbose=0) as writer:
        for number, name in enumerate(NAMES):
            path = tmp_path / f"films/{name}.mp4"
            write_video(path, film(number, 8, 64, 64), 20.0)
            facts = {"identity": name, "split": "test" if number == 0 else "train"}
            sample = {"mp4": path.read_bytes(), "json": facts, "cls": number}
            writer.write({"__key__": f"clips/{name}", **sample})
    return f"{tmp_path}/theirs/s-{{000000..000001}}.tar"


def test_training_reads_shards_of_others_where_they_lie(pattern: str, tmp_path: Path) -> None:
    before = contents(tmp_path / "theirs")
    out = str(tmp_path / "data")
    seen: list[IndexProgress] = []
    report = index_shards([pattern], out, on_progress=seen.append)

    assert list(contents(tmp_path / "data")) == ["index.arrow"]
    assert (report.rejected, report.warnings) == ((), ())
    assert seen[-1] == IndexProgress(2, 2, 6, 0)
    index = read_index(out)
    assert index == report.index
    assert [len(index.clips_of(split)) for split in ("test", "train")] == [1, 5]
    for clip in index.clips:
        assert Path(clip.shard).parent == tmp_path / "theirs"
        assert read_clip(out, clip) == (tmp_path / f"films/{clip.identity}.mp4").read_bytes()
        assert (clip.frames, clip.fps, clip.width) == (8, 20.0, 64)
    assert verify(out).problems == []

    # The order is the same for any number of loader workers.
    runs = []
    for workers in (0, 2):
        words = [f"data.url={out}", f"storage={tmp_path}", "train.samples=8"]
        words += [f"data.loader_workers={workers}", f"name=loaders-{workers}", "train.workers=0"]
        config = load_config(str(TINY), words)
        runs.append(Path(train_in_process(config, lambda metrics: None, print)))
    assert_same_weights(*runs)
    assert contents(tmp_path / "theirs") == before

    # Bytes that were altered since are found by their checksum.
    clip = index.clips[0]
    data = bytearray(Path(clip.shard).read_bytes())
    data[clip.offset + 50] ^= 255
    Path(clip.shard).write_bytes(data)
    with pytest.raises(ShardError, match="the checksum does not match"):
        read_clip(out, clip)
    assert any("the checksum does not match" in problem for problem in verify(out).problems)


@pytest.mark.slow
def test_indexing_resumes_after_a_kill(pattern: str, tmp_path: Path) -> None:
    broken = tmp_path / "theirs/s-000001.tar"
    broken.write_bytes(broken.read_bytes()[:9000])
    out, whole = str(tmp_path / "out"), str(tmp_path / "whole")
    run_and_die(
        "import os, signal\n"
        "from prioritycut_ray.packing.shard_index import index_shards\n"
        f"index_shards([{pattern!r}], {out!r}, "
        "on_progress=lambda _: os.kill(os.getpid(), signal.SIGKILL))"
    )
    assert [path.name for path in (tmp_path / "out").iterdir()] == [".packing"]
    report = index_shards([pattern], out)
    assert report.kept == 1
    assert index_shards([pattern], whole).index == report.index
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert sorted(contents(tmp_path / "out")) == ["index.arrow", "rejected.csv"]
    assert any("the samples before that are used" in item.reason for item in report.rejected)
    with pytest.raises(UserError, match="and --strict allows none"):
        index_shards([pattern], str(tmp_path / "strict"), strict=True)
    for path in (tmp_path / "theirs").iterdir():
        path.write_bytes(b"<html>")
    with pytest.raises(UserError, match=r"none of 2 .* usable \(2 x is not a tar archive\)"):
        index_shards([pattern], str(tmp_path / "none"))


def test_trusted_shards_say_so(pattern: str, tmp_path: Path) -> None:
    checked = index_shards([pattern], str(tmp_path / "checked"))
    trusted = index_shards([pattern], str(tmp_path / "trusted"), trust=True)
    assert trusted.index.fingerprint == checked.index.fingerprint
    assert trusted.warnings[0].startswith("6 clips were not decoded (--trust)")
    assert {json.loads(clip.extra).get("trusted") for clip in trusted.index.clips} == {True}
