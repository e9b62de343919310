"""docs/method.md names functions that exist."""

import importlib
import re

import pytest

from tests.places import ROOT

REFERENCE = re.compile(r"`(?:([\w/]+)\.py)?::([\w.]+)`")


def named_functions() -> list[tuple[str, str]]:
    """Module and name of each; `::name` alone stands in the file named before it."""
    found, module = [], ""
    for path, name in REFERENCE.findall((ROOT / "docs" / "method.md").read_text()):
        module = path.replace("/", ".") or module
        found.append((f"prioritycut_ray.{module}", name))
    return found


def test_the_document_names_functions() -> None:
    assert len(named_functions()) > 40


@pytest.mark.parametrize(("module", "name"), named_functions())
def test_each_function_is_there(module: str, name: str) -> None:
    found = importlib.import_module(module)
    for part in name.split("."):
        found = getattr(found, part)
    assert callable(found)
