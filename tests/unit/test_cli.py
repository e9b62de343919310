"""The command line as a user meets it: exit codes, one line an error."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest
import ray
import torch
import typer.main
import yaml

from prioritycut_ray import cli
from prioritycut_ray.config import Config
from prioritycut_ray.errors import UserError
from prioritycut_ray.training.checkpoint import save_checkpoint
from prioritycut_ray.training.state import new_state
from tests.conftest import Prioritycut, Result, assert_one_line
from tests.places import DATA

COMMAND_LINE = DATA / "command_line.txt"
VERBS = [
    *("quickstart", "shard", "train", "submit", "evaluate", "animate", "doctor"),
    *("import-fomm", "import-tpsmm"),
]


@pytest.fixture
def run(tiny: Config, tmp_path: Path) -> Path:
    """A run with one checkpoint of random weights."""
    folder = tmp_path / "run"
    save_checkpoint(new_state(tiny, torch.device("cpu")), tiny, folder / "step_0000001")
    return folder


@pytest.mark.parametrize("verb", VERBS)
def test_help_has_an_example(prioritycut: Prioritycut, verb: str) -> None:
    result = prioritycut(verb, "--help")
    assert result.returncode == 0
    assert f"prioritycut {verb}" in result.stdout
    assert "Example" in result.stdout


def verbs(group: Any, name: str = "prioritycut") -> Iterator[tuple[str, click.Command]]:
    """Yield all verbs with their full names; typer's groups are not click's."""
    for word, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from verbs(command, f"{name} {word}")
        else:
            yield f"{name} {word}", command


def interface() -> str:
    """Describe the command line: a line for each verb, argument and option."""
    lines = []
    for name, command in verbs(typer.main.get_command(cli.app)):
        lines.append(name)
        for parameter in command.params:
            words = ", ".join([*parameter.opts, *parameter.secondary_opts])
            required = " (required)" * parameter.required
            lines.append(f"  {parameter.param_type_name} {words}{required}")
    return "\n".join(lines) + "\n"


def test_the_command_line_is_the_documented_one() -> None:
    """People and schedules depend on it: a change must be intended, and be in the changelog."""
    assert interface() == COMMAND_LINE.read_text(), (
        "verbs or options have changed; if this is intended, run "
        "`python -m tests.unit.test_cli` and describe the change in CHANGELOG.md"
    )


def test_help_of_every_verb_imports_nothing_heavy() -> None:
    code = (
        "import sys\n"
        "from prioritycut_ray.cli import main\n"
        "for words in sys.argv[1:]:\n"
        "    sys.argv = [*words.split(), '--help']\n"
        "    try: main()\n"
        "    except SystemExit: pass\n"
        "print([m for m in sys.modules if m in "
        "('torch', 'ray', 'av', 'timm', 'numpy', 'fsspec')], file=sys.stderr)"
    )
    names = [name for name, _ in verbs(typer.main.get_command(cli.app))]
    result = subprocess.run([sys.executable, "-c", code, *names], capture_output=True, text=True)
    assert result.stdout.count("Usage: prioritycut") == len(names) >= 25
    assert result.stderr.strip() == "[]"


def test_without_a_verb_all_verbs_are_shown(prioritycut: Prioritycut) -> None:
    result = prioritycut()
    for verb in VERBS:
        assert verb in result.stdout + result.stderr


def test_dry_run_prints_the_resolved_config(prioritycut: Prioritycut) -> None:
    result = prioritycut("train", "quickstart", "optim.lr=3e-4", "--dry-run")
    assert result.returncode == 0
    assert yaml.safe_load(result.stdout)["optim"]["lr"] == 3e-4


def test_a_typo_names_the_key_and_the_nearest_valid_one(prioritycut: Prioritycut) -> None:
    result = prioritycut("train", "quickstart", "priority_cut.topk=3", "--dry-run")
    assert_one_line(result, "priority_cut.topk", "priority_cut.top_k")


@pytest.mark.parametrize(
    ("words", "fragments"),
    [
        (["train", "nowhere.yaml"], ["nowhere.yaml", "quickstart"]),
        (["train", "quickstart", "data.url=missing"], ["missing", "prioritycut shard"]),
        (["shard", "missing.mp4", "--out", "out"], ["missing.mp4"]),
        (["evaluate", "missing", "data"], ["missing"]),
        (["animate", "no-run", "--source", "a", "--driving", "b", "--out", "c.mp4"], ["no-run"]),
    ],
)
def test_missing_inputs_give_one_line(
    prioritycut: Prioritycut,
    monkeypatch: pytest.MonkeyPatch,
    words: list[str],
    fragments: list[str],
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("missing things must be noticed before Ray is started")

    monkeypatch.setattr(ray, "is_initialized", lambda: False)  # other tests may have started it
    monkeypatch.setattr(ray, "init", refuse)
    assert_one_line(prioritycut(*words), *fragments)


def test_the_installed_command_runs() -> None:
    command = [str(Path(sys.executable).parent / "prioritycut"), "train", "nowhere.yaml"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert_one_line(Result(result.returncode, result.stdout, result.stderr), "nowhere.yaml")


def test_debug_shows_the_traceback(prioritycut: Prioritycut, tmp_path: Path) -> None:
    result = prioritycut("evaluate", "missing", "data", "--debug")
    assert result.returncode == 1
    assert "Traceback" in result.stderr


def test_an_empty_folder_is_named(prioritycut: Prioritycut, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert_one_line(prioritycut("shard", "empty", "--out", "out"), "empty")
    assert not (tmp_path / "out").exists()


def test_usage_errors_exit_with_two(prioritycut: Prioritycut) -> None:
    assert prioritycut("animate").returncode == 2
    assert prioritycut("fly").returncode == 2


def test_a_damaged_checkpoint_is_named(prioritycut: Prioritycut, run: Path, tmp_path: Path) -> None:
    (run / "step_0000001" / "animator_ema.safetensors").write_bytes(b"damaged")
    result = prioritycut("export", str(run), "--out", "exported")
    assert result.returncode == 1
    assert "animator_ema.safetensors" in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize("broken", ["source", "driving"])
def test_a_broken_input_of_animate_is_named_and_nothing_is_left(
    prioritycut: Prioritycut, run: Path, puppet_videos: Path, tmp_path: Path, broken: str
) -> None:
    good, bad, out = puppet_videos / "puppet_0.mp4", tmp_path / "bad.mp4", tmp_path / "out.mp4"
    bad.write_bytes(b"<html>not found</html>")
    inputs = {"source": good, "driving": good, broken: bad}
    words = [f"--{name}={path}" for name, path in inputs.items()]
    assert_one_line(prioritycut("animate", str(run), *words, "--out", str(out)), "bad.mp4")
    assert not out.exists()


def test_animate_writes_a_playable_mp4(
    prioritycut: Prioritycut, run: Path, puppet_videos: Path, tmp_path: Path
) -> None:
    from prioritycut_ray.video.decoding import frames_upright

    source, driving = puppet_videos / "puppet_0.mp4", puppet_videos / "puppet_1.mp4"
    out = tmp_path / "deep" / "out.mp4"
    result = prioritycut(
        "animate", str(run), "--source", str(source), "--driving", str(driving), "--out", str(out)
    )
    assert result.returncode == 0, result.stderr
    frames = list(frames_upright(out))
    assert len(frames) == len(list(frames_upright(driving)))
    assert frames[0].shape == (32, 32, 3)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_is_named_with_the_way_out(tmp_path: Path) -> None:
    out = tmp_path / "full.mp4"
    out.symlink_to("/dev/full")
    with pytest.raises(UserError, match=r"full\.mp4: no space left"), cli.writing_to(out):
        out.write_bytes(b"data")


if __name__ == "__main__":
    COMMAND_LINE.write_text(interface())
