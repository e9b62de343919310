"""The pointer to the current model is always complete, and has a history."""

import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from prioritycut_ray.config import Config
from prioritycut_ray.errors import UserError
from prioritycut_ray.retraining.registry import (
    anchor_checkpoint,
    count_comparison,
    current_model,
    former_models,
    pin,
    promote,
    read_current,
    rollback,
)
from prioritycut_ray.storage.folder import Folder
from prioritycut_ray.storage.lease import leased
from prioritycut_ray.training.checkpoint import save_checkpoint
from prioritycut_ray.training.state import new_state
from tests.conftest import Result, assert_one_line


@pytest.fixture
def models(tiny: Config, tmp_path: Path) -> Folder:
    """Three models of random weights."""
    for name in "abc":
        folder = tmp_path / "models" / name
        save_checkpoint(new_state(tiny, torch.device("cpu")), tiny, folder / "run" / "step_0000001")
        (folder / "index.arrow").write_text("{}")
    return Folder(str(tmp_path / "models"))


def move(models: Folder, *names: str) -> None:
    with leased(models, 60) as lease:
        for name in names:
            promote(models, lease, name, f"because {name}")


def history(models: Folder) -> list[str]:
    current = read_current(models)
    assert current is not None
    return [entry.model for entry in current.history]


def back(models: Folder) -> str:
    with leased(models, 60) as lease:
        return rollback(models, lease)[1]


def test_the_pointer_keeps_its_history(models: Folder) -> None:
    assert read_current(models) is None
    move(models, "a", "b", "b", "c")
    assert history(models) == ["a", "b", "c"]
    name, checkpoint = current_model(models)
    assert name == "c"
    assert checkpoint == f"{models.url}/c/run/step_0000001"
    current = read_current(models)
    assert current is not None
    assert [entry.reason for entry in current.history] == [f"because {name}" for name in "abc"]
    assert len({entry.token for entry in current.history}) == 1


def test_rolling_back_goes_further_back_each_time(models: Folder) -> None:
    move(models, "a", "b", "c")
    assert back(models) == "b"
    assert back(models) == "a"
    with pytest.raises(UserError, match="no earlier model"):
        back(models)
    move(models, "c")
    assert back(models) == "a"
    current = read_current(models)
    assert current is not None
    assert former_models(current) == []
    assert history(models) == ["a", "b", "c", "b", "a", "c", "a"]


def anchor(models: Folder) -> str:
    current = read_current(models)
    assert current is not None
    return current.anchor.model


def test_the_first_model_is_the_anchor_until_another_is_pinned(models: Folder) -> None:
    move(models, "a", "b")
    assert anchor(models) == "a"
    assert anchor_checkpoint(models) == f"{models.url}/a/run/step_0000001"
    with leased(models, 60) as lease:
        assert pin(models, lease) == "b"
        promote(models, lease, "c", "better")
    assert anchor(models) == "b"
    assert back(models) == "b"
    move(models, "c")
    assert back(models) == anchor(models) == "b"
    assert history(models) == ["a", "b", "c", "b", "c", "b"]


def test_every_candidate_counts_once_since_the_pin(models: Folder) -> None:
    move(models, "a")
    with leased(models, 60) as lease:
        nights = [count_comparison(models, lease, name) for name in ("x", "y", "x", "z", "y")]
        assert nights == [1, 2, 1, 3, 2]
        promote(models, lease, "b", "better")
        assert count_comparison(models, lease, "w") == 4
        pin(models, lease)
        assert count_comparison(models, lease, "w") == 1


def test_an_anchor_that_changed_is_rejected(models: Folder) -> None:
    move(models, "a", "b")
    manifest = Path(models.url, "a", "run", "step_0000001", "manifest.json")
    manifest.write_text(manifest.read_text() + "\n")
    with pytest.raises(UserError, match=r"has changed since it was pinned; pin another model"):
        anchor_checkpoint(models)
    assert current_model(models)[0] == "b"


def test_a_model_without_weights_does_not_become_current(models: Folder) -> None:
    move(models, "a", "b")
    models.remove("a/run")
    with pytest.raises(UserError, match="no such run folder"):
        back(models)
    assert history(models) == ["a", "b"]


@pytest.mark.parametrize("damage", [b"", b"{}", b"half a f"])
def test_a_damaged_pointer_is_named(models: Folder, damage: bytes) -> None:
    move(models, "a")
    models.write("current.json", damage)
    with pytest.raises(UserError, match=r"current\.json: is damaged"):
        read_current(models)


def test_a_record_of_another_version_is_named(
    models: Folder, prioritycut: Callable[..., Result]
) -> None:
    for name in ("job.json", "done.json", "verdict.json"):
        models.write(f"b/{name}", b'{"promote": "later"}')
    listed = prioritycut("models", "list", "--models", models.url)
    assert_one_line(listed, "b/verdict.json: cannot be read by prioritycut_ray 0.", "promote")


def test_a_pointer_that_was_edited_is_named(models: Folder) -> None:
    move(models, "a", "b")
    models.write("current.json", models.read("current.json").replace(b"because b", b"because c"))
    with pytest.raises(UserError, match="checksum does not match"):
        read_current(models)


def test_weights_that_changed_after_the_promotion_are_rejected(models: Folder) -> None:
    move(models, "a")
    manifest = Path(models.url, "a", "run", "step_0000001", "manifest.json")
    manifest.write_text(manifest.read_text() + "\n")
    with pytest.raises(UserError, match="has changed since it was promoted"):
        current_model(models)


def test_a_reader_sees_the_old_or_the_new_pointer(models: Folder) -> None:
    move(models, "a")
    ended, seen, problems = threading.Event(), set(), []

    def read() -> None:
        while not ended.is_set():
            try:
                current = read_current(models)
                assert current is not None
                seen.add(current.model)
            except Exception as error:
                problems.append(error)

    reader = threading.Thread(target=read)
    reader.start()
    move(models, *("b", "c") * 8)
    ended.set()
    reader.join()
    assert problems == []
    assert seen <= {"a", "b", "c"}
    assert len(history(models)) == 17


def test_the_command_line_lists_promotes_pins_and_rolls_back(
    models: Folder, prioritycut: Callable[..., Result]
) -> None:
    where = ("--models", models.url)
    assert_one_line(prioritycut("models", "rollback", *where), "no earlier model")
    assert_one_line(prioritycut("models", "promote", "d", *where), "d: is neither a model")
    for name in "ab":
        promoted = prioritycut("models", "promote", name, *where)
        assert promoted.returncode == 0, promoted.stderr
        assert f"{name} is current" in promoted.stdout
    listed = prioritycut("models", "list", *where)
    assert listed.returncode == 0
    states = {
        words[1]: words for line in listed.stdout.splitlines() if len(words := line.split()) > 3
    }
    assert [states[name][3] for name in "abc"] == ["former", "current", "adopted"]
    assert states["a"][4] == "(anchor)"
    assert_one_line(prioritycut("models", "pin", "d", *where), "d: is not a model in")
    pinned = prioritycut("models", "pin", *where)
    assert "b is the anchor" in pinned.stdout
    rolled = prioritycut("models", "rollback", *where)
    assert "rolled back from b to a" in rolled.stdout
    with leased(models, 60):
        held = prioritycut("models", "promote", "b", *where)
    assert held.returncode == 78
    assert len(held.stderr.strip().splitlines()) == 1
