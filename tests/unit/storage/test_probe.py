"""Whether a storage can be written, and whether all nodes share it."""

from pathlib import Path

import pytest

from prioritycut_ray.storage.probe import check_writable, has_marker, marker


def test_a_marker_is_seen_while_it_exists(tmp_path: Path) -> None:
    url, elsewhere = str(tmp_path / "runs"), str(tmp_path / "other")
    with marker(url) as name:
        assert has_marker(url, name)
        assert not has_marker(elsewhere, name)
    assert not has_marker(url, name)
    assert list((tmp_path / "runs").iterdir()) == []


def test_a_writable_storage_is_left_as_it_was(tmp_path: Path) -> None:
    check_writable(str(tmp_path / "runs"))
    assert list((tmp_path / "runs").iterdir()) == []


def test_a_storage_below_a_file_is_not_writable(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="file"):
        check_writable(str(tmp_path / "file" / "runs"))
