"""Where things are that tests read."""

from pathlib import Path

ROOT = Path(__file__).parents[1]
DATA = ROOT / "tests" / "data"
TINY = DATA / "tiny.yaml"
SHARED = ROOT.parent / "shared"
"""Real clips and outputs of the reference code; not on a user's machine."""
DEV = SHARED / "data" / "dev"
BAD = SHARED / "data" / "bad"
