"""Packing on a real Ray cluster: inputs, results, and bad files that must not end a run."""

import csv
import io
import json
import os
import shutil
import signal
import subprocess
import sys
from collections import Counter
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

from prioritycut_ray.data.index import clips_of, read_index
from prioritycut_ray.data.shards import read_clip
from prioritycut_ray.data.stream import FramePairs
from prioritycut_ray.errors import UserError
from prioritycut_ray.packing.clips import Outcome, Recipe, read_part
from prioritycut_ray.packing.entries import Entry, Rejected
from prioritycut_ray.packing.inputs import find_videos
from prioritycut_ray.packing.inspection import verify
from prioritycut_ray.packing.pipeline import PackProgress, append_videos, pack_videos
from prioritycut_ray.packing.tasks import make_part_within, make_parts
from prioritycut_ray.video.decoding import frames_upright
from prioritycut_ray.video.encoding import write_video
from prioritycut_ray.video.images import center_square, resize
from prioritycut_ray.video.random_access import read_all
from tests.clip_sets import as_packed, make_old
from tests.packing_inputs import contents, film, run_and_die
from tests.places import BAD

pytestmark = [
    pytest.mark.integration,
    # Ray leaves sockets and files to the garbage collector, and warns of its own future.
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning:ray"),
]


def make_films(folder: Path, names: list[str]) -> Path:
    for seed, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        write_video(folder / name, film(seed, 6 + seed), 20.0)
    return folder


def write_manifest(path: Path, header: str, *rows: str) -> str:
    path.write_text("\n".join([header, *rows]), encoding="utf-8")
    return str(path)


# ---------------------------------------------------------------------------------------------
# What comes out
# ---------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("local_ray")
def test_folder_becomes_a_data_set(tmp_path: Path) -> None:
    names = ["b/one.mp4", "b/Two.MOV", "a/one.mp4", "three.webm.mp4", "a/four.mp4"]
    films = make_films(tmp_path / "in", names)
    (films / "notes.txt").write_text("no video")
    (films / "._one.mp4").write_bytes(b"\0\5\x16\7")
    (films / ".hidden").mkdir()
    shutil.copyfile(films / "a/one.mp4", films / ".hidden/one.mp4")
    seen: list[PackProgress] = []
    report = pack_videos([str(films)], str(tmp_path / "out"), size=64, on_progress=seen.append)

    index = read_index(str(tmp_path / "out"))
    assert index == report.index
    order = ["a/four.mp4", "a/one.mp4", "b/Two.MOV", "b/one.mp4", "three.webm.mp4"]
    packed_clips = as_packed(index)
    assert [clip.identity for clip in packed_clips] == [
        "a/four",
        "a/one",
        "b/Two",
        "b/one",
        "three.webm",
    ]
    assert [clip.key[:5] for clip in packed_clips] == ["a-fou", "a-one", "b-Two", "b-one", "three"]
    for clip, name in zip(packed_clips, order, strict=True):
        original = list(frames_upright(films / name))
        assert (clip.frames, clip.fps) == (len(original), 20.0)
        packed = read_all(read_clip(str(tmp_path / "out"), clip), 64)
        expected = np.stack([resize(center_square(frame), 64) for frame in original])
        assert np.abs(packed.astype(int) - expected).mean() < 3
    assert report.clips == 5
    assert report.frames == sum(range(6, 11))
    assert report.size_bytes == sum(clip.size for clip in index.clips)
    assert report.rejected == ()
    assert report.warnings == ()
    assert [progress[:3] for progress in seen] == [(n, 5, 0) for n in range(1, 6)]
    assert {Path(progress.file).name for progress in seen} == {Path(name).name for name in order}
    assert list(contents(tmp_path / "out")) == ["index.arrow", "shard-000000.tar"]
    assert len(clips_of(index, "test")) in (1, 2)

    pairs = FramePairs(str(tmp_path / "out"), index, "train", size=64, seed=0)
    assert pairs.read([0])[0].source.shape == (1, 3, 64, 64)


@pytest.mark.usefixtures("local_ray")
def test_output_is_the_same_at_any_parallelism(tmp_path: Path, monkeypatch: Any) -> None:
    films = make_films(tmp_path / "in", [f"{n}.mp4" for n in range(6)])
    (films / "2.mp4").write_bytes(b"no video")
    pack_videos([str(films)], str(tmp_path / "parallel"), size=32)
    monkeypatch.setattr("ray.cluster_resources", lambda: {"CPU": 0.5})  # One or two at a time.
    pack_videos([str(films)], str(tmp_path / "serial"), size=32)
    assert contents(tmp_path / "parallel") == contents(tmp_path / "serial")


@pytest.mark.skipif(not BAD.exists(), reason="needs ../shared/data/bad")
@pytest.mark.usefixtures("local_ray")
def test_folder_of_awkward_files_matches_its_expectations(tmp_path: Path) -> None:
    table = (BAD / "EXPECTED.csv").read_text(encoding="utf-8").splitlines()
    rows = [row for row in csv.DictReader(table) if row["kind"] == "video"]
    films = tmp_path / "in"
    films.mkdir()
    for row in rows:
        source = BAD / row["file"]
        source = source if source.exists() else BAD / "ok_reference.mp4"
        shutil.copyfile(source, films / row["file"])
    report = pack_videos([str(films)], str(tmp_path / "out"), size=64)

    accepted = {row["file"]: int(row["frames"]) for row in rows if "accept" in row["verdict"]}
    entries = {e.identity: Path(e.source).name for e in find_videos([str(films)]).entries}
    packed: Counter[str] = Counter()
    for clip in report.index.clips:
        packed[entries[clip.identity]] += clip.frames
    assert packed == accepted
    scenes = [clip.frames for clip in as_packed(report.index) if clip.identity == "scene_cut"]
    assert scenes == [20, 20]
    rejected = {Path(item.file).name: item.reason for item in report.rejected}
    expected = {row["file"] for row in rows} - set(accepted) - {"._ok_reference.mp4"}
    assert set(rejected) == expected
    assert rejected["one_frame.mp4"].startswith("1 frame: no source/driving pair can be drawn")
    assert "17 frames could be decoded" in rejected["truncated_mdat_faststart.mp4"]
    with (tmp_path / "out/rejected.csv").open(encoding="utf-8", newline="") as file:
        assert [Rejected(**row) for row in csv.DictReader(file)] == list(report.rejected)
    assert [line for line in report.warnings if "vfr.mp4" in line and "19.67 fps" in line]
    assert len(report.warnings) == 1
    assert {clip.width for clip in report.index.clips} == {64}
    assert set(contents(tmp_path / "out")) == {"index.arrow", "rejected.csv", "shard-000000.tar"}


# ---------------------------------------------------------------------------------------------
# Decoders that die
# ---------------------------------------------------------------------------------------------


def hour_in_a_thimble(path: Path, frames: int = 20_000) -> None:
    """Write a small file that takes minutes to decode: one large black frame, repeated."""
    target = io.BytesIO()
    with av.open(target, "w", format="mp4") as file:
        stream = file.add_stream("libx264", rate=25)
        stream.width = stream.height = 2048
        stream.codec_context.gop_size = 1
        picture = av.VideoFrame.from_ndarray(np.zeros((2048, 2048, 3), np.uint8), format="rgb24")
        [packet] = [*stream.encode(picture), *stream.encode()]
        data = bytes(packet)
        for number in range(frames):
            again = av.Packet(data)
            again.stream, again.time_base = stream, Fraction(1, 25)
            again.pts = again.dts = number
            again.is_keyframe = True
            file.mux(again)
    path.write_bytes(target.getvalue())


def outcomes(inputs: list[str], **how: Any) -> dict[str, Outcome]:
    """Make the parts of some videos; return their outcomes by name."""
    entries = find_videos(inputs).entries
    recipe = Recipe(size=32, copy=False, max_frames=100)
    made = make_parts(entries, range(len(entries)), recipe, **{"make": make_part_within} | how)
    return {entries[position].name: read_part(part)[0] for position, part in made}


@pytest.mark.usefixtures("local_ray")
def test_crashed_decoder_costs_one_clip(tmp_path: Path) -> None:
    tries = tmp_path / "tries"

    def crashing(seconds: int, entry: Entry, recipe: Recipe) -> bytes:
        """Die as a decoder does: of a signal that Python does not see."""
        if entry.name == "bad" or (entry.name == "unlucky" and not tries.exists()):
            with tries.open("a") as file:
                file.write(f"{entry.name}\n")
            os.kill(os.getpid(), signal.SIGSEGV)
        from prioritycut_ray.packing.tasks import make_part_within

        return make_part_within(seconds, entry, recipe)

    make_films(tmp_path / "in", ["bad.mp4", "good.mp4", "unlucky.mp4"])
    inputs = [str(tmp_path / f"in/{name}.mp4") for name in ("unlucky", "bad", "good")]
    found = outcomes(inputs, make=crashing)
    assert {name: (one.rejected, len(one.segments)) for name, one in found.items()} == {
        "unlucky": ("", 1),
        "bad": ("decoder crashed, twice", 0),
        "good": ("", 1),
    }
    assert not found["bad"].lasting
    assert sorted(tries.read_text().split()) in (["bad", "bad"], ["bad", "bad", "unlucky"])


@pytest.mark.usefixtures("local_ray")
def test_endless_video_is_rejected(tmp_path: Path) -> None:
    films = make_films(tmp_path / "in", ["a.mp4", "b.mp4", "c.mp4"])
    hour_in_a_thimble(films / "endless.mp4")
    inputs = [str(films / f"{name}.mp4") for name in ("endless", "a", "b", "c")]
    found = outcomes(inputs, limit=lambda entry: 6)
    assert found.pop("endless").rejected == "took longer than 6 s to decode"
    assert {name: one.rejected for name, one in found.items()} == {"a": "", "b": "", "c": ""}


# ---------------------------------------------------------------------------------------------
# Runs that end early
# ---------------------------------------------------------------------------------------------


def pack_and_die(moment: str, call: str) -> None:
    """Run a packing call in a process that kills itself at a moment, without cleaning up."""
    run_and_die(f"""
import os, signal
from prioritycut_ray.packing import pipeline
from prioritycut_ray.data.shard_writer import ShardWriter
from prioritycut_ray.packing.workspace import Workspace

def die(*args, **kwargs):
    os.kill(os.getpid(), signal.SIGKILL)

def die_at_third(progress):
    if progress.done == 3:
        die()

show = die_at_third if {moment!r} == "third clip" else None
if {moment!r} == "before the index":
    ShardWriter.finish = die
if {moment!r} == "after the index":
    Workspace.clear = die
pipeline.{call}
""")


@pytest.mark.parametrize("moment", ["third clip", "before the index", "after the index"])
@pytest.mark.usefixtures("local_ray")
def test_killed_run_resumes_with_the_same_result(moment: str, tmp_path: Path) -> None:
    films = make_films(tmp_path / "in", [f"{n}.mp4" for n in range(5)])
    (films / "3.mp4").write_bytes(b"no video")
    out, whole = str(tmp_path / "out"), str(tmp_path / "whole")
    pack_and_die(moment, f"pack_videos([{str(films)!r}], {out!r}, size=32, on_progress=show)")
    visible = [path.name for path in (tmp_path / "out").iterdir() if path.name[0] != "."]
    if moment != "after the index":
        assert "index.arrow" not in visible
    if moment == "third clip":
        assert visible == []
        with pytest.raises(UserError, match=r"unfinished run with other size \(size 32\)"):
            pack_videos([str(films)], out, size=64)
        with pytest.raises(UserError, match=r"unfinished run with other inputs"):
            pack_videos([str(films / "1.mp4")], out, size=32)
        [damaged, *_] = sorted((tmp_path / "out/.packing").glob("*.part"))
        damaged.write_bytes(damaged.read_bytes()[:-1] + b"x")

    report = pack_videos([str(films)], out, size=32)
    assert report.kept == (2 if moment == "third clip" else 5)
    pack_videos([str(films)], whole, size=32)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


@pytest.mark.usefixtures("local_ray")
def test_second_run_at_the_same_time_is_refused(tmp_path: Path) -> None:
    films = make_films(tmp_path / "in", ["a.mp4", "b.mp4"])
    out = str(tmp_path / "out")

    def intrude(progress: PackProgress) -> None:
        if progress.done == 1:
            with pytest.raises(UserError, match="another run is packing into it"):
                pack_videos([str(films)], out, size=32)

    assert pack_videos([str(films)], out, size=32, on_progress=intrude).clips == 2


@pytest.mark.usefixtures("local_ray")
def test_strict_names_rejected_files_and_resumes_when_they_are_fixed(tmp_path: Path) -> None:
    films = make_films(tmp_path / "in", ["a.mp4", "b.mp4", "c.mp4"])
    good = (films / "b.mp4").read_bytes()
    (films / "b.mp4").write_bytes(b"<html>")
    out = str(tmp_path / "out")
    with pytest.raises(UserError, match=r"1 rejected, and --strict .*b\.mp4: is not a video"):
        pack_videos([str(films)], out, size=32, strict=True)
    assert [path.name for path in (tmp_path / "out").glob("[!.]*")] == ["rejected.csv"]
    (films / "b.mp4").write_bytes(good)
    report = pack_videos([str(films)], out, size=32, strict=True)
    assert (report.clips, report.kept) == (3, 2)
    assert list(contents(tmp_path / "out")) == ["index.arrow", "shard-000000.tar"]


# ---------------------------------------------------------------------------------------------
# Clips that come later
# ---------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("local_ray")
def test_new_clips_are_appended_and_old_ones_untouched(tmp_path: Path) -> None:
    make_films(tmp_path / "in", ["a.mp4", "b.mp4", "c.mp4"])
    first = write_manifest(
        tmp_path / "1.csv", "file,identity,split", "in/a.mp4,ann,test", "in/b.mp4,bob,train"
    )
    out = str(tmp_path / "out")
    before = pack_videos([first], out, size=32).index
    old = contents(tmp_path / "out")

    make_films(tmp_path / "in", ["more/a.mp4", "x.mp4", "x.mp4", "more/d.mp4", "more/e.mp4"])
    (tmp_path / "in/gone.mp4").write_bytes(b"")
    second = write_manifest(
        tmp_path / "2.csv",
        "file,identity,split",
        "in/a.mp4,ann,",
        "in/c.mp4,ann,train",
        "in/more/d.mp4,bob,",
        "in/more/e.mp4,eve,",
        "in/gone.mp4,eve,",
    )
    call = f"append_videos({out!r}, [{second!r}])"
    pack_and_die("before the index", call)
    assert read_index(out) == before
    found = verify(out)
    assert found.problems == []
    assert any("unfinished `data append`" in note for note in found.notes)

    report = append_videos(out, [second])
    index = read_index(out)
    assert index == report.index
    assert (report.clips, report.known, report.kept) == (3, 1, 5)
    assert as_packed(index)[:2] == as_packed(before)
    assert index.fingerprint != before.fingerprint
    assert [(c.identity, c.split) for c in as_packed(index)[2:]] == [
        ("ann", "test"),
        ("bob", "train"),
        ("eve", "train"),
    ]
    assert {clip.shard for clip in as_packed(index)[2:]} == {"shard-000001.tar"}
    new = contents(tmp_path / "out")
    assert new["shard-000000.tar"] == old["shard-000000.tar"]
    assert sorted(new) == ["index.arrow", "rejected.csv", "shard-000000.tar", "shard-000001.tar"]
    assert verify(out) == (5, 5, [], [])

    again = append_videos(out, [second])
    assert (again.clips, again.known, again.index) == (0, 4, index)
    assert contents(tmp_path / "out") == new


def test_append_needs_a_data_set(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no index"):
        append_videos(str(tmp_path), [str(tmp_path)])


@pytest.mark.usefixtures("local_ray")
def test_everything_from_and_to_an_object_store(tmp_path: Path) -> None:
    """Inputs, output, appending and checking over a real S3 API, in a process of their own."""
    import ray
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        make_films(tmp_path, ["a.mp4", "b.mp4", "c.mp4"])
        storage = {
            "AWS_ENDPOINT_URL": f"http://{host}:{port}",
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
            "AWS_DEFAULT_REGION": "us-east-1",
        }
        script = f"""
import fsspec
from prioritycut_ray.data.index import read_index
from prioritycut_ray.packing.inspection import verify
from prioritycut_ray.packing.pipeline import append_videos, pack_videos
from prioritycut_ray.packing.shard_index import index_shards

fs = fsspec.filesystem("s3")
fs.mkdir("pack-in")
fs.mkdir("pack-out")
for name in ("a.mp4", "b.mp4"):
    fs.put_file({str(tmp_path)!r} + "/" + name, "pack-in/films/" + name)
fs.pipe_file("pack-in/films/._a.mp4", b"hidden")
fs.pipe_file("pack-in/films/bad.mp4", b"")
fs.pipe_file("pack-in/list.csv", b"file,identity\\nfilms/a.mp4,ann\\nfilms/b.mp4,bob\\ngone.mp4,x")
fs.put_file({str(tmp_path)!r} + "/c.mp4", "pack-in/later/c.mp4")
folder = pack_videos(["s3://pack-in/films"], "s3://pack-out/data", size=32)
assert sorted(clip.key for clip in folder.index.clips) == ["a", "b"], folder
assert folder.rejected == (("s3://pack-in/films/bad.mp4", "is empty (0 bytes)"),), folder.rejected
assert append_videos("s3://pack-out/data", ["s3://pack-in/later/*.mp4"]).clips == 1
assert verify("s3://pack-out/data") == (3, 3, [], []), verify("s3://pack-out/data")
listed = pack_videos(["s3://pack-in/list.csv"], "s3://pack-out/listed", size=32)
assert {{clip.identity for clip in listed.index.clips}} == {{"ann", "bob"}}
reason = "line 4 of the manifest: No such file or directory"
assert listed.rejected == (("s3://pack-in/gone.mp4", reason),)
names = sorted(path.rpartition("/")[2] for path in fs.find("pack-out/data"))
assert names == ["index.arrow", "rejected.csv", "shard-000000.tar", "shard-000001.tar"], names
shards = "s3://pack-out/data/shard-{{000000..000001}}.tar"
indexed = index_shards([shards], "s3://pack-out/index")
assert indexed.index.fingerprint == read_index("s3://pack-out/data").fingerprint
assert verify("s3://pack-out/index") == (3, 3, [], []), verify("s3://pack-out/index")
"""
        environment = os.environ | storage
        environment |= {
            "RAY_ADDRESS": ray.get_runtime_context().gcs_address,
            "RAY_JOB_CONFIG_JSON_ENV_VAR": json.dumps({"runtime_env": {"env_vars": storage}}),
            "PYTHONPATH": os.pathsep.join(sys.path),
        }
        done = subprocess.run(
            [sys.executable, "-c", script],
            env=environment,
            timeout=250,
            start_new_session=True,
            capture_output=True,
            text=True,
            check=False,
        )
    finally:
        server.stop()
    assert done.returncode == 0, done.stderr


# ---------------------------------------------------------------------------------------------
# What goes in
# ---------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("local_ray")
def test_manifest_names_identities_and_splits(tmp_path: Path) -> None:
    make_films(tmp_path / "in", ["1.mp4", "2.mp4", "3.mp4", "4.mp4"])
    manifest = write_manifest(
        tmp_path / "list.csv",
        "\ufefffile,identity,split,note",
        "in/1.mp4,ann,train,",
        "in/2.mp4,ann,val,too many,fields",
        "in/3.mp4,bob,,",
        "in/4.mp4,,,",
        "in/gone.mp4,bob,train,",
    )
    report = pack_videos([manifest], str(tmp_path / "out"), size=32)
    facts = [(clip.identity, clip.split) for clip in as_packed(report.index)]
    assert facts[:2] == [("ann", "train"), ("ann", "val")]
    assert sorted(facts[2:]) in (
        [("bob", "train"), ("in/4", "test")],
        [("bob", "test"), ("in/4", "train")],
    )
    assert report.warnings == (
        f"{manifest}: 1 of its 5 rows have no usable file; rejected.csv lists them",
        "identity 'ann' is in train and val, as the manifest says",
    )
    missing = str(tmp_path / "in/gone.mp4")
    reason = "line 6 of the manifest: No such file or directory"
    assert report.rejected == (Rejected(missing, reason),)


@pytest.mark.usefixtures("local_ray")
def test_segments_of_one_file_are_clips_of_their_own(tmp_path: Path) -> None:
    write_video(tmp_path / "a.mp4", film(1, 20), 20.0)
    write_video(tmp_path / "b.mp4", film(2, 20), 20.0)
    manifest = write_manifest(
        tmp_path / "list.csv",
        "file, start, end, identity, split",
        "a.mp4, 0, 8, ann, train",
        "a.mp4, 8, 20, bob, test",
        "a.mp4, 12, , bob, test",
        "b.mp4, 15, 30, eve, train",
        "b.mp4, 40, , eve, train",
    )
    out = str(tmp_path / "out")
    report = pack_videos([manifest], out, size=64)
    original = np.stack([resize(center_square(f), 64) for f in frames_upright(tmp_path / "a.mp4")])
    expected = [("a_0-8", 0, 8, "ann"), ("a_8-20", 8, 20, "bob"), ("a_12-end", 12, 20, "bob")]
    for clip, (key, start, end, identity) in zip(as_packed(report.index), expected, strict=True):
        assert (clip.key, clip.identity) == (key, identity)
        assert clip.split == ("train" if identity == "ann" else "test")
        packed = read_all(read_clip(out, clip), 64).astype(int)
        assert np.abs(packed - original[start:end]).mean() < 3
    assert [item.reason for item in report.rejected] == [
        "start 15 and end 30 are outside its 20 frames",
        "start 40 and end (empty) are outside its 20 frames",
    ]


@pytest.mark.usefixtures("local_ray")
def test_appending_upgrades_the_index_of_an_older_version(tmp_path: Path) -> None:
    films = make_films(tmp_path / "in", ["a.mp4", "b.mp4"])
    out = str(tmp_path / "out")
    before = pack_videos([str(films)], out, size=32).index
    make_old(out)
    unchanged = append_videos(out, [str(films)])
    assert (unchanged.clips, unchanged.known) == (0, 2)
    assert list(contents(tmp_path / "out")) == ["index.arrow", "shard-000000.tar"]
    assert read_index(out) == before
    make_old(out)
    make_films(tmp_path / "in", ["a.mp4", "b.mp4", "c.mp4"])
    report = append_videos(out, [str(films)])
    assert (report.clips, report.known, report.splits) == (1, 2, {"train": 1})
    assert as_packed(read_index(out))[:2] == as_packed(before)
    assert "index.json" not in contents(tmp_path / "out")


@pytest.mark.usefixtures("local_ray")
def test_split_folders_are_kept(tmp_path: Path) -> None:
    names = [*(f"train/{n}.mp4" for n in range(4)), "test/0.mp4"]
    make_films(tmp_path / "in", names)
    out = str(tmp_path / "out")
    first = pack_videos([str(tmp_path / "in/train")], out, size=32)
    assert {clip.split for clip in first.index.clips} == {"train"}
    assert [warning[:36] for warning in first.warnings] == ["no clip is in the 'test' split, whic"]
    with pytest.raises(UserError, match=r"test/0\.mp4: belongs to test, but its identity '0'"):
        append_videos(out, [str(tmp_path / "in/test")])
    assert read_index(out) == first.index
    shutil.rmtree(tmp_path / "out/.packing")
    report = append_videos(out, [str(tmp_path / "in")])
    assert [(c.identity, c.split) for c in as_packed(report.index)[4:]] == [("test/0", "test")]
    assert (report.known, report.warnings) == (4, ())
    again = pack_videos([out], str(tmp_path / "again"), size=32).index
    assert [(c.identity, c.split) for c in again.clips] == [
        (c.identity, c.split) for c in report.index.clips
    ]


def test_no_input_and_odd_sizes_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nothing to pack"):
        pack_videos([], str(tmp_path / "out"), size=32)
    with pytest.raises(UserError, match=r"size of 33 .* multiple of 32"):
        pack_videos([str(tmp_path)], str(tmp_path / "out"), size=33)


def test_output_in_use_is_refused(tmp_path: Path) -> None:
    films = make_films(tmp_path / "in", ["a.mp4", "b.mp4"])
    (tmp_path / "out").mkdir()
    (tmp_path / "out/index.arrow").write_text("{}")
    with pytest.raises(
        UserError, match=r"out: is not empty; .*data append.* choose another --out or"
    ):
        pack_videos([str(films)], str(tmp_path / "out"), size=32)
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="file: is a file; choose another --out"):
        pack_videos([str(films)], str(tmp_path / "file"), size=32)
    assert contents(tmp_path / "out") == {"index.arrow": b"{}"}


@pytest.mark.usefixtures("local_ray")
def test_nothing_usable_is_an_error_that_can_be_fixed(tmp_path: Path) -> None:
    films, out = tmp_path / "in", str(tmp_path / "out")
    films.mkdir()
    (films / "a.mp4").touch()
    (films / "b.mp4").touch()
    (films / "c.mp4").write_bytes(b"<html>")
    with pytest.raises(UserError, match=r"none of 3 videos is usable \(2 x is empty .*; 1 x is no"):
        pack_videos([str(films)], out, size=32)
    assert list(contents(tmp_path / "out")) == ["rejected.csv"]
    make_films(films, ["a.mp4", "b.mp4", "c.mp4"])
    assert pack_videos([str(films)], out, size=32).clips == 3
    assert list(contents(tmp_path / "out")) == ["index.arrow", "shard-000000.tar"]


@pytest.mark.usefixtures("local_ray")
def test_interrupted_run_shows_nothing(tmp_path: Path) -> None:
    films = make_films(tmp_path / "in", ["a.mp4", "b.mp4", "c.mp4"])

    def interrupt(progress: PackProgress) -> None:
        if progress.done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pack_videos([str(films)], str(tmp_path / "out"), size=32, on_progress=interrupt)
    assert [path.name for path in (tmp_path / "out").iterdir()] == [".packing"]
    assert pack_videos([str(films)], str(tmp_path / "out"), size=32).kept == 2
