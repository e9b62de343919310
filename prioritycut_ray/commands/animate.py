"""``prioritycut animate``."""

import time
from collections.abc import Iterable, Iterator
from pathlib import Path

from rich.console import Console

from prioritycut_ray.inference.footage import survey
from prioritycut_ray.inference.output import check_output, write_animation
from prioritycut_ray.inference.pretrained import Animator
from prioritycut_ray.inference.scene import (
    Motion,
    Scene,
    check_motion,
    describe,
    panel_frames,
    render_scene,
    set_scene,
    sound_of,
)
from prioritycut_ray.progress import ProgressBar
from prioritycut_ray.storage.reading import fetched
from prioritycut_ray.video.boxes import parse_crop
from prioritycut_ray.video.source import Frame


def animate(
    run: str | Path,
    source: str | Path,
    driving: str | Path,
    out: Path,
    *,
    motion: Motion = Motion(),  # noqa: B008
    crop: str = "auto",
    source_crop: str | None = None,
    panel: bool = False,
    console: Console,
) -> None:
    """Animate a source image by a driving video and write it; see docs/animation.md.

    Args:
        run: what :meth:`prioritycut_ray.inference.pretrained.Animator.from_pretrained` takes.
        source: an image, or a video for its first frame; a path or an fsspec URL.
        driving: a video; a path or an fsspec URL.
        out: .mp4, .gif, or a folder of PNG files.
        motion: how the source is moved.
        crop: of both, as :func:`prioritycut_ray.video.boxes.parse_crop` reads it.
        source_crop: of the source, where it differs.
        panel: source, driving crop and result side by side.
        console: where crops and the result are told.

    Raises:
        UserError: something of it cannot be read, written or used together.
    """
    check_motion(motion)
    crops = parse_crop(source_crop or crop), parse_crop(crop)
    with fetched(str(source)) as picture, fetched(str(driving)) as video:
        check_output(out, (picture, video))
        animator = Animator.from_pretrained(run)
        scene = set_scene(picture, video, crops, animator.size, survey(video))
        _write(animator, scene, motion, picture, out, panel=panel, console=console)
    console.print(f"Animation: {out}", markup=False)


def _write(
    animator: Animator,
    scene: Scene,
    motion: Motion,
    source: Path,
    out: Path,
    *,
    panel: bool,
    console: Console,
) -> None:
    for line in describe(source, scene, animator.size):
        console.print(line, markup=False)
    sound, remark = sound_of(scene.driving)
    if sound is not None and out.suffix.lower() != ".mp4":
        remark = "left out: only .mp4 can hold it"
    if remark:
        console.print(f"Sound:   {remark}", markup=False)
    count = len(scene.driving.timing.starts)
    with ProgressBar("animating", count) as bar:
        rendered = render_scene(animator, scene, motion)
        write_animation(
            out,
            _counted(panel_frames(rendered, panel=panel), count, bar),
            scene.driving.timing,
            scene.driving.fps,
            sound,
        )


def _counted(frames: Iterable[Frame], count: int, bar: ProgressBar) -> Iterator[Frame]:
    started = time.monotonic()
    for done, frame in enumerate(frames, start=1):
        yield frame
        speed = done / (time.monotonic() - started)
        bar.update(done, f"{done}/{count} frames, {speed:.1f} frames/s")
