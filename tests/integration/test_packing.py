"""Packing on a real Ray: what goes in, what comes out, and what a bad file may not do."""

import csv
import hashlib
import os
import shutil
import signal
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from prioritycut_ray.data import packing
from prioritycut_ray.data.packing import (
    Entry,
    PackProgress,
    Rejected,
    assign_splits,
    find_videos,
    pack_videos,
)
from prioritycut_ray.data.shards import clips_of, read_clip, read_index
from prioritycut_ray.data.stream import FramePairs
from prioritycut_ray.data.video import (
    center_square,
    frames_upright,
    read_all,
    resize,
    write_video,
)
from prioritycut_ray.errors import UserError

BAD = Path(__file__).parents[3] / "shared/data/bad"
DEV = Path(__file__).parents[3] / "shared/data/dev"

pytestmark = [
    pytest.mark.integration,
    # Ray leaves sockets and files to the garbage collector, and warns of its own future.
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning:ray"),
]


def film(seed: int, count: int = 6, height: int = 48, width: int = 80) -> list[np.ndarray]:
    """A square of a colour of its own that moves over a gray ramp."""
    frames = []
    for index in range(count):
        frame = np.repeat(np.linspace(30, 200, width, dtype=np.uint8)[None, :, None], 3, axis=2)
        frame = frame.repeat(height, axis=0)
        frame[10:30, 20 + 3 * index : 40 + 3 * index] = (20 * seed % 256, 200, 60)
        frames.append(frame)
    return frames


def make_films(folder: Path, names: list[str]) -> Path:
    for seed, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        write_video(folder / name, film(seed, 6 + seed), 20.0)
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


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
    assert [clip.identity for clip in index.clips] == ["four", "one", "Two", "one", "three.webm"]
    assert [clip.key[:5] for clip in index.clips] == ["a-fou", "a-one", "b-Two", "b-one", "three"]
    for clip, name in zip(index.clips, order, strict=True):
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
    assert [Path(progress.file).name for progress in seen] == [Path(name).name for name in order]
    assert list(contents(tmp_path / "out")) == ["index.json", "shard-000000.tar"]
    assert len(clips_of(index, "test")) in (1, 2)

    pairs = FramePairs(str(tmp_path / "out"), index, "train", size=64, seed=0)
    assert pairs[0].source.shape == (3, 64, 64)


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
def test_folder_of_awkward_files_does_what_its_table_demands(tmp_path: Path) -> None:
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
    entries = {entry.identity: entry.path.name for entry in find_videos([str(films)])}
    packed = {entries[clip.identity]: clip.frames for clip in report.index.clips}
    assert packed == accepted
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
    assert set(contents(tmp_path / "out")) == {"index.json", "rejected.csv", "shard-000000.tar"}


# ---------------------------------------------------------------------------------------------
# Decoders that die
# ---------------------------------------------------------------------------------------------


def descendants(pid: int) -> list[int]:
    children = [
        int(child)
        for task in Path(f"/proc/{pid}/task").iterdir()
        for child in (task / "children").read_text().split()
    ]
    return children + [deeper for child in children for deeper in descendants(child)]


def crash_the_task_that_hangs() -> None:
    """Send the signal of a crash to this cluster's one worker that is busy packing."""
    for _ in range(200):
        time.sleep(0.1)
        for pid in descendants(os.getpid()):
            if b"ray::_pack_one" in Path(f"/proc/{pid}/cmdline").read_bytes():
                os.kill(pid, signal.SIGSEGV)
                return


@pytest.mark.usefixtures("local_ray")
def test_crashed_decoder_costs_one_clip(tmp_path: Path) -> None:
    films = make_films(tmp_path / "in", ["a.mp4", "z.mp4"])
    os.mkfifo(films / "hang.mp4")  # Reading it never ends, so there is time to strike.
    crash = threading.Thread(target=crash_the_task_that_hangs)

    def begin(progress: PackProgress) -> None:
        if progress.done == 1:
            time.sleep(1)  # Until the other good file is done too.
            crash.start()

    inputs = [str(films / name) for name in ("a.mp4", "z.mp4", "hang.mp4")]
    report = pack_videos(inputs, str(tmp_path / "out"), size=32, on_progress=begin)
    crash.join()
    assert report.rejected == (Rejected(inputs[2], "decoder crashed"),)
    assert report.clips == 2


@pytest.mark.usefixtures("local_ray")
def test_hanging_decoder_is_given_up(tmp_path: Path, monkeypatch: Any) -> None:
    films = make_films(tmp_path / "in", ["a.mp4", "b.mp4", "c.mp4"])
    os.mkfifo(films / "hang.mp4")
    monkeypatch.setattr(packing, "SECONDS_PER_VIDEO", 3)
    inputs = [str(films / name) for name in ("hang.mp4", "a.mp4", "b.mp4", "c.mp4")]
    report = pack_videos(inputs, str(tmp_path / "out"), size=32)
    assert report.rejected == (Rejected(inputs[0], "took longer than 3 s to decode"),)
    assert [clip.key for clip in report.index.clips] == ["a", "b", "c"]


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
    facts = [(clip.identity, clip.split) for clip in report.index.clips]
    assert facts[:2] == [("ann", "train"), ("ann", "val")]
    assert sorted(facts[2:]) in (
        [("4", "test"), ("bob", "train")],
        [("4", "train"), ("bob", "test")],
    )
    assert report.warnings == ("identity 'ann' is in train and val, as the manifest says",)
    missing = str(tmp_path / "in/gone.mp4")
    assert report.rejected == (Rejected(missing, "No such file or directory"),)


@pytest.mark.skipif(not DEV.exists(), reason="needs ../shared/data/dev")
def test_manifest_of_the_real_clips_is_read() -> None:
    entries = find_videos([str(DEV / "MANIFEST.csv")])
    assert len(entries) == 23
    assert all(entry.path.exists() for entry in entries)
    assert Entry(DEV / "obama_3.mp4", "obama_3", "obama", "test") in entries


def test_every_way_to_name_a_video_finds_it_once(tmp_path: Path, monkeypatch: Any) -> None:
    for name in ("a/1.mp4", "a/2.MP4", "a/b/3.mkv", "[x].mp4", "-dash.mp4", ".h.mp4", "n.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    monkeypatch.chdir(tmp_path)

    def found(*inputs: str) -> list[str]:
        entries = find_videos(inputs)
        assert all(entry.path.is_absolute() for entry in entries)
        return [str(entry.path.relative_to(tmp_path)) for entry in entries]

    everything = ["-dash.mp4", "[x].mp4", "a/1.mp4", "a/2.MP4", "a/b/3.mkv"]
    assert found(".") == everything
    assert found(str(tmp_path)) == everything
    assert found("*") == everything
    assert found("a/*.mp4") == ["a/1.mp4"]
    assert found("**/*.mkv", "a") == ["a/b/3.mkv", "a/1.mp4", "a/2.MP4"]
    assert found("[x].mp4", "-dash.mp4") == ["[x].mp4", "-dash.mp4"]
    assert found("a/../a/1.mp4", "a/1.mp4", "a")[1:] == ["a/2.MP4", "a/b/3.mkv"]


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ("nowhere", "nowhere: does not exist"),
        ("none*.mp4", "no videos found"),
        ("empty", "empty: no videos found"),
        ("words.csv", "words.csv: needs a header with the column 'file'"),
        ("nothing.csv", "nothing.csv: needs a header"),
        ("blank.csv", "blank.csv, line 3: 'file' is empty"),
        ("latin.csv", "latin.csv: is no csv in UTF-8"),
    ],
)
def test_input_without_videos_is_refused(given: str, reason: str, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    write_manifest(tmp_path / "words.csv", "path,split", "a.mp4,train")
    write_manifest(tmp_path / "nothing.csv", "file,split")
    write_manifest(tmp_path / "blank.csv", "file,split", "a.mp4,train", ",train")
    (tmp_path / "latin.csv").write_bytes("file\nü.mp4".encode("latin-1"))
    with pytest.raises(UserError, match=reason) as caught:
        pack_videos([str(tmp_path / given)], str(tmp_path / "out"), size=32)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_no_input_and_odd_sizes_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nothing to pack"):
        pack_videos([], str(tmp_path / "out"), size=32)
    with pytest.raises(UserError, match=r"size of 33 .* multiple of 32"):
        pack_videos([str(tmp_path)], str(tmp_path / "out"), size=33)


def test_output_in_use_is_refused(tmp_path: Path) -> None:
    films = make_films(tmp_path / "in", ["a.mp4", "b.mp4"])
    (tmp_path / "out").mkdir()
    (tmp_path / "out/index.json").write_text("{}")
    with pytest.raises(UserError, match="out: is not empty; choose another --out or remove it"):
        pack_videos([str(films)], str(tmp_path / "out"), size=32)
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="file: is a file; choose another --out"):
        pack_videos([str(films)], str(tmp_path / "file"), size=32)
    assert contents(tmp_path / "out") == {"index.json": b"{}"}


@pytest.mark.usefixtures("local_ray")
def test_nothing_usable_is_an_error_that_can_be_mended(tmp_path: Path) -> None:
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
    assert list(contents(tmp_path / "out")) == ["index.json", "shard-000000.tar"]


@pytest.mark.usefixtures("local_ray")
def test_interrupted_run_leaves_nothing(tmp_path: Path) -> None:
    films = make_films(tmp_path / "in", ["a.mp4", "b.mp4", "c.mp4"])

    def interrupt(progress: PackProgress) -> None:
        if progress.done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pack_videos([str(films)], str(tmp_path / "out"), size=32, on_progress=interrupt)
    assert contents(tmp_path / "out") == {}


# ---------------------------------------------------------------------------------------------
# Splits
# ---------------------------------------------------------------------------------------------


def entry(identity: str, split: str = "") -> Entry:
    return Entry(Path(identity), identity, identity, split)


@pytest.mark.parametrize(("identities", "tests"), [(1, 0), (2, 1), (10, 1), (24, 2), (40, 4)])
def test_a_tenth_of_the_identities_is_for_tests(identities: int, tests: int) -> None:
    entries = [entry(f"person {n % identities}") for n in range(3 * identities)]
    of_identity: dict[str, set[str]] = {}
    for item, split in zip(entries, assign_splits(entries), strict=True):
        of_identity.setdefault(item.identity, set()).add(split)
    assert all(len(splits) == 1 for splits in of_identity.values())
    for_tests = {name for name, splits in of_identity.items() if splits == {"test"}}
    assert len(for_tests) == tests
    by_hash = sorted(of_identity, key=lambda name: hashlib.sha256(name.encode()).hexdigest())
    assert for_tests == set(by_hash[:tests])
    assert assign_splits(entries[::-1]) == assign_splits(entries)[::-1]


def test_split_of_the_manifest_holds_for_its_identity() -> None:
    entries = [entry("ann", "val"), entry("ann"), entry("bob", "train"), entry("bob", "test")]
    assert assign_splits(entries) == ["val", "val", "train", "test"]
