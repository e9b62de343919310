"""What was left out: ``rejected.csv`` in the output folder, and errors about it."""

import csv
import io
import re
from collections import Counter
from collections.abc import Sequence

from prioritycut_ray.packing.entries import Rejected
from prioritycut_ray.packing.workspace import REJECTED_NAME
from prioritycut_ray.storage.filesystem import filesystem


def write_rejected(out: str, rejected: Sequence[Rejected], tried: set[str] | None) -> None:
    """Write or remove ``rejected.csv``; appending keeps the rows of videos not tried this time."""
    fs, root = filesystem(out)
    path = f"{root}/{REJECTED_NAME}"
    rows = [*rejected]
    if tried is not None and fs.exists(path):
        there = csv.DictReader(io.StringIO(fs.cat_file(path).decode(), newline=""))
        gone = tried | {item.file for item in rejected}
        old = (Rejected(row["file"], row["reason"]) for row in there)
        rows = [item for item in old if item.file not in gone] + rows
    if not rows:
        if fs.exists(path):
            fs.rm_file(path)
        return
    text = io.StringIO(newline="")
    table = csv.writer(text)
    table.writerow(Rejected._fields)
    table.writerows(rows)
    fs.pipe_file(path, text.getvalue().encode())


def refused(out: str, rejected: Sequence[Rejected]) -> str:
    """Say that --strict allows no rejections."""
    first = "; ".join(f"{item.file}: {item.reason}" for item in rejected[:3])
    more = f"; and {len(rejected) - 3} more" if len(rejected) > 3 else ""
    return (
        f"{len(rejected)} rejected, and --strict allows none ({first}{more}); "
        f"{out}/{REJECTED_NAME} lists them all: fix or remove them and run the same command again"
    )


def nothing_usable(out: str, rejected: Sequence[Rejected]) -> str:
    """Say that everything was rejected, and the most frequent reasons."""
    # Each row of a manifest has its own line.
    reasons = Counter(re.sub(r"^line \d+ of the manifest: ", "", one.reason) for one in rejected)
    first = "; ".join(f"{count} x {reason}" for reason, count in reasons.most_common(3))
    return (
        f"none of {len(rejected)} videos is usable ({first}); "
        f"{out}/{REJECTED_NAME} lists them all: replace or repair them"
    )
