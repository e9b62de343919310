"""``prioritycut data verify``, ``info``, ``preview`` and ``upgrade``."""

from pathlib import Path

from rich.console import Console
from rich.table import Table

from prioritycut_ray.data.index import INDEX_NAME, read_index, upgrade_index
from prioritycut_ray.errors import UserError
from prioritycut_ray.packing.inspection import preview, summarise, verify
from prioritycut_ray.progress import ProgressBar


def verify_data(url: str, sample: int | None, console: Console) -> None:
    """Verify a data set, or a sample of it, and print every problem.

    Raises:
        UserError: there are problems.
    """
    with ProgressBar("verifying", 1.0) as bar:
        found = verify(
            url, sample=sample, on_progress=lambda n, of: bar.update(n / of, f"{n}/{of} clips")
        )
    for kind, lines in (("note", found.notes), ("problem", found.problems)):
        for line in lines:
            console.print(f"{kind}: {line}", markup=False)
    if found.problems:
        raise UserError(
            f"{url}: {len(found.problems)} problems in {found.clips} clips; "
            "restore the files named above or pack them again"
        )
    drawn = "" if sample is None else f", of {found.total}; the others were not checked"
    console.print(f"{url}: {found.clips} clips, all intact{drawn}", markup=False)


def show_info(url: str, console: Console) -> None:
    """Print the numbers of a data set."""
    summary = summarise(read_index(url))
    table = Table(box=None)
    for name in ("split", "clips", "identities", "frames", "hours", "MB", "bytes/frame"):
        table.add_column(name, justify="left" if name == "split" else "right")
    for name, split in summary.splits.items():
        table.add_row(
            name,
            f"{split.clips}",
            f"{split.identities}",
            f"{split.frames}",
            f"{split.seconds / 3600:.3f}",
            f"{split.size_bytes / 1e6:.1f}",
            f"{split.size_bytes / split.frames:.0f}",
        )
    console.print(table, markup=False)
    console.print(f"{summary.shards} shards, frames of {' and '.join(summary.sizes)}")
    for name in summary.shared_identities:
        console.print(f"note: identity {name!r} is in several splits", markup=False)
    console.print(f"fingerprint {summary.fingerprint}")


def upgrade(url: str, console: Console) -> None:
    """Upgrade the index of a data set, and say what changes with it."""
    if not upgrade_index(url):
        console.print(f"{url}: the index has the current format", markup=False)
        return
    console.print(
        f"{url}: the index is now {INDEX_NAME}. The fingerprint and the order of samples have "
        "changed: runs that were trained on this data set cannot be resumed by this version.",
        markup=False,
    )


def show_preview(url: str, out: Path, *, clips: int, console: Console) -> None:
    """Write a contact sheet or an HTML page of a data set."""
    count = preview(url, out, clips=clips)
    console.print(f"{out}: {count} clips", markup=False)
