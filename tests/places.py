"""Paths that tests read."""

from pathlib import Path

ROOT = Path(__file__).parents[1]
DATA = ROOT / "tests" / "data"
TINY = DATA / "tiny.yaml"
TINY_TPS = DATA / "tiny_tps.yaml"
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])
SHARED = ROOT.parent / "shared"
"""Real clips and outputs of the reference code; not part of the repository."""
DEV = SHARED / "data" / "dev"
BAD = SHARED / "data" / "bad"
