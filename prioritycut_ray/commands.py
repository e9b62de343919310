"""What each verb of the command line does: run a job with progress, and say what it made."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from rich.console import Console
from rich.table import Table
from torch import Tensor

from prioritycut_ray.checkpoint import find_checkpoint, load_animator
from prioritycut_ray.config import Config
from prioritycut_ray.data.packing import PackProgress, PackReport, pack_videos
from prioritycut_ray.data.video import (
    center_square,
    frames_upright,
    probe,
    read_image,
    resize,
    write_video,
)
from prioritycut_ray.errors import UserError
from prioritycut_ray.evaluation import Evaluation, evaluate_run
from prioritycut_ray.inference import animate, to_tensor
from prioritycut_ray.launch import launch
from prioritycut_ray.progress import ProgressBar, training_note
from prioritycut_ray.ray_session import start_ray


def shard(videos: Sequence[str], out: str, *, size: int, console: Console) -> PackReport:
    """Pack videos into shards and say what became of them."""
    start_ray()
    with ProgressBar("packing", 1.0) as bar:

        def show(progress: PackProgress) -> None:
            note = f"{progress.done}/{progress.total} · {progress.rejected} rejected"
            bar.update(progress.done / progress.total, note)

        report = pack_videos(videos, out, size=size, on_progress=show)
    for warning in report.warnings:
        console.print(f"warning: {warning}")
    for file, reason in report.rejected:
        console.print(f"rejected: {file}: {reason}")
    splits = {clip.split for clip in report.index.clips}
    counts = {split: sum(c.split == split for c in report.index.clips) for split in sorted(splits)}
    console.print(
        f"{out}: {report.clips} clips ({', '.join(f'{n} {s}' for s, n in counts.items())}), "
        f"{report.frames} frames, {report.size_bytes / 1e6:.1f} MB; {len(report.rejected)} rejected"
    )
    return report


def train(config: Config) -> Path:
    """Train, or resume the run of this name; gives the run's folder."""
    with ProgressBar("training", config.train.samples) as bar:
        return launch(
            with_absolute_paths(config),
            lambda metrics: bar.update(metrics["samples"], training_note(metrics)),
        )


def evaluate(run: Path, data: str, *, split: str, out: Path | None, console: Console) -> Evaluation:
    """Score a run on held-out clips; writes ``evaluation.json`` and ``columns.png``."""
    with ProgressBar("evaluating", 1.0) as bar:
        evaluation, columns = evaluate_run(
            run,
            data,
            split=split,
            device=default_device(),
            on_clip=lambda done, total, key: bar.update(done / total, f"{done}/{total} {key}"),
        )
    folder = out or run / "evaluation" / split
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "evaluation.json").write_text(evaluation.model_dump_json(indent=1))
    write_picture(folder / "columns.png", columns)
    for key, reason in evaluation.skipped.items():
        console.print(f"skipped: {key}: {reason}")
    console.print(score_table(evaluation))
    console.print(f"Written: {folder}/evaluation.json, {folder}/columns.png")
    return evaluation


def animate_files(run: Path, source: Path, driving: Path, out: Path, *, relative: bool) -> None:
    """Animate a source image by a driving video and write an mp4."""
    if out.suffix.lower() != ".mp4":
        raise UserError(f"{out}: the animation is written as .mp4; give such a name")
    animator, config = load_animator(find_checkpoint(run), default_device())
    size = config.data.size
    picture = resize(center_square(read_image(source)), size)
    still = to_tensor(picture[None], default_device())
    frames = (resize(center_square(frame), size) for frame in frames_upright(driving))
    out.parent.mkdir(parents=True, exist_ok=True)
    moved = animate(animator, still, frames, relative=relative)
    write_video(out, _single_frames(moved), probe(driving).fps)


def score_table(evaluation: Evaluation) -> Table:
    """The scores clip by clip, the model beside the baseline."""
    table = Table(title=f"Video reconstruction, split {evaluation.split}, {evaluation.size}²")
    table.add_column("clip")
    for metric in ("L1 ↓", "PSNR dB ↑", "SSIM ↑"):
        table.add_column(f"{metric}\nmodel", justify="right")
        table.add_column(f"{metric}\ncopy source", justify="right")
    rows = [(clip.key, clip.model, clip.copy_source) for clip in evaluation.clips]
    for key, model, copy in [*rows, ("mean", evaluation.model, evaluation.copy_source)]:
        formats = {"l1": ".4f", "psnr": ".2f", "ssim": ".3f"}
        cells = [format(s[name], spec) for name, spec in formats.items() for s in (model, copy)]
        table.add_row(key, *cells, end_section=key != "mean" and key == rows[-1][0])
    return table


def write_picture(path: Path, picture: Tensor) -> None:
    """Write a uint8 picture `[3, H, W]` as PNG."""
    Image.fromarray(picture.permute(1, 2, 0).numpy()).save(path)


def default_device() -> torch.device:
    """The first GPU, or the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def with_absolute_paths(config: Config) -> Config:
    """Workers run in folders of their own: relative paths are taken from where the user stands."""
    perceptual = config.loss.perceptual
    weights = perceptual.weights
    if weights not in ("pretrained", "efficientnet_lite0", "random"):
        weights = str(Path(weights).absolute())
    return config.model_copy(
        update={
            "storage": _absolute(config.storage),
            "data": config.data.model_copy(update={"url": _absolute(config.data.url)}),
            "loss": config.loss.model_copy(
                update={"perceptual": perceptual.model_copy(update={"weights": weights})}
            ),
        }
    )


def _absolute(location: str) -> str:
    return location if "://" in location else str(Path(location).absolute())


def _single_frames(batches: Iterator[Tensor]) -> Iterator[NDArray[np.uint8]]:
    for batch in batches:
        yield from batch.permute(0, 2, 3, 1).numpy()
