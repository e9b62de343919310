"""``prioritycut quickstart``: all steps on synthetic puppets, without a download."""

import shlex
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from prioritycut_ray.commands.animate import animate
from prioritycut_ray.commands.evaluate import evaluate_and_print
from prioritycut_ray.commands.shard import shard
from prioritycut_ray.config import load_config
from prioritycut_ray.data.index import has_index
from prioritycut_ray.data.puppets import render_clip
from prioritycut_ray.errors import UserError
from prioritycut_ray.launch.train import train
from prioritycut_ray.progress import ProgressBar
from prioritycut_ray.video.encoding import write_video

CONFIG = "quickstart_tps"
CLIPS = 40
FPS = 16.0


def run_quickstart(out: Path, overrides: Sequence[str], console: Console) -> None:
    """Render puppets, pack them, train, evaluate and animate; run again to resume.

    Args:
        out: folder for all files that it creates.
        overrides: changes to the quickstart configuration, as ``dotted.key=value``.
        console: where to print the summary.

    Raises:
        UserError: the folder contains other files.
    """
    if out.exists() and any(out.iterdir()) and not (out / "videos").is_dir():
        raise UserError(f"{out}: contains other files; choose another --out")
    places = [f"data.url={out / 'data'}", f"storage={out / 'runs'}"]
    config = load_config(CONFIG, [*places, *overrides])
    size = config.data.size
    console.print("[1/5] rendering synthetic puppets")
    videos = render_videos(out / "videos", size)
    console.print("[2/5] packing them into WebDataset shards")
    data = out / "data"
    if not has_index(path.name for path in data.glob("*")):
        shard([str(out / "videos")], str(data), size=size, console=console)
    workers = config.train.workers
    place = f"with Ray Train (train.workers={workers})" if workers else "in this process"
    console.print(f"[3/5] training {place}")
    run = Path(train(config))
    console.print("[4/5] evaluating on held-out clips")
    evaluate_and_print(run, str(data), out=out / "evaluation", console=console)
    console.print("[5/5] animating one puppet with the motion of another")
    source, driving = videos[-2:]
    animation = out / "animation.mp4"
    animate(run, source, driving, animation, console=console)
    console.print(
        "",
        f"Created in {out} (synthetic puppets; small networks; a proxy perceptual loss):",
        "  videos/                 the puppets          data/  their WebDataset shards",
        f"  {run.relative_to(out.absolute())}         checkpoints and TensorBoard logs",
        "  evaluation/columns.png  source, driving, generated, occlusion, PriorityCut mask, mixed",
        "  evaluation/report.html  scores with intervals, best and worst clips as videos",
        "  animation.mp4           one puppet with the motion of another",
        "View it:",
        f"  {shlex.join(['tensorboard', '--logdir', str(run)])}",
        f"  {shlex.join(['xdg-open', str(animation)])}   (macOS: open)",
        sep="\n",
        markup=False,
    )


def render_videos(folder: Path, size: int) -> list[Path]:
    """Write the puppet clips as mp4; existing clips are kept."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"puppet_{seed:03d}.mp4" for seed in range(CLIPS)]
    with ProgressBar("rendering", CLIPS) as bar:
        for seed, path in enumerate(paths):
            if not path.exists():
                write_video(path, render_clip(seed, size=size).frames, FPS)
            bar.update(seed + 1, path.name)
    return paths
