"""Identities are taken from file names where nothing else gives them."""

from pathlib import Path

from tests.packing_inputs import identities, manifest, touched


def test_identity_is_the_path_below_the_folder(tmp_path: Path) -> None:
    names = ["id1/a/1.mp4", "id1/b/1.mp4", "id2/a/1.mp4", "id2/a/1.mov", "1.mp4"]
    files = touched(tmp_path, *names)
    assert identities(str(tmp_path)) == [
        "1",
        "id1/a/1",
        "id1/b/1",
        "id2/a/1.mov",
        "id2/a/1.mp4",
    ]
    assert identities(f"{tmp_path}/*/a/*.mp4") == ["id1/a/1", "id2/a/1"]
    # Files whose only common folder is further up are distinguished from there.
    assert identities(f"{tmp_path}/id1", f"{tmp_path}/id2/a") == ["a/1", "b/1", "1.mov", "1.mp4"]
    assert identities(*files[:3]) == ["id1/a/1.mp4", "id1/b/1.mp4", "id2/a/1.mp4"]
    assert identities(files[0]) == ["1"]


def test_identity_of_a_file_differs_from_those_in_a_manifest(tmp_path: Path) -> None:
    path = manifest(tmp_path, "file,identity\na.mp4,b\nb.mp4,\nc.mp4,")
    assert identities(path) == ["b", "b.mp4", "c"]
