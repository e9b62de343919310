"""The layouts in which peers publish their data sets are packed as they lie.

Each test makes a small copy of one: names, folders and columns are the published ones, the
pictures are synthetic.
"""

import shutil
from pathlib import Path

import numpy as np
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from PIL import Image

from prioritycut_ray.errors import UserError
from prioritycut_ray.packing.clips import Outcome, Recipe, make_part, read_part
from prioritycut_ray.packing.entries import Entry
from prioritycut_ray.packing.inputs import find_videos
from prioritycut_ray.packing.layout import Layout
from prioritycut_ray.packing.tasks import make_part_within
from prioritycut_ray.video.encoding import write_video
from prioritycut_ray.video.images import resize
from prioritycut_ray.video.random_access import read_all
from tests.packing_inputs import moving_rectangle as film
from tests.packing_inputs import touched

RECIPE = Recipe(size=64, copy=False, max_frames=100)
FRAMES = Layout(fps=25.0)
STRIPS = Layout(fps=25.0, strip_width=64)


def write_frames(folder: Path, frames: list[np.ndarray], name: str = "{:07}.png") -> Path:
    folder.mkdir(parents=True)
    for number, frame in enumerate(frames):
        Image.fromarray(frame).save(folder / name.format(number))
    return folder


def write_strip(path: Path, frames: list[np.ndarray], mode: str = "RGB") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.concatenate(frames, axis=1)).convert(mode).save(path)
    return path


def write_gif(path: Path, frames: list[np.ndarray]) -> Path:
    first, *others = map(Image.fromarray, frames)
    first.save(path, save_all=True, append_images=others, duration=40)
    return path


def packed(entry: Entry) -> np.ndarray:
    """Return the frames of the only clip of an entry."""
    [clip] = read_part(make_part(entry, RECIPE))[1]
    return read_all(clip, 64).astype(int)


def outcome(entry: Entry, recipe: Recipe = RECIPE) -> Outcome:
    return read_part(make_part_within(60, entry, recipe))[0]


def near(frames: np.ndarray, expected: list[np.ndarray], limit: float = 4) -> bool:
    return frames.shape == np.stack(expected).shape and bool(
        np.abs(frames - np.stack(expected)).mean() < limit
    )


# ---------------------------------------------------------------------------------------------
# First Order Motion: frames, strips, gifs and videos in train/ and test/
# ---------------------------------------------------------------------------------------------


def test_clips_of_all_kinds_in_one_tree(tmp_path: Path) -> None:
    """The tree that FramesDataset reads: every item of train/ and test/ is a clip."""
    root = tmp_path / "mixed"
    write_frames(root / "train/id1#abc#00012#00100.mp4", film(6, 1))
    write_strip(root / "train/id2#abc#1.png", film(7, 2))
    write_video(root / "train/id3#abc#1.mp4", film(8, 3), 25.0)
    write_frames(root / "test/id4#abc#1", film(9, 4), "{}.jpg")
    write_gif(root / "test/id5#abc#1.gif", film(10, 5))
    found = find_videos([str(root)], STRIPS)
    assert (found.rejected, found.notes) == ([], [])
    by_identity = {entry.identity: entry for entry in found.entries}
    assert {name: entry.split for name, entry in by_identity.items()} == {
        **dict.fromkeys(("id1", "id2", "id3"), "train"),
        **dict.fromkeys(("id4", "id5"), "test"),
    }
    for seed in range(1, 6):
        entry = by_identity[f"id{seed}"]
        assert near(packed(entry), film(5 + seed, seed), 6), entry
        assert abs(outcome(entry).fps - 25.0) < 1e-6
    names = sorted(entry.name for entry in found.entries)
    assert names[0] == "test/id4#abc#1"
    assert "train/id1#abc#00012#00100" in names


def test_frames_are_in_natural_order(tmp_path: Path) -> None:
    frames = film(12)
    write_frames(tmp_path / "in/clip", frames, "frame{}.png")
    [entry] = find_videos([str(tmp_path / "in")], FRAMES).entries
    assert near(packed(entry), frames)
    # The folder of frames may also be the input itself.
    [alone] = find_videos([str(tmp_path / "in/clip")], FRAMES).entries
    assert (alone.source, alone.name) == (entry.source, "clip")


def test_frames_without_a_rate_are_not_packed_silently(tmp_path: Path) -> None:
    write_frames(tmp_path / "in/a", film(3))
    with pytest.raises(UserError, match=r"1 folders of pictures .*/in/a; state --fps"):
        find_videos([str(tmp_path / "in")])
    touched(tmp_path / "in", "b/1.mp4", "b/1.jpg", "b/2.jpg")
    found = find_videos([str(tmp_path / "in")])
    assert [entry.name for entry in found.entries] == ["b/1"]
    assert found.notes[0] == (
        f"{tmp_path}/in: 1 folders of pictures are not packed, such as {tmp_path}/in/a; state "
        "--fps to pack each of them as a clip"
    )
    # Pictures beside videos are thumbnails.
    found = find_videos([str(tmp_path / "in")], FRAMES)
    assert sorted(entry.name for entry in found.entries) == ["a", "b/1"]
    assert found.notes == [
        f"{tmp_path}/in: 2 pictures beside videos or splits are not packed; if they are strips "
        "of frames, state --strip-width"
    ]


def test_frames_and_strips_that_cannot_be_used_are_named(tmp_path: Path) -> None:
    folder = write_frames(tmp_path / "in/a", film(5))
    (folder / "0000003.png").write_bytes((folder / "0000003.png").read_bytes()[:60])
    write_frames(tmp_path / "in/one", film(1))
    write_strip(tmp_path / "in/t/other.png", film(5, width=80))
    write_strip(tmp_path / "in/s/good.png", film(5))
    write_strip(tmp_path / "in/s/odd.png", film(5, width=65))
    write_strip(tmp_path / "in/s/one.png", film(1))
    (tmp_path / "in/s/html.png").write_bytes(b"<html>")
    (tmp_path / "in/s/gone.png").symlink_to("nowhere")
    found = find_videos([str(tmp_path / "in")], STRIPS)
    assert [item.reason for item in found.rejected] == ["is a broken link"]
    reasons = {entry.name: outcome(entry).rejected for entry in found.entries}
    assert reasons["a"].startswith("its frame 0000003.png is damaged or cut off")
    assert reasons["one"].startswith("1 frame:")
    assert reasons["t/other"] == "is 400 pixels wide, which is not a multiple of --strip-width 64"
    assert reasons["s/good"] == ""
    assert reasons["s/odd"] == "is 325 pixels wide, which is not a multiple of --strip-width 64"
    assert reasons["s/one"].startswith("1 frame:")
    assert "not a picture" in reasons["s/html"]
    copy = RECIPE._replace(copy=True)
    assert outcome(found.entries[0], copy).rejected == "cannot be copied: it is stored as pictures"


def test_strips_of_every_colour_mode(tmp_path: Path) -> None:
    frames = film(6)
    for mode in ("L", "RGBA", "P"):
        write_strip(tmp_path / f"{mode}/a.png", frames, mode)
        [entry] = find_videos([str(tmp_path / mode / "a.png")], Layout(strip_width=64)).entries
        assert packed(entry).shape == (6, 64, 64, 3)
        assert outcome(entry).fps == 25.0


def test_pictures_above_clips_are_not_clips(tmp_path: Path) -> None:
    for name in ("train/a", "test/b", "test/b/c"):
        write_frames(tmp_path / name, film(3))
    for name in ("overview.png", "logo.png", "test/mosaic.png"):
        Image.fromarray(film(1)[0]).save(tmp_path / name)
    found = find_videos([str(tmp_path)], FRAMES)
    assert [entry.name for entry in found.entries] == ["test/b", "test/b/c", "train/a"]
    [note] = found.notes
    assert "3 pictures beside videos or splits are not packed" in note


def test_a_changed_frame_is_a_new_version(tmp_path: Path) -> None:
    folder = write_frames(tmp_path / "in/a", film(3))
    [before] = find_videos([str(tmp_path / "in")], FRAMES).entries
    assert before == find_videos([str(tmp_path / "in")], FRAMES).entries[0]
    Image.fromarray(film(1, seed=9)[0]).save(folder / "0000001.png")
    [after] = find_videos([str(tmp_path / "in")], FRAMES).entries
    assert after.version != before.version


def test_frames_in_an_object_store(tmp_path: Path) -> None:
    fs = MemoryFileSystem()
    fs.store.clear()
    write_frames(tmp_path / "train/a", film(5))
    write_strip(tmp_path / "train/b.png", film(6, 1))
    for path in tmp_path.rglob("*.png"):
        fs.pipe_file(f"/bucket/{path.relative_to(tmp_path)}", path.read_bytes())
    entries = find_videos(["memory://bucket"], STRIPS).entries
    assert [(entry.name, entry.split) for entry in entries] == [
        ("train/a", "train"),
        ("train/b", "train"),
    ]
    assert near(packed(entries[0]), film(5))
    assert near(packed(entries[1]), film(6, 1))
    fs.store.clear()


def test_a_manifest_may_name_folders_of_frames_and_strips(tmp_path: Path) -> None:
    write_frames(tmp_path / "frames/a", film(5))
    write_strip(tmp_path / "b.png", film(6, 1))
    (tmp_path / "empty").mkdir()
    table = tmp_path / "m.csv"
    table.write_text("file,identity,start,end\nframes/a,ann,1,4\nb.png,bob,,\nempty,eve,,\n")
    found = find_videos([str(table)], STRIPS)
    assert [(entry.identity, entry.name) for entry in found.entries] == [
        ("ann", "frames/a"),
        ("bob", "b"),
    ]
    assert near(packed(found.entries[0]), film(5)[1:4])
    assert near(packed(found.entries[1]), film(6, 1))
    assert [item.reason for item in found.rejected] == [
        "line 4 of the manifest: is a folder without pictures"
    ]
    assert "is a folder; state --fps" in find_videos([str(table)]).rejected[0].reason


@pytest.mark.parametrize(
    ("layout", "reason"),
    [
        (Layout(fps=0.0), "--fps 0: must be"),
        (Layout(fps=float("nan")), "--fps nan: must be"),
        (Layout(strip_width=0), "--strip-width 0: must be"),
        (Layout(identity_from="("), r"--identity-from '\(': is not a regular expression"),
        (Layout(identity_from="(a)(b)"), "has 2 groups"),
    ],
)
def test_impossible_options_are_refused(layout: Layout, reason: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=reason):
        find_videos(touched(tmp_path, "a.mp4"), layout)


# ---------------------------------------------------------------------------------------------
# Identities
# ---------------------------------------------------------------------------------------------


def identities(layout: Layout, *inputs: str) -> list[str]:
    return [entry.identity for entry in find_videos(inputs, layout).entries]


def test_identity_is_what_precedes_the_first_hash(tmp_path: Path) -> None:
    names = ["id1#a#1#2.mp4", "id1#b.mp4", "id2#a.mp4", "#x.mp4", "y.mp4"]
    touched(tmp_path, *(f"train/{name}" for name in names))
    assert identities(Layout(), str(tmp_path)) == [
        "train/#x",
        "id1",
        "id1",
        "id2",
        "train/y",
    ]


def test_identity_from_folder_name_or_pattern(tmp_path: Path) -> None:
    """VoxCeleb2's folders: identity, video, utterance."""
    names = ["train/id1/vid/1.mp4", "train/id1/wid/1.mp4", "test/id2/vid/1.mp4"]
    files = touched(tmp_path / "dev", *names)
    root = str(tmp_path / "dev")
    assert identities(Layout(identity_from="folder"), root) == ["id2", "id1", "id1"]
    assert identities(Layout(identity_from="name"), root) == ["1", "1", "1"]
    assert identities(Layout(identity_from=r"id\d"), root) == ["id2", "id1", "id1"]
    assert identities(Layout(identity_from=r"/(\w)id/"), root) == ["v", "v", "w"]
    # A shell has expanded a pattern: the folders are above the inputs.
    assert identities(Layout(identity_from=r"/(id\d)/"), *files) == ["id1", "id1", "id2"]
    assert identities(Layout(identity_from="folder"), *files) == ["vid", "wid", "vid"]
    with pytest.raises(UserError, match=r"finds no identity in 1 of 3 paths, such as .*/wid/1"):
        find_videos([root], Layout(identity_from="vid"))
    with pytest.raises(UserError, match=r"needs a folder for each identity"):
        find_videos(touched(tmp_path, "train/a.mp4"), Layout(identity_from="folder"))


def test_a_manifest_takes_precedence_over_identity_from(tmp_path: Path) -> None:
    touched(tmp_path, "x/a.mp4", "x/b.mp4")
    (tmp_path / "m.csv").write_text("file,identity\nx/a.mp4,ann\nx/b.mp4,\n")
    layout = Layout(identity_from="folder")
    assert identities(layout, str(tmp_path / "m.csv")) == ["ann", "x"]


# ---------------------------------------------------------------------------------------------
# VoxCeleb and Tai-Chi-HD: metadata for videos that are on disk
# ---------------------------------------------------------------------------------------------

VOX = "video_id,start,end,bbox,fps,width,height,partition,person_id\n"


def scene(count: int, height: int, width: int, along: str = "columns") -> list[np.ndarray]:
    """Gray frames that get brighter along columns, rows, or time."""
    ramps = {
        "columns": np.broadcast_to(250 * np.arange(width) / width, (count, height, width)),
        "rows": np.broadcast_to(250 * np.arange(height)[:, None] / height, (count, height, width)),
        "time": np.broadcast_to(6 * np.arange(count)[:, None, None], (count, height, width)),
    }
    return [*np.repeat(ramps[along][..., None], 3, axis=3).astype(np.uint8)]


def cropped(frames: list[np.ndarray], box: str) -> list[np.ndarray]:
    """Crop frames to LEFT-TOP-RIGHT-BOTTOM and scale them."""
    left, top, right, bottom = map(int, box.split("-"))
    return [resize(frame[top:bottom, left:right], 64) for frame in frames]


def rows(tmp_path: Path, text: str) -> list[Entry]:
    (tmp_path / "metadata.csv").write_text(text)
    found = find_videos([str(tmp_path / "metadata.csv")])
    assert found.rejected == []
    return found.entries


def test_voxceleb_metadata(tmp_path: Path) -> None:
    """Header and notation of vox-metadata.csv; one video has half the size, one another rate."""
    (tmp_path / "videos").mkdir()
    wide, high = scene(40, 72, 128), scene(40, 72, 128, "rows")
    write_video(tmp_path / "videos/WMh3ye5tBsE.mp4", wide, 25.0)
    write_video(tmp_path / "videos/tCq2LcKO6xY.mp4", high, 25.0)
    write_video(tmp_path / "videos/bDxy7bnj_bc.mp4", scene(40, 72, 72, "time"), 50.0)
    entries = rows(
        tmp_path,
        VOX + "WMh3ye5tBsE,10,25,100-20-200-120,25,256,144,train,id10005\n"
        "WMh3ye5tBsE,25,40,100-20-160-120,25,256,144,train,id10005\n"
        "tCq2LcKO6xY,0,15,100-40-200-120,25,256,144,train,id10003\n"
        "bDxy7bnj_bc,5,15,0-0-144-144,25,144,144,test,id10003\n",
    )
    assert [(e.identity, e.split, e.name) for e in entries] == [
        ("id10005", "train", "WMh3ye5tBsE"),
        ("id10005", "train", "WMh3ye5tBsE"),
        ("id10003", "train", "tCq2LcKO6xY"),
        ("id10003", "test", "bDxy7bnj_bc"),
    ]
    # The stated size is twice that of the video.
    assert near(packed(entries[0]), cropped(wide[10:25], "50-10-100-60"), 1.5)
    # A box that is not square grows to a square, and is never stretched.
    assert near(packed(entries[1]), cropped(wide[25:40], "40-10-90-60"), 1.5)
    assert near(packed(entries[2]), cropped(high[:15], "50-15-100-65"), 1.5)
    # At 50 fps, frames 5 to 15 at 25 fps are frames 10 to 30.
    expected = cropped(scene(40, 72, 72, "time")[10:30], "0-0-72-72")
    assert near(packed(entries[3]), expected, 1.5)


def test_taichi_metadata_and_its_identities(tmp_path: Path) -> None:
    """taichi-metadata.csv names no persons; clips of one video are never divided by a split."""
    write_video(tmp_path / "u6rJiF-gPx8.mp4", scene(40, 48, 64), 29.97)
    write_video(tmp_path / "NBGys-uxScs.mov", scene(9, 48, 64), 29.97)
    entries = rows(
        tmp_path,
        "video_id,start,end,bbox,fps,width,height\n"
        "u6rJiF-gPx8,8,30,118-82-508-472,29.97,640,480\n"
        "u6rJiF-gPx8,30,38,168-99-488-419,29.97,640,480\n"
        "NBGys-uxScs,0,9,152-118-440-406,29.97,640,480\n",
    )
    assert [entry.identity for entry in entries] == ["u6rJiF-gPx8", "u6rJiF-gPx8", "NBGys-uxScs"]
    assert [len(packed(entry)) for entry in entries] == [22, 8, 9]


def test_a_person_may_follow_in_the_video_id(tmp_path: Path) -> None:
    """crop_vox.py writes VIDEO#PERSON."""
    touched(tmp_path, "abc.mp4")
    [entry] = rows(tmp_path, "video_id,start,end,fps,partition\nabc#id10001,0,5,25,test\n")
    assert (entry.identity, entry.split, entry.name) == ("id10001", "test", "abc")


def test_a_video_id_may_be_a_path_or_have_an_extension(tmp_path: Path) -> None:
    touched(tmp_path, "videos/id1/1.mp4", "videos/id2/1.mkv")
    table = "video_id\nvideos/id1/1\nvideos/id2/1.mkv\n"
    assert [Path(one.source).parent.name for one in rows(tmp_path, table)] == ["id1", "id2"]


@pytest.mark.parametrize(
    "cells",
    [
        "bbox\na,64 18 96 54",
        "bbox\na,64-18-96-54",
        'bbox\na,"[64, 18, 96, 54]"',
        "bbox\na,0.5 0.25 0.75 0.75",
        "bbox,width,height\na,640 180 960 540,1280,720",
        "left,top,right,bottom\na,64,18,96,54",
        "left,top,right,bottom\na,0.5,0.25,0.75,0.75",
    ],
)
def test_a_box_in_every_notation(cells: str, tmp_path: Path) -> None:
    frames = scene(4, 72, 128)
    write_video(tmp_path / "a.mp4", frames, 25.0)
    [entry] = rows(tmp_path, f"video_id,{cells}\n")
    # A box of 32x36 pixels from 64,18 grows to 36x36 from 62.
    assert near(packed(entry), cropped(frames, "62-18-98-54"), 1.5)


def test_what_lies_outside_the_frame_replicates_its_border(tmp_path: Path) -> None:
    wide, high = scene(4, 64, 64), scene(4, 64, 64, "rows")
    write_video(tmp_path / "a.mp4", wide, 25.0)
    write_video(tmp_path / "b.mp4", high, 25.0)
    [left, below] = rows(tmp_path, "video_id,bbox\na,-32 0 32 64\nb,-0.5 0.5 0.5 1.5\n")
    columns, down = np.maximum(np.arange(-32, 32), 0), np.minimum(np.arange(32, 96), 63)
    assert near(packed(left), [frame[:, columns] for frame in wide], 1.5)
    assert near(packed(below), [frame[down] for frame in high], 1.5)
    [beside, far] = rows(tmp_path, "video_id,bbox\na,70 0 90 20\na,0 0 640 480\n")
    assert outcome(beside).rejected == "its box 70,0,90,20 is outside its frames of 64x64"
    assert "far more than its frames of 64x64; state the size" in outcome(far).rejected


def test_segments_in_seconds(tmp_path: Path) -> None:
    write_video(tmp_path / "a.mp4", scene(40, 64, 64), 20.0)
    (tmp_path / "m.csv").write_text("video_id,start,end,age\na,0.5,1.25,30\na,1,9,31\na,5,6,32\n")
    found = find_videos([str(tmp_path / "m.csv")])
    assert found.notes == [
        f"{tmp_path}/m.csv: has no column 'fps', so its start and end are taken as seconds",
        f"{tmp_path}/m.csv: the columns 'age' are not used",
    ]
    assert len(packed(found.entries[0])) == 15
    short = outcome(found.entries[1])
    assert [one.frames for one in short.segments] == [20]
    assert short.warnings == ("ends 140 frames before the end of its segment",)
    assert "are outside its 40 frames" in outcome(found.entries[2]).rejected


def test_rows_without_a_video_are_counted_and_listed(tmp_path: Path) -> None:
    touched(tmp_path, "videos/abc.mp4", "other/xyz.mp4")
    (tmp_path / "m.csv").write_text(
        f"{VOX}abc,0,9,0-0-9-9,25,64,64,train,id1\ngone,0,9,0-0-9-9,25,64,64,train,id2\n"
        "gone,9,19,0-0-9-9,25,64,64,train,id2\nabc,9,9,0-0-9-9,25,64,64,train,id1\n"
        "abc,0,9,9-0-0-9,25,64,64,train,id1\nabc,0,9,0-0-9-9,0,64,64,train,id1\n"
    )
    found = find_videos([str(tmp_path / "m.csv")])
    assert len(found.entries) == 1
    assert found.notes == [
        f"{tmp_path}/m.csv: 2 of its 6 rows have no usable file; rejected.csv lists them"
    ]
    assert [(Path(item.file).name, item.reason) for item in found.rejected] == [
        ("gone.mp4", "line 3 of the manifest: No such file or directory"),
        ("gone.mp4", "line 4 of the manifest: No such file or directory"),
        ("abc.mp4", "line 5 of the manifest: start 9 and end 9 select no frames"),
        (
            "abc.mp4",
            "line 6 of the manifest: the box 9,0,0,9 is empty; it must be left, top, right, bottom",
        ),
        ("abc.mp4", "line 7 of the manifest: its fps 0 must be a number above 0"),
    ]


def test_videos_may_be_in_a_folder_beside_the_metadata(tmp_path: Path) -> None:
    touched(tmp_path / "videos", "a/abc.mp4", "unlisted.mp4")
    touched(tmp_path / "csv", "z/abc.mp4", "w/def.mp4", "v/def.mov")
    table = tmp_path / "csv/m.csv"
    table.write_text("video_id,partition\nabc,train\ndef,test\n")
    for inputs in ([str(table), str(tmp_path / "videos")], [f"{tmp_path}/videos", str(table)]):
        found = find_videos(inputs)
        sources = {Path(entry.source) for entry in found.entries}
        assert sources == {tmp_path / "videos/a/abc.mp4", tmp_path / "csv/v/def.mov"}
        assert f"{tmp_path}/videos: only the videos that the csv file names are packed" in (
            found.notes
        )
        assert any("2 of its videos are there several times" in note for note in found.notes)


def test_metadata_and_videos_in_an_object_store(tmp_path: Path) -> None:
    fs = MemoryFileSystem()
    fs.store.clear()
    write_video(tmp_path / "abc.mp4", scene(6, 64, 64), 25.0)
    fs.pipe_file("/bucket/videos/abc.mp4", (tmp_path / "abc.mp4").read_bytes())
    fs.pipe_file("/bucket/m.csv", f"{VOX}abc,0,5,0-0-64-64,25,64,64,test,id1\n".encode())
    [entry] = find_videos(["memory://bucket/m.csv"]).entries
    assert (entry.identity, entry.split, len(packed(entry))) == ("id1", "test", 5)
    fs.store.clear()


@pytest.mark.parametrize(
    "encoded",
    [
        "\ufefffile,identity\r\na.mp4,ann\r\n",
        "file;identity\na.mp4;ann\n",
        "file\tidentity\na.mp4\tann\n",
        '\ufeff"file";"identity";"split"\r\n"a.mp4";"ann";""\r\n',
        'video_id,person_id,bbox\na,ann,"0 0 8 8"\n',
        "video_id;person_id;bbox\na;ann;0,0,8,8\n",
    ],
)
def test_csv_as_spreadsheets_save_it(encoded: str, tmp_path: Path) -> None:
    touched(tmp_path, "a.mp4")
    (tmp_path / "m.csv").write_bytes(encoded.encode())
    [entry] = find_videos([str(tmp_path / "m.csv")]).entries
    assert (entry.identity, Path(entry.source).name) == ("ann", "a.mp4")


@pytest.mark.parametrize("encoding", ["latin-1", "utf-16"])
def test_csv_that_is_not_utf8_is_an_error(encoding: str, tmp_path: Path) -> None:
    (tmp_path / "m.csv").write_bytes("file,identity\nü.mp4,ann\n".encode(encoding))
    with pytest.raises(UserError, match=r"m\.csv: is not a csv in UTF-8 .*; save it as UTF-8"):
        find_videos([str(tmp_path / "m.csv")])


def test_every_layout_survives_being_moved(tmp_path: Path) -> None:
    """Names and identities do not depend on where the tree lies."""
    root = tmp_path / "one"
    write_frames(root / "train/id1#a", film(3))
    write_strip(root / "test/id2#b.png", film(3))
    first = find_videos([str(root)], STRIPS).entries
    shutil.copytree(root, tmp_path / "two")
    second = find_videos([str(tmp_path / "two")], STRIPS).entries
    facts = [[(e.name, e.identity, e.split, e.pictures) for e in one] for one in (first, second)]
    assert facts[0] == facts[1]
