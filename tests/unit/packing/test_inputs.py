"""Inputs name videos; what cannot be packed is rejected by name before anything is decoded."""

import os
from pathlib import Path
from typing import Any

import pytest
from fsspec.implementations.memory import MemoryFileSystem

from prioritycut_ray.errors import UserError
from prioritycut_ray.packing.entries import printable
from prioritycut_ray.packing.inputs import find_videos
from prioritycut_ray.packing.manifest import FrameRange
from prioritycut_ray.video.boxes import Box
from tests.packing_inputs import FACTS, identities, manifest, read, rejected, touched, write_tar
from tests.places import DEV

# ---------------------------------------------------------------------------------------------
# Files, folders, globs
# ---------------------------------------------------------------------------------------------


def test_every_way_to_name_a_video_finds_it_once(tmp_path: Path, monkeypatch: Any) -> None:
    for name in ("a/1.mp4", "a/2.MP4", "a/b/3.mkv", "[x].mp4", "-dash.mp4", ".h.mp4", "n.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / ".hidden").mkdir()
    (tmp_path / ".hidden/4.mp4").touch()
    monkeypatch.chdir(tmp_path)

    def found(*inputs: str) -> list[str]:
        return [os.path.relpath(e.source, tmp_path) for e in find_videos(inputs).entries]

    everything = ["-dash.mp4", "[x].mp4", "a/1.mp4", "a/2.MP4", "a/b/3.mkv"]
    assert found(".") == everything
    assert found(str(tmp_path)) == everything
    assert found("*") == everything
    assert found("a/*.mp4") == ["a/1.mp4"]
    assert found("**/*.mkv", "a") == ["a/b/3.mkv", "a/1.mp4", "a/2.MP4"]
    assert found("[x].mp4", "-dash.mp4") == ["[x].mp4", "-dash.mp4"]
    assert found("a/../a/1.mp4", "a/1.mp4", "a")[1:] == ["a/2.MP4", "a/b/3.mkv"]


def test_a_pattern_below_folders_with_brackets_in_their_names(tmp_path: Path) -> None:
    folder = tmp_path / "clips [1]" / "[a]b"
    folder.mkdir(parents=True)
    (folder / "1.mp4").touch()
    (tmp_path / "clips 1").mkdir()
    (tmp_path / "clips 1" / "2.mp4").touch()
    for pattern in ("clips [1]/*/*.mp4", "clips [1]/[a]b/*.mp4", "clips [1]/[a]b/[0-9].mp4"):
        for place in (str(tmp_path), f"file://{tmp_path}"):
            (found,) = find_videos([f"{place}/{pattern}"]).entries
            assert found.source.removeprefix("file://") == str(folder / "1.mp4")
    (found,) = find_videos([f"{tmp_path}/clips [0-9]/*.mp4"]).entries
    assert found.source == f"{tmp_path}/clips 1/2.mp4"


def test_braces_name_many_shards_or_folders(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(12):
        write_tar(tmp_path / f"train-{number:06d}.tar", [("a.mp4", b"x"), ("a.json", FACTS)])
    touched(tmp_path, "a/1.mp4", "b/1.mp4", "c/1.mp4", "{c,d}/2.mp4", "e{f,g}.mp4")

    def found(pattern: str) -> list[str]:
        results = [
            [entry.source for entry in find_videos([f"{place}/{pattern}"]).entries]
            for place in (str(tmp_path), f"file://{tmp_path}")
        ]
        names = [
            [source.removeprefix("file://").removeprefix(f"{tmp_path}/") for source in sources]
            for sources in results
        ]
        assert names[0] == names[1]
        return names[0]

    assert found("train-{000003..000005}.tar") == [f"train-00000{n}.tar" for n in (3, 4, 5)]
    assert found("{a,b}/*.mp4") == ["a/1.mp4", "b/1.mp4"]
    assert found("{b,a}") == ["b/1.mp4", "a/1.mp4"]
    monkeypatch.chdir(tmp_path)
    assert identities("{,a}") == ["1"], "an empty word is not the current folder"
    # A literal name comes first; a backslash escapes.
    assert found("{c,d}/*.mp4") == ["{c,d}/2.mp4"]
    assert found("e{f,g}.mp4") == ["e{f,g}.mp4"]
    assert found(r"[e]\{f,g\}.mp4") == ["e{f,g}.mp4"]


def test_paths_of_a_manifest_are_expanded_as_by_a_shell(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("CLIPS", str(tmp_path / "clips"))
    monkeypatch.delenv("NOT_SET", raising=False)
    for place in ("home", "clips", "data"):
        (tmp_path / place).mkdir()
    for name in ("home/a.mp4", "clips/b.mp4", "data/c$NOT_SET.mp4", "data/~d.mp4"):
        (tmp_path / name).touch()
    table = tmp_path / "data" / "clips.csv"
    files = ["~/a.mp4", "${CLIPS}/b.mp4", "c$NOT_SET.mp4", "~d.mp4", "$NOT_SET/e.mp4"]
    table.write_text("\n".join(["file", *files]))
    found = find_videos([str(table)])
    assert [Path(entry.source).name for entry in found.entries] == [
        "a.mp4",
        "b.mp4",
        "c$NOT_SET.mp4",
        "~d.mp4",
    ]
    (missing,) = found.rejected
    assert "$NOT_SET/e.mp4" in missing.file


def test_unusable_files_are_rejected_by_name(tmp_path: Path) -> None:
    (tmp_path / "good.mp4").touch()
    os.mkfifo(tmp_path / "pipe.mp4")
    (tmp_path / "loop.mp4").symlink_to("loop.mp4")
    (tmp_path / "gone.mp4").symlink_to("nowhere")
    (tmp_path / "folder.mp4").mkdir()
    (tmp_path / "circle").symlink_to(".")
    (tmp_path / "spiral").symlink_to("..")
    (tmp_path / "same.mp4").symlink_to("good.mp4")
    for given in (tmp_path, tmp_path / "**/*"):
        found = find_videos([str(given)])
        assert [Path(entry.source).name for entry in found.entries] == ["good.mp4"]
        assert rejected(given) == {
            "pipe.mp4": "is not a regular file",
            "loop.mp4": "is a broken link",
            "gone.mp4": "is a broken link",
        }


def test_names_are_printable(tmp_path: Path) -> None:
    names = [b"new\nline.mp4", b"\xff\xfe.mp4", b"\x1b[31mred.mp4", "ünï 1.mp4".encode()]
    for name in names:
        Path(os.fsdecode(os.fsencode(tmp_path) + b"/" + name)).write_bytes(name)
    entries = find_videos([str(tmp_path)]).entries
    assert len(entries) == 4
    for entry in entries:
        assert read(entry) in names
        assert entry.shown.encode().decode().isprintable()
        assert entry.identity.encode().decode().isprintable()
    assert {printable(entry.identity) for entry in entries} == {entry.identity for entry in entries}
    assert len({entry.identity for entry in entries}) == 4


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ("nowhere", "nowhere: does not exist"),
        ("none*.mp4", "no videos found"),
        ("none{1..3}.mp4", "none1.mp4: does not exist"),
        ("none{1..3.mp4", r"none\{1\.\.3\.mp4: its braces are not balanced"),
        ("empty", "empty: no videos found"),
        ("a\0b.mp4", r"a\\x00b.mp4: is not a valid file name"),
        ("nowhere://x/y.mp4", "cannot be reached"),
        ("memory://nowhere/y.mp4", "does not exist"),
        ("words.csv", "words.csv: needs a header with the column 'file'"),
        ("nothing.csv", "nothing.csv: needs a header"),
        ("blank.csv", "blank.csv, line 3: 'file' is empty"),
        ("latin.csv", "latin.csv: is not a csv in UTF-8"),
    ],
)
def test_input_without_videos_is_refused(given: str, reason: str, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "words.csv").write_text("path,split\na.mp4,train")
    (tmp_path / "nothing.csv").write_text("file,split\n")
    (tmp_path / "blank.csv").write_text("file,split\na.mp4,train\n,train")
    (tmp_path / "latin.csv").write_bytes("file\nü.mp4".encode("latin-1"))
    with pytest.raises(UserError, match=reason) as caught:
        find_videos([given if "://" in given else str(tmp_path / given)])
    assert "\n" not in str(caught.value)


def test_urls_are_searched_like_folders() -> None:
    fs = MemoryFileSystem()
    fs.store.clear()
    for name in ("a/1.mp4", "a/b/2.MOV", "a/._1.mp4", "a/.h/3.mp4", "a/n.txt"):
        fs.pipe_file(f"/bucket/{name}", name.encode())
    fs.pipe_file("/bucket/list.csv", b"file,identity\na/1.mp4,ann\nmemory://bucket/a/b/2.MOV,\nx,")
    folder = find_videos(["memory://bucket/a"])
    assert [entry.name for entry in folder.entries] == ["1", "b/2"]
    assert [read(entry) for entry in folder.entries] == [b"a/1.mp4", b"a/b/2.MOV"]
    assert all(entry.version for entry in folder.entries)
    assert [e.name for e in find_videos(["memory://bucket/a/*.mp4"]).entries] == ["1"]
    assert [e.name for e in find_videos(["memory://bucket/a/b/2.MOV"]).entries] == ["2"]
    listed = find_videos(["memory://bucket/list.csv"])
    assert [(entry.identity, read(entry)) for entry in listed.entries] == [
        ("ann", b"a/1.mp4"),
        ("a/b/2", b"a/b/2.MOV"),
    ]
    assert [item.reason for item in listed.rejected] == [
        "line 4 of the manifest: No such file or directory"
    ]
    fs.store.clear()


# ---------------------------------------------------------------------------------------------
# Manifests
# ---------------------------------------------------------------------------------------------


def test_rows_of_a_manifest_are_checked_one_by_one(tmp_path: Path) -> None:
    (tmp_path / "a.mp4").touch()
    (tmp_path / "other").mkdir()
    boxes = [
        "0,1,10,11",
        ",,,",
        "1.4,2,9.6,8",
        "5,0,5,9",
        "-1,0,5,5",
        "a,b,c,d",
        "1,2,,",
        "0,0,nan,9",
    ]
    rows = [f"a.mp4,{box}" for box in boxes]
    rows += [f"gone.mp4{',' * 4}", f"../x.mp4{',' * 4}", f"other{',' * 4}", f"a\0b.mp4{',' * 4}"]
    (tmp_path / "m.csv").write_text("\n".join(["file,left,top,right,bottom", *rows]))
    found = find_videos([str(tmp_path / "m.csv")])
    assert [entry.box for entry in found.entries] == [Box(0, 1, 10, 11), None, Box(1, 2, 10, 8)]
    reasons = [item.reason for item in found.rejected]
    for line, reason in enumerate(reasons[:5], start=5):
        assert reason.startswith(f"line {line} of the manifest: the box ")
    assert reasons[5:] == [
        "line 10 of the manifest: No such file or directory",
        "line 11 of the manifest: No such file or directory",
        "line 12 of the manifest: is a folder; state --fps if it holds the frames of a clip",
        "line 13 of the manifest: embedded null byte",
    ]
    path = tmp_path / "m.csv"
    assert found.notes == [f"{path}: 4 of its 12 rows have no usable file; rejected.csv lists them"]


@pytest.mark.parametrize(
    "box", ["-1,0,5,5", "a,b,c,d", "1,2,,", "0,0,nan,9", "0,0,inf,9", "5,5,5,9"]
)
def test_impossible_box_is_named_with_its_line(box: str, tmp_path: Path) -> None:
    (tmp_path / "a.mp4").touch()
    (tmp_path / "m.csv").write_text(f"file,left,top,right,bottom\na.mp4,{box}")
    assert rejected(tmp_path / "m.csv")["a.mp4"].startswith("line 2 of the manifest: the box")


@pytest.mark.parametrize(
    "text",
    [
        "file, identity, split\na.mp4, ann, test\n",
        "File,IDENTITY,Split\r\na.mp4,ann,Test\r\n",
        "\ufefffile,identity_id ,split,\na.mp4,ann , test,\n",
        'file, identity, split, note\n"a.mp4", "ann", "test", plain, with commas\n',
        "\n\nIdentity ID,file,split,fps\n\n\nann,a.mp4,TEST,25\n",
    ],
)
def test_header_may_be_spelled_in_many_ways(text: str, tmp_path: Path) -> None:
    [entry] = find_videos([manifest(tmp_path, text)]).entries
    assert (entry.identity, entry.split, entry.by_name) == ("ann", "test", False)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("file,persona\na.mp4,ann", r"column 'persona' .* one of file, identity, .*bottom"),
        ("file,identity,split,partition\na.mp4,ann,,test", "columns 'split' and 'partition'"),
        ("file,bbox,left\na.mp4,0 0 1 1,3", "columns 'bbox' and 'left'"),
        ("file|identity\na.mp4|ann", r"'file\|identity'.* separated by commas, semicolons or"),
        ("file,split,Split\na.mp4,test,train", "the column 'split' 2 times"),
        ("file,identity,identity_id\na.mp4,ann,bob", "'identity' and 'identity_id'"),
        ("file,\na.mp4,ann", "line 2: 'ann' is in a column without a name"),
        ("file,split\n\na.mp4,x\n\nb.mp4", "line 5: has 1 cells, but the header has 2"),
        ("file,split\na,b.mp4,test", "line 2: has 3 cells"),
    ],
)
def test_unclear_manifest_is_an_error(text: str, reason: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=rf"m\.csv.*{reason}") as caught:
        find_videos([manifest(tmp_path, text)])
    assert "\n" not in str(caught.value)


def test_every_row_of_a_file_counts(tmp_path: Path) -> None:
    path = manifest(
        tmp_path,
        "file,start,end,identity,split,left,top,right,bottom\n"
        "a.mp4,0,10,ann,train,,,,\n"
        "a.mp4,10,20,ann,test,,,,\n"
        "\n"
        "./a.mp4,0,10,ann,train,,,,\n"
        "a.mp4,,,bob,test,0,0,8,8\n"
        "b.mp4,5,,,,,,,\n"
        "c.mp4,1.5,4,,,,,,\n"
        "d.mp4,7,7,,,,,,\n"
        "d.mp4,x,7,,,,,,\n",
    )
    found = find_videos([path])
    assert [(Path(e.source).name, e.frames, e.identity, e.split) for e in found.entries] == [
        ("a.mp4", FrameRange(0, 10), "ann", "train"),
        ("a.mp4", FrameRange(10, 20), "ann", "test"),
        ("a.mp4", None, "bob", "test"),
        ("b.mp4", FrameRange(5, None), "b", ""),
    ]
    assert found.notes == [f"{path}, line 5: repeats line 2; it is packed once"]
    assert [(Path(item.file).name, item.reason) for item in found.rejected] == [
        (
            "c.mp4",
            "line 8 of the manifest: start 1.5 and end 4 must be whole frame numbers, from 0 "
            "(not seconds)",
        ),
        ("d.mp4", "line 9 of the manifest: start 7 and end 7 select no frames"),
        ("d.mp4", "line 10 of the manifest: start x and end 7 must be frame numbers"),
    ]


@pytest.mark.parametrize(
    "rows",
    [
        "a.mp4,ann,train,,\n\na.mp4,ann,test,,",
        "a.mp4,ann,train,,\n\na.mp4,bob,train,,",
        "a.mp4,ann,train,,\n\n../x/a.mp4,,train,,",
        "a.mp4,ann,train,0,9\n\na.mp4,ann,test,8,",
        "a.mp4,ann,train,3,\n\na.mp4,ann,test,0,4",
    ],
)
def test_rows_that_contradict_each_other_are_an_error(rows: str, tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    path = manifest(tmp_path / "x", f"file,identity,split,start,end\n{rows}\n")
    with pytest.raises(UserError, match=r"m\.csv, line 4: contradicts line 2: .* keep one"):
        find_videos([path])
    other = Path(path).rename(tmp_path / "x/n.csv")
    path = manifest(tmp_path / "x", "file,split\na.mp4,val\n")
    other.write_text("file,split\nb.mp4,val\na.mp4,test\n")
    with pytest.raises(UserError, match=r"n\.csv, line 3: contradicts .*m\.csv, line 2: the split"):
        find_videos([path, str(other)])


def test_home_and_variables_are_expanded(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("CLIPS", str(tmp_path / "clips"))
    touched(tmp_path / "clips", "a.mp4", "b.mp4", "$c.mp4")
    path = manifest(tmp_path / "clips", "file\n~/clips/a.mp4\n$CLIPS/b.mp4\n$c.mp4\n$NONE/d.mp4")
    found = find_videos([path])
    assert [Path(e.source).name for e in found.entries] == ["a.mp4", "b.mp4", "$c.mp4"]
    assert [Path(item.file).parent.name for item in found.rejected] == ["$NONE"]
    assert identities("~/clips/a.mp4", "$CLIPS/b.mp4") == ["a", "b"]


def test_a_manifest_takes_precedence_over_its_folder(tmp_path: Path) -> None:
    path = manifest(tmp_path, "file,identity,split\nb.mp4,bob,test\n")
    for inputs in ([path, str(tmp_path)], [str(tmp_path), path]):
        found = find_videos(inputs).entries
        assert sorted((e.identity, e.split) for e in found) == [
            ("a", ""),
            ("bob", "test"),
            ("c", ""),
            ("d", ""),
        ]


@pytest.mark.skipif(not DEV.exists(), reason="needs ../shared/data/dev")
def test_manifest_of_the_real_clips_is_read() -> None:
    entries, unusable, _ = find_videos([str(DEV / "MANIFEST.csv")])
    assert (len(entries), unusable) == (23, [])
    assert all(Path(entry.source).exists() for entry in entries)
    assert ("obama_3", "obama", "test") in [(e.name, e.identity, e.split) for e in entries]
