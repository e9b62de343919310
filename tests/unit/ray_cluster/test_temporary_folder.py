"""Sockets in a temporary folder with a long path."""

import os
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from prioritycut_ray.errors import UserError
from prioritycut_ray.ray_cluster.session import shorten_temporary_folder


@pytest.fixture
def long_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    folder = tmp_path / ("long_directory_name" * 5)
    monkeypatch.setenv("TMPDIR", str(folder))
    monkeypatch.setattr(tempfile, "tempdir", None)
    yield folder
    if os.environ["TMPDIR"] != str(folder):
        os.unlink(os.environ["TMPDIR"])


def test_sockets_fit_into_a_folder_with_a_long_path(long_folder: Path) -> None:
    shorten_temporary_folder()
    short = os.environ["TMPDIR"]
    assert Path(short).samefile(long_folder)
    assert tempfile.gettempdir() == short
    session = Path(short, "ray", "session_2026-11-30_02-02-42_123456_1234567", "sockets")
    session.mkdir(parents=True)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(session / "plasma_store"))
    os.environ["TMPDIR"] = str(long_folder)
    shorten_temporary_folder()
    assert os.environ["TMPDIR"] == short, "one link per folder"


def test_a_short_folder_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", "/tmp")
    shorten_temporary_folder()
    assert os.environ["TMPDIR"] == "/tmp"


def test_a_link_that_cannot_be_made_is_reported(long_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"TMPDIR=.*too long for Ray's sockets.*at most 35"):
        shorten_temporary_folder(links=str(tmp_path / "nowhere"))
