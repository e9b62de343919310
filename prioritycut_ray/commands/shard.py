"""``prioritycut shard``."""

from collections import Counter
from collections.abc import Sequence

from rich.console import Console

from prioritycut_ray.data.packing import PackProgress, PackReport, pack_videos
from prioritycut_ray.progress import ProgressBar

_SHOWN = 20
"""Rejected files that are named on the terminal; all are in ``rejected.csv``."""


def shard(videos: Sequence[str], out: str, *, size: int, console: Console) -> PackReport:
    """Pack videos into shards and say what became of them."""
    with ProgressBar("packing", 1.0) as bar:

        def show(progress: PackProgress) -> None:
            note = f"{progress.done}/{progress.total} · {progress.rejected} rejected"
            bar.update(progress.done / progress.total, note)

        report = pack_videos(videos, out, size=size, on_progress=show)
    for warning in report.warnings:
        console.print(f"warning: {warning}")
    for file, reason in report.rejected[:_SHOWN]:
        console.print(f"rejected: {file}: {reason}")
    if len(report.rejected) > _SHOWN:
        console.print(f"rejected: {len(report.rejected) - _SHOWN} more, see {out}/rejected.csv")
    counts = sorted(Counter(clip.split for clip in report.index.clips).items())
    console.print(
        f"{out}: {report.clips} clips ({', '.join(f'{n} {split}' for split, n in counts)}), "
        f"{report.frames} frames, {report.size_bytes / 1e6:.1f} MB; {len(report.rejected)} rejected"
    )
    return report
