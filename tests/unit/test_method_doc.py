"""Every function that docs/method.md names exists."""

import importlib
import re

import pytest

from tests.places import ROOT

REFERENCE = re.compile(r"`(?:([\w/]+)\.py)?::([\w.]+)`")


def named_functions() -> list[tuple[str, str]]:
    """The module and name of each reference; `::name` refers to the file named before it."""
    found, module = [], ""
    for path, name in REFERENCE.findall((ROOT / "docs" / "method.md").read_text()):
        module = path.replace("/", ".") or module
        found.append((f"prioritycut_ray.{module}", name))
    return found


def test_the_document_names_functions() -> None:
    assert len(named_functions()) > 40


@pytest.mark.parametrize(("module", "name"), named_functions())
def test_each_named_function_exists(module: str, name: str) -> None:
    found = importlib.import_module(module)
    for part in name.split("."):
        found = getattr(found, part)
    assert callable(found)
