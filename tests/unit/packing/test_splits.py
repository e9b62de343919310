"""Splits come from folders, manifests and the data set; other identities are divided by hash."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from fsspec.implementations.memory import MemoryFileSystem

from prioritycut_ray.errors import UserError
from prioritycut_ray.packing.entries import Entry
from prioritycut_ray.packing.inputs import find_videos
from prioritycut_ray.packing.splits import assign_splits
from tests.packing_inputs import (
    FACTS,
    splits,
    touched,
    write_tar,
)


def test_folders_named_after_splits_are_splits(tmp_path: Path, monkeypatch: Any) -> None:
    files = touched(
        tmp_path / "set", "Train/id1/a.mp4", "test/b.mp4", "valid/c.mp4", "training/d.mp4"
    )
    order = ["train", "test", "train", "val"]
    assert splits(f"{tmp_path}/set") == order
    assert splits(str(tmp_path)) == order
    assert splits(*files) == ["train", "test", "val", "train"]
    assert splits(f"{tmp_path}/set/*") == order
    assert splits(*(f"{tmp_path}/set/{name}" for name in ("Train", "test"))) == ["train", "test"]
    assert splits(f"{tmp_path}/set/test") == splits(files[1]) == ["test"]
    monkeypatch.chdir(tmp_path)
    assert splits("set/test/b.mp4", "set/Train/id1/a.mp4") == ["test", "train"]
    (tmp_path / "set/m.csv").write_text("file,split\nTrain/id1/a.mp4,\ntest/b.mp4,other")
    assert splits("set/m.csv") == ["train", "other"]


def test_folders_above_the_inputs_are_not_splits(tmp_path: Path) -> None:
    one, other = touched(tmp_path / "test", "clips/a.mp4", "clips/b.mp4")
    assert splits(f"{tmp_path}/test/clips") == ["", ""]
    assert splits(one, other) == ["", ""]


def test_shards_are_split_by_their_folders_and_names(tmp_path: Path) -> None:
    for name in ("train/0.tar", "b/test-000001.tar", "c/Valid.tar"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write_tar(tmp_path / name, [("a.mp4", b"x"), ("a.json", FACTS)])
    assert splits(str(tmp_path)) == ["test", "val", "train"]
    facts = json.dumps({"identity": 17, "split": "Test"}).encode()
    path = write_tar(tmp_path / "train/0.tar", [("a.mp4", b"x"), ("a.json", facts)])
    [entry] = find_videos([str(path)]).entries
    assert (entry.identity, entry.split) == ("17", "test")


def test_a_video_outside_the_split_folders_is_named(tmp_path: Path) -> None:
    touched(tmp_path, "test/a.mp4", "dev/b.mp4")
    with pytest.raises(UserError, match=r"dev/b\.mp4: is not in a split folder.*in test.;"):
        splits(str(tmp_path))
    (tmp_path / "dev").rename(tmp_path / "test/train")
    with pytest.raises(UserError, match=r"train/b\.mp4: is in folders of several splits"):
        splits(str(tmp_path))
    (tmp_path / "m.csv").write_text("file,split\ntest/train/b.mp4,val")
    assert splits(f"{tmp_path}/m.csv", str(tmp_path)) == ["val", "test"]


def test_splits_in_an_object_store(tmp_path: Path) -> None:
    fs = MemoryFileSystem()
    fs.store.clear()
    for name in ("train/1.mp4", "test/1.mp4"):
        fs.pipe_file(f"/bucket/{name}", b"x")
    for inputs in (["memory://bucket"], ["memory://bucket/test", "memory://bucket/train"]):
        found = find_videos(inputs).entries
        assert [(e.split, e.identity) for e in found] in (
            [("test", "test/1"), ("train", "train/1")],
            [("test", "test/1.mp4"), ("train", "train/1.mp4")],
        )
    fs.store.clear()


def entry(identity: str, split: str = "") -> Entry:
    return Entry(identity, identity, identity, split)


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


def test_split_in_a_manifest_applies_to_the_identity() -> None:
    entries = [entry("ann", "val"), entry("ann"), entry("bob", "train"), entry("bob", "test")]
    assert assign_splits(entries) == ["val", "val", "train", "test"]


def test_identity_keeps_its_split_in_the_data_set() -> None:
    old = {"ann": ["val"], "bob": ["test", "train"]}
    new = [entry("ann"), entry("ann", "train"), entry("bob"), entry("bob", "train")]
    assert assign_splits([*new, entry("x", "y")], old) == ["val", "val", "test", "train", "y"]


@pytest.mark.parametrize(("old", "new", "tests"), [(40, 2, 0), (0, 20, 2), (9, 11, 1), (1, 1, 1)])
def test_appended_identities_are_for_tests_until_a_tenth_is(old: int, new: int, tests: int) -> None:
    first = assign_splits([entry(f"old {n}") for n in range(old)])
    base = {f"old {n}": [split] for n, split in enumerate(first)}
    splits = assign_splits([entry(f"new {n}") for n in range(new)], base)
    assert splits.count("test") == tests
    assert splits.count("train") == new - tests


def test_equal_file_names_do_not_change_a_split() -> None:
    base = {"1": ["train"]}
    with pytest.raises(UserError, match=r"belongs to test, .* '1', .* is already in train"):
        assign_splits([entry("1", "test")._replace(by_name=True)], base)
    assert assign_splits([entry("1")._replace(by_name=True)], base) == ["train"]
