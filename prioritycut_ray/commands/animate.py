"""``prioritycut animate``."""

import time
from collections.abc import Iterable, Iterator
from pathlib import Path

from rich.console import Console

from prioritycut_ray.errors import UserError
from prioritycut_ray.inference.footage import sound_of, survey
from prioritycut_ray.inference.output import check_output, write_animation
from prioritycut_ray.inference.pretrained import Animator
from prioritycut_ray.inference.scene import (
    Motion,
    Scene,
    describe_scene,
    panel_frames,
    render_scene,
    set_scene,
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
    """Animate a source image with a driving video and write the result; see docs/animation.md.

    Args:
        run: a model, see :meth:`prioritycut_ray.Animator.from_pretrained`.
        source: an image, or a video, of which the first frame is used; a path or an fsspec URL.
        driving: a video; a path or an fsspec URL.
        out: .mp4, .gif, or a folder for PNG files.
        motion: how the source moves.
        crop: of both, see :func:`prioritycut_ray.video.boxes.parse_crop`.
        source_crop: of the source, if it differs.
        panel: put source, driving crop and result side by side.
        console: where to print the crops and the result.

    Raises:
        UserError: an input cannot be read, the output cannot be written, or options conflict.
    """
    check_motion(motion)
    crops = parse_crop(source_crop or crop), parse_crop(crop)
    with fetched(str(source)) as picture, fetched(str(driving)) as video:
        check_output(out, (picture, video))
        animator = Animator.from_pretrained(run)
        scene = set_scene(picture, video, crops, animator.size, survey(video))
        for line in describe_scene(picture, scene, animator.size):
            console.print(line, markup=False)
        _write(animator, scene, motion, out, panel=panel, console=console)
    console.print(f"Animation: {out}", markup=False)


def check_motion(motion: Motion) -> None:
    """Refuse options that have no effect on absolute motion.

    Raises:
        UserError: such an option is set; the message names it.
    """
    if motion.relative:
        return
    for name, is_set in (
        ("--adapt-scale", motion.adapt_scale),
        ("--best-frame", motion.best_frame),
    ):
        if is_set:
            raise UserError(f"{name} requires relative motion: drop it, or drop --no-relative")


def _write(
    animator: Animator,
    scene: Scene,
    motion: Motion,
    out: Path,
    *,
    panel: bool,
    console: Console,
) -> None:
    sound, remark = sound_of(scene.driving)
    if sound is not None and out.suffix.lower() != ".mp4":
        remark = "left out: only .mp4 can hold it"
    if remark:
        console.print(f"Sound:   {remark}", markup=False)
    timing, fps = scene.driving.timing, scene.driving.fps
    frames = panel_frames(render_scene(animator, scene, motion), panel=panel)
    with ProgressBar("animating", len(timing.starts)) as bar:
        write_animation(out, _with_progress(frames, len(timing.starts), bar), timing, fps, sound)


def _with_progress(frames: Iterable[Frame], count: int, bar: ProgressBar) -> Iterator[Frame]:
    started = time.monotonic()
    for done, frame in enumerate(frames, start=1):
        yield frame
        speed = done / (time.monotonic() - started)
        bar.update(done, f"{done}/{count} frames, {speed:.1f} frames/s")
