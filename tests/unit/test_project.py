"""The project's promises about itself."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from prioritycut_ray.config import load_config
from tests.places import ROOT

README = (ROOT / "README.md").read_text()
TRAIN_LINES = re.findall(r"^prioritycut train (.+)$", README, flags=re.M)


def test_imports_go_downward_only() -> None:
    command = [str(Path(sys.executable).parent / "lint-imports"), "--no-cache"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout


@pytest.mark.parametrize("line", TRAIN_LINES)
def test_training_commands_of_the_readme_are_valid(line: str) -> None:
    config, *overrides = shlex.split(line)
    assert load_config(config, overrides)


def test_the_readme_shows_training_commands() -> None:
    assert len(TRAIN_LINES) >= 2


@pytest.mark.parametrize("words", re.findall(r"^\| .*? \| `(priority_cut=.*?)` \|$", README, re.M))
def test_ablation_rows_of_the_readme_are_valid(words: str) -> None:
    assert load_config("vox256", words.split())


def test_every_target_and_file_that_the_readme_names_exists() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"^make (\w+)", README, flags=re.M):
        assert f"\n{target}:" in makefile
    for link in re.findall(r"\]\((?!https?:)([^)]+)\)", README):
        assert (ROOT / link).exists(), link
