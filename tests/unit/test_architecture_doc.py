"""docs/architecture.md shows every module and package, where it is, and the layers as they are."""

import re
import tomllib
from collections.abc import Iterator

from tests.places import ROOT

TEXT = (ROOT / "docs" / "architecture.md").read_text()
NAME = re.compile(r"[\w.]+(?:/|\.py|\.yaml)$")


def blocks() -> list[str]:
    return re.findall(r"^```\n(.*?)^```$", TEXT, flags=re.M | re.S)


def drawn() -> Iterator[str]:
    """The paths that the tree shows: a folder and what is indented below it."""
    parents: dict[int, str] = {}
    for line in filter(None, blocks()[0].splitlines()):
        indent = len(line) - len(line.lstrip())
        parent = next((parents[i] for i in sorted(parents, reverse=True) if i < indent), "")
        for word in line.split():
            if not NAME.fullmatch(word):
                break  # the description
            yield parent + word
            if word.endswith("/"):
                parents = {i: path for i, path in parents.items() if i < indent}
                parents[indent] = parent + word


def on_disk() -> set[str]:
    """Modules and packages; a package's own `__init__.py` goes without saying."""
    package = ROOT / "prioritycut_ray"
    files = {str(path.relative_to(ROOT)) for path in package.rglob("*.py")}
    return {file.removesuffix("__init__.py") for file in files}


def test_the_tree_shows_every_module_and_package_once() -> None:
    shown = list(drawn())
    assert len(shown) > 150
    assert sorted(set(shown)) == sorted(shown), "something is shown twice"
    assert sorted(on_disk() - set(shown)) == [], "not in the tree"


def test_everything_in_the_tree_exists() -> None:
    assert [path for path in drawn() if not (ROOT / path).exists()] == []


def test_the_layers_are_those_of_the_contract() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]
    assert blocks()[1].splitlines() == settings["contracts"][0]["layers"]


def test_the_glossary_is_short() -> None:
    rows = re.findall(r"^\| ([a-z, ]+) \| (.+) \|$", TEXT.partition("## Glossary")[2], flags=re.M)
    terms = [term for term, _ in rows if term != "term"]
    assert 10 <= len(terms) <= 20
    assert len(set(terms)) == len(terms)
