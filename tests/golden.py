"""Outputs of the public implementations: those in tests/data, and more that the user names."""

import os
from pathlib import Path
from typing import Literal

from safetensors import safe_open

from tests.places import DATA


def golden_files(family: Literal["first_order", "thin_plate"]) -> list[Path]:
    """A family's files: the one in tests/data, and those in the folder PRIORITYCUT_GOLDEN."""
    files = sorted(DATA.glob("*dev_a.safetensors"))
    folder = os.environ.get("PRIORITYCUT_GOLDEN")
    if folder:
        more = sorted(Path(folder).glob("*.safetensors"))
        assert more, f"PRIORITYCUT_GOLDEN={folder}: no *.safetensors there"
        files += more
    return [file for file in files if family_of(file) == family]


def family_of(file: Path) -> str:
    with safe_open(file, framework="pt") as opened:
        thin_plate = (opened.metadata() or {}).get("format", "").startswith("thin-plate")
    return "thin_plate" if thin_plate else "first_order"
