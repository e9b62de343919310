"""Paths that tests read."""

from pathlib import Path

ROOT = Path(__file__).parents[1]
DATA = ROOT / "tests" / "data"
TINY = DATA / "tiny.yaml"
TINY_TPS = DATA / "tiny_tps.yaml"
FAMILIES = {"first_order": TINY, "thin_plate": TINY_TPS}
"""A small configuration of each generator family."""
ALONE = ("discriminator.kind=none", "priority_cut=null")
"""Overrides that train without a discriminator."""
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])
SHARED = ROOT.parent / "shared"
"""Real clips and outputs of the reference code; not part of the repository."""
DEV = SHARED / "data" / "dev"
BAD = SHARED / "data" / "bad"
