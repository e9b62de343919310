"""What the project's documents promise: commands, targets, links and files that exist."""

import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any, cast

import click
import pytest
import typer.main
import yaml

from prioritycut_ray import cli
from prioritycut_ray.config import as_words, load_config
from tests.places import DOCUMENTS, ROOT

README = (ROOT / "README.md").read_text()
TRAIN_LINES = re.findall(r"^prioritycut train (.+)$", README, flags=re.M)
ABLATION_ROWS = re.findall(
    r"^\| ((?:no discriminator|baseline|\+) .*?) \| (?:`(.+?)` )?\|$", README, flags=re.M
)
COMMANDS = cast(click.Group, typer.main.get_command(cli.app)).commands


def test_imports_go_downward_only() -> None:
    command = [str(Path(sys.executable).parent / "lint-imports"), "--no-cache"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout


@pytest.mark.parametrize("line", TRAIN_LINES)
def test_training_commands_of_the_readme_are_valid(line: str) -> None:
    config, *overrides = shlex.split(line)
    assert load_config(config, overrides)


def test_the_readme_shows_training_commands() -> None:
    assert len(TRAIN_LINES) == 2


@pytest.mark.parametrize(
    ("search", "base", "rows"),
    [("ablation", "vox256", ABLATION_ROWS[1:]), ("ablation_tps", "vox256_tps", ABLATION_ROWS)],
)
def test_the_ablation_rows_of_the_readme_are_those_of_the_searches(
    search: str, base: str, rows: list[tuple[str, str]]
) -> None:
    variants: dict[str, dict[str, Any]] = yaml.safe_load(
        (ROOT / "tune_configs" / f"{search}.yaml").read_text()
    )["variants"]
    assert len(ABLATION_ROWS) == 5
    for (label, overrides), variant in zip(rows, variants.values(), strict=True):
        expected = load_config(base, as_words(variant))
        assert load_config(base, shlex.split(overrides)) == expected, label


def test_the_configurations_of_the_readme_are_the_shipped_ones() -> None:
    rows = re.findall(r"^\| `(\w+)` \| .* \| (\d+) \|$", README, flags=re.M)
    shipped = sorted(path.stem for path in ROOT.glob("prioritycut_ray/configs/*.yaml"))
    assert sorted(name for name, _ in rows) == shipped
    for name, size in rows:
        assert load_config(name).data.size == int(size)


def test_every_make_target_that_a_document_names_exists() -> None:
    makefile = (ROOT / "Makefile").read_text()
    text = "\n".join(path.read_text() for path in DOCUMENTS)
    named = set(re.findall(r"(?:^|`)make ([a-z][a-z-]*)", text, flags=re.M))
    assert named >= {"quickstart", "test", "test-slow", "check"}
    assert named <= set(re.findall(r"^([a-z-]+):", makefile, flags=re.M))


def test_every_verb_that_a_document_names_exists() -> None:
    text = "\n".join(path.read_text() for path in DOCUMENTS)
    named = set(
        re.findall(r"(?:^|[`(] ?)prioritycut ([a-z][a-z0-9-]*)(?: ([a-z]+)\b)?", text, re.M)
    )
    assert len({verb for verb, _ in named}) >= 15
    for verb, word in sorted(named):
        assert verb in COMMANDS, verb
        if word and hasattr(COMMANDS[verb], "commands"):  # a group
            assert word in COMMANDS[verb].commands, f"{verb} {word}"


def local_links(document: Path) -> list[str]:
    return re.findall(r"\]\((?!https?:)([^)\s]+)\)", document.read_text())


def slugs(document: Path) -> set[str]:
    """The anchors that GitHub gives to the headings of a document."""
    headings = re.findall(r"^#+ (.+)$", document.read_text(), flags=re.M)
    plain = (re.sub(r"\[(.*?)\]\(.*?\)", r"\1", heading).lower() for heading in headings)
    return {re.sub(r"[^\w\- ]", "", heading).replace(" ", "-") for heading in plain}


def test_the_documents_have_links() -> None:
    assert len(local_links(ROOT / "README.md")) >= 15
    assert sum(len(local_links(document)) for document in DOCUMENTS) >= 40


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_link_of_a_document_leads_somewhere(document: Path) -> None:
    for link in local_links(document):
        name, _, anchor = link.partition("#")
        target = document.parent / name if name else document
        assert target.exists(), link
        if anchor:
            assert anchor in slugs(target), link


def test_every_page_is_reachable_and_every_page_that_code_names_exists() -> None:
    linked = set(local_links(ROOT / "README.md"))
    pages = {str(path.relative_to(ROOT)) for path in DOCUMENTS} - {"README.md"}
    assert pages <= linked, "a page that README does not link to"
    code = [*ROOT.glob("prioritycut_ray/**/*.py"), *ROOT.glob("prioritycut_ray/**/*.j2")]
    named = {name for path in code for name in re.findall(r"docs/\w+\.md", path.read_text())}
    assert len(named) >= 5
    assert named <= pages
