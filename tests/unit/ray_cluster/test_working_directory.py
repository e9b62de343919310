"""Which files of a working directory are packed for a cluster."""

import os
import socket
import zipfile
from pathlib import Path

import pytest

from prioritycut_ray.errors import UserError
from prioritycut_ray.ray_cluster.working_directory import pack


@pytest.fixture
def here(tmp_path: Path) -> Path:
    folder = tmp_path / "here"
    folder.mkdir()
    return folder


def write(folder: Path, *names: str) -> None:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)


def packed(here: Path, *excludes: str, required: tuple[str, ...] = ()) -> set[str]:
    package = pack(here, here.parent / "package.zip", excludes, required)
    with zipfile.ZipFile(package.file) as archive:
        return set(archive.namelist())


def test_a_package_leaves_out_what_a_job_does_not_need(here: Path, tmp_path: Path) -> None:
    write(here, "mine.yaml", "deep/er.py", "runs/x/step.bin", ".venv/bin/python", "clip.mp4")
    write(here, "notes.txt", "secret.key", "deep/cache.tmp", ".git/config", "a/__pycache__/b.pyc")
    (here / ".gitignore").write_text("*.tmp\n")
    (here / ".rayignore").write_text("notes.txt\n")
    package = pack(here, tmp_path / "package.zip", ["*.key"])
    with zipfile.ZipFile(package.file) as archive:
        names = set(archive.namelist())
    assert names == {"mine.yaml", "deep/er.py", ".gitignore", ".rayignore"}
    assert package.files == 4
    assert package.size_bytes == package.file.stat().st_size
    assert package.left_out == ()


def test_an_empty_folder_can_be_packed(here: Path, tmp_path: Path) -> None:
    assert pack(here, tmp_path / "package.zip").files == 0


def test_a_package_that_is_too_large_names_the_largest_file(here: Path, tmp_path: Path) -> None:
    write(here, "small.txt")
    (here / "large.bin").write_bytes(os.urandom(2000))
    with pytest.raises(UserError, match=r"largest file so far is large\.bin.*--exclude"):
        pack(here, tmp_path / "package.zip", limit=1000)


def test_nested_ignore_files_decide_as_in_git(here: Path) -> None:
    write(here, "a.log", "sub/b.log", "sub/keep.log", "sub/only.txt", "sub/deep/only.txt")
    write(here, "other/only.txt")
    (here / ".gitignore").write_text("*.log\n")
    (here / "sub" / ".gitignore").write_text("!keep.log\n/only.txt\n")
    names = packed(here, ".gitignore")
    assert names == {"sub/keep.log", "sub/deep/only.txt", "other/only.txt"}


def test_an_excluded_folder_hides_what_its_own_files_allow(here: Path) -> None:
    write(here, "out/a.txt")
    (here / ".gitignore").write_text("out/\n")
    (here / "out" / ".gitignore").write_text("!a.txt\n")
    assert packed(here) == {".gitignore"}


def test_exclude_wins_over_the_ignore_files(here: Path) -> None:
    write(here, "a.txt", "b.txt")
    (here / ".gitignore").write_text("!a.txt\n")
    assert packed(here, "a.txt") == {"b.txt", ".gitignore"}


def test_an_ignore_file_may_have_any_encoding(here: Path) -> None:
    write(here, "a.txt")
    (here / os.fsdecode(b"caf\xe9.txt")).write_text("ignored")
    (here / ".gitignore").write_bytes(b"caf\xe9.txt\n")
    assert packed(here) == {"a.txt", ".gitignore"}


def test_a_name_that_is_not_utf8_is_rejected(here: Path) -> None:
    (here / os.fsdecode(b"caf\xe9.txt")).write_text("x")
    with pytest.raises(UserError, match=r"caf\\xe9\.txt: the file name is not UTF-8.*--exclude"):
        packed(here)


@pytest.mark.parametrize("source", [".gitignore", "--exclude"])
def test_an_invalid_pattern_names_its_source(here: Path, source: str) -> None:
    if source == ".gitignore":
        (here / source).write_text("!\n")
    with pytest.raises(UserError, match=rf"{source}: .*!"):
        packed(here, *(["!"] if source == "--exclude" else []))


def test_linked_folders_are_packed(here: Path, tmp_path: Path) -> None:
    write(tmp_path / "elsewhere", "code.py", "ignored.tmp")
    (here / "lib").symlink_to(tmp_path / "elsewhere")
    (here / "script.py").symlink_to(tmp_path / "elsewhere" / "code.py")
    (here / ".rayignore").write_text("*.tmp\n")
    assert packed(here) == {"lib/code.py", "script.py", ".rayignore"}


def test_a_link_to_its_own_parent_is_left_out(here: Path, tmp_path: Path) -> None:
    write(here, "sub/a.txt")
    (here / "sub" / "up").symlink_to(here)
    package = pack(here, tmp_path / "package.zip")
    assert package.files == 1
    assert package.left_out == ("sub/up (a link to a folder that contains it)",)


def test_special_files_are_left_out_and_listed(here: Path, tmp_path: Path) -> None:
    write(here, "a.txt")
    os.mkfifo(here / "pipe")
    (here / "dangling").symlink_to("/no/such/target")
    (here / "loop").symlink_to("loop")
    (here / "device").symlink_to("/dev/null")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(os.path.relpath(here / "sock"))
        package = pack(here, tmp_path / "package.zip")
    assert package.files == 1
    assert package.left_out == (
        "dangling (a broken link)",
        "device (a device)",
        "loop (a broken link)",
        "pipe (a FIFO)",
        "sock (a socket)",
    )


@pytest.mark.parametrize("seconds", [0, 5_000_000_000])
def test_files_of_any_date_are_packed(here: Path, seconds: int) -> None:
    write(here, "old.txt")
    os.utime(here / "old.txt", (seconds, seconds))
    assert packed(here) == {"old.txt"}


def test_required_files_are_packed_even_if_ignored(here: Path) -> None:
    write(here, "runs/a.yaml", "b.txt")
    assert packed(here, "*.yaml", required=("./runs/a.yaml",)) == {"runs/a.yaml", "b.txt"}
