"""``prioritycut animate``."""

import time
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from rich.console import Console

from prioritycut_ray.ahead import ahead
from prioritycut_ray.data.footage import (
    Crop,
    Footage,
    box_of,
    cut_picture,
    parse_crop,
    squares,
    survey,
)
from prioritycut_ray.data.manifest import Box
from prioritycut_ray.data.output import check_output, write_animation
from prioritycut_ray.data.video import Frame, Sound, read_picture, survey_sound
from prioritycut_ray.errors import UserError
from prioritycut_ray.inference import BATCH, Rendered, find_best_frame, to_tensor
from prioritycut_ray.pretrained import Animator
from prioritycut_ray.progress import ProgressBar
from prioritycut_ray.storage import fetched
from prioritycut_ray.visualize import tiles


class Motion(NamedTuple):
    """How the source is moved (method §6).

    Attributes:
        relative: by the change since the initial driving frame; or to the driving pose itself.
        adapt_scale: scale relative motion to the source's size.
        best_frame: take as initial the driving frame whose pose is nearest to the source's.
    """

    relative: bool = True
    adapt_scale: bool = False
    best_frame: bool = False


class Scene(NamedTuple):
    """Source and driving video, cut and ready.

    Attributes:
        source: ``uint8 [S, S, 3]``.
        source_box: what was cut out of it, in its pixels.
        driving: the video.
        driving_box: what is cut out of each frame, in pixels.
    """

    source: Frame
    source_box: Box
    driving: Footage
    driving_box: Box


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
        run: what :meth:`prioritycut_ray.pretrained.Animator.from_pretrained` takes.
        source: an image, or a video for its first frame; a path or an fsspec URL.
        driving: a video; a path or an fsspec URL.
        out: .mp4, .gif, or a folder of PNG files.
        motion: how the source is moved.
        crop: of both, as :func:`prioritycut_ray.data.footage.parse_crop` reads it.
        source_crop: of the source, where it differs.
        panel: source, driving crop and result side by side.
        console: where crops and the result are told.

    Raises:
        UserError: something of it cannot be read, written or used together.
    """
    _check_motion(motion)
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


def set_scene(
    source: Path, driving: Path, crops: tuple[Crop, Crop], size: int, footage: Footage
) -> Scene:
    """Cut source and driving video.

    Args:
        source: an image, or a video for its first frame.
        driving: a video.
        crops: of the source and of the driving video.
        size: of the model's frames in pixels.
        footage: of the driving video.
    """
    picture = read_picture(source)
    source_box = box_of(crops[0], picture.width, picture.height, name=str(source))
    driving_box = box_of(crops[1], footage.width, footage.height, footage.motion, name=str(driving))
    return Scene(cut_picture(picture, source_box, size), source_box, footage, driving_box)


def describe(source: Path, scene: Scene, size: int) -> list[str]:
    """Crops and timing in words."""
    footage = scene.driving
    rate = f"{footage.fps:.2f} fps" + " (variable)" * footage.variable_rate
    return [
        f"Source:  {source.name}, crop {_words(scene.source_box)} -> {size}x{size}",
        f"Driving: {footage.path.name}, {footage.width}x{footage.height}, crop "
        f"{_words(scene.driving_box)} -> {size}x{size}, {len(footage.timing.starts)} frames, "
        f"{footage.timing.end:.2f} s, {rate}",
    ]


def sound_of(footage: Footage) -> tuple[Sound | None, str]:
    """The sound of a driving video, and what is wrong with it, if anything."""
    info = survey_sound(footage.path)
    if info is None:
        return None, ""
    if not info.pieces:
        return None, f"left out: it cannot be decoded ({info.codec or 'unknown codec'})"
    remark = f"{info.lost} damaged pieces are silent" if info.lost else ""
    return Sound(footage.path, footage.offset, footage.timing.end), remark


def render_scene(animator: Animator, scene: Scene, motion: Motion) -> Iterator[Rendered]:
    """Animate a scene, batch by batch; decoded and computed ahead in threads."""

    def driving() -> Iterator[Frame]:
        return ahead(squares(scene.driving, scene.driving_box, animator.size), BATCH)

    initial = None
    if motion.best_frame:
        still = to_tensor(scene.source[None], animator.device)
        best = find_best_frame(animator.network, still, driving())
        initial = next(islice(driving(), best, None))
    rendered = animator.render(
        scene.source,
        driving(),
        relative=motion.relative,
        adapt_scale=motion.adapt_scale,
        initial=initial,
    )
    return ahead(rendered)


def _check_motion(motion: Motion) -> None:
    if motion.relative:
        return
    for name, wanted in (
        ("--adapt-scale", motion.adapt_scale),
        ("--best-frame", motion.best_frame),
    ):
        if wanted:
            raise UserError(f"{name} is of relative motion: drop it, or drop --no-relative")


def panel_frames(batches: Iterable[Rendered], *, panel: bool) -> Iterator[Frame]:
    """Results frame by frame; in a panel beside source and driving crop."""
    for pair, animation in batches:
        beside = [*pair] if panel else []
        yield from tiles([*beside, animation.prediction]).numpy()


def _counted(frames: Iterable[Frame], count: int, bar: ProgressBar) -> Iterator[Frame]:
    started = time.monotonic()
    for done, frame in enumerate(frames, start=1):
        yield frame
        speed = done / (time.monotonic() - started)
        bar.update(done, f"{done}/{count} frames, {speed:.1f} frames/s")


def _words(box: Box) -> str:
    shape = f"{box.right - box.left}x{box.bottom - box.top}"
    return f"{','.join(map(str, box))} ({shape})"
