"""``prioritycut data verify``, ``info`` and ``preview``."""

from pathlib import Path

from rich.console import Console
from rich.table import Table

from prioritycut_ray.data.shards import read_index
from prioritycut_ray.errors import UserError
from prioritycut_ray.packing.inspection import preview, summarise, verify
from prioritycut_ray.progress import ProgressBar


def verify_data(url: str, console: Console) -> None:
    """Verify a data set and print every problem.

    Raises:
        UserError: there are problems.
    """
    with ProgressBar("verifying", 1.0) as bar:
        found = verify(url, on_progress=lambda n, of: bar.update(n / of, f"{n}/{of} clips"))
    for kind, lines in (("note", found.notes), ("problem", found.problems)):
        for line in lines:
            console.print(f"{kind}: {line}", markup=False)
    if found.problems:
        raise UserError(
            f"{url}: {len(found.problems)} problems in {found.clips} clips; "
            "restore the files named above or pack them again"
        )
    console.print(f"{url}: {found.clips} clips, all intact", markup=False)


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


def show_preview(url: str, out: Path, *, clips: int, console: Console) -> None:
    """Write a contact sheet or an HTML page of a data set."""
    count = preview(url, out, clips=clips)
    console.print(f"{out}: {count} clips", markup=False)
