"""``prioritycut shard``, ``data append`` and ``data index``."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from rich.console import Console

from prioritycut_ray.packing.entries import Rejected
from prioritycut_ray.packing.layout import PLAIN, Layout
from prioritycut_ray.packing.pipeline import (
    MAX_FRAMES,
    PackProgress,
    PackReport,
    append_videos,
    pack_videos,
)
from prioritycut_ray.packing.shard_index import IndexProgress, IndexReport, index_shards
from prioritycut_ray.progress import ProgressBar

_SHOWN = 20
"""Maximum number of rejected files and of warnings on the terminal; rejected.csv has all."""


def shard(
    videos: Sequence[str],
    out: str,
    *,
    size: int,
    console: Console,
    copy: bool = False,
    preset: str = "default",
    max_frames: int = MAX_FRAMES,
    layout: Layout = PLAIN,
    strict: bool = False,
) -> PackReport:
    """Pack videos into shards and report the result."""
    with _shown_progress() as show:
        report = pack_videos(
            videos,
            out,
            size=size,
            copy=copy,
            preset=preset,
            max_frames=max_frames,
            layout=layout,
            strict=strict,
            on_progress=show,
        )
    _print_report(report, out, console)
    return report


def append(
    url: str,
    videos: Sequence[str],
    *,
    copy: bool,
    preset: str,
    max_frames: int,
    layout: Layout,
    strict: bool,
    console: Console,
) -> PackReport:
    """Add videos to a data set and report the result."""
    with _shown_progress() as show:
        report = append_videos(
            url,
            videos,
            copy=copy,
            preset=preset,
            max_frames=max_frames,
            layout=layout,
            strict=strict,
            on_progress=show,
        )
    if report.known:
        console.print(f"{report.known} clips are already in the data set and were not added again")
    _print_report(report, url, console)
    console.print(f"fingerprint: {report.index.fingerprint}")
    return report


def index(
    shards: Sequence[str],
    out: str,
    *,
    video: str,
    json_extension: str,
    trust: bool,
    identity_from: str,
    strict: bool,
    console: Console,
) -> IndexReport:
    """Make an index of existing shards and report the result."""
    with ProgressBar("indexing", 1.0) as bar:

        def show(progress: IndexProgress) -> None:
            done = f"{progress.done}/{progress.total} shards"
            note = f"{done} · {progress.clips} clips · {progress.rejected} rejected"
            bar.update(progress.done / progress.total, note)

        report = index_shards(
            shards,
            out,
            video=video,
            json_extension=json_extension,
            trust=trust,
            identity_from=identity_from,
            strict=strict,
            on_progress=show,
        )
    _print_problems(report.warnings, report.rejected, out, console)
    if report.kept:
        console.print(f"{report.kept} shards were finished by an interrupted run and reused")
    counts = {name: len(report.index.clips_of(name)) for name in report.index.splits}
    splits = ", ".join(f"{count} {name}" for name, count in counts.items())
    console.print(
        f"{out}: {len(report.index)} clips ({splits}) in {report.shards} shards, {report.frames} "
        f"frames, {report.size_bytes / 1e6:.1f} MB where they lie; {len(report.rejected)} rejected",
        markup=False,
    )
    console.print(f"fingerprint: {report.index.fingerprint}")
    return report


def _print_problems(
    warnings: Sequence[str], rejected: Sequence[Rejected], out: str, console: Console
) -> None:
    lines = [f"warning: {warning}" for warning in warnings[:_SHOWN]]
    if len(warnings) > _SHOWN:
        lines.append(f"warning: {len(warnings) - _SHOWN} more warnings")
    lines += [f"rejected: {file}: {reason}" for file, reason in rejected[:_SHOWN]]
    if len(rejected) > _SHOWN:
        lines.append(f"rejected: {len(rejected) - _SHOWN} more, see {out}/rejected.csv")
    for line in lines:
        console.print(line, markup=False)


@contextmanager
def _shown_progress() -> Iterator[Callable[[PackProgress], None]]:
    with ProgressBar("packing", 1.0) as bar:

        def show(progress: PackProgress) -> None:
            note = f"{progress.done}/{progress.total} · {progress.rejected} rejected"
            bar.update(progress.done / progress.total, note)

        yield show


def _print_report(report: PackReport, out: str, console: Console) -> None:
    _print_problems(report.warnings, report.rejected, out, console)
    if report.kept:
        console.print(f"{report.kept} videos were finished by an interrupted run and reused")
    counts = ", ".join(f"{count} {split}" for split, count in report.splits.items())
    splits = f" ({counts})" if counts else ""
    console.print(
        f"{out}: {report.clips} clips{splits}, {report.frames} frames, "
        f"{report.size_bytes / 1e6:.1f} MB; {len(report.rejected)} rejected",
        markup=False,
    )
