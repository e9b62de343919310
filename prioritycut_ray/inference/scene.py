"""A source and a driving video, prepared for a model, and the frames that come of them."""

from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from prioritycut_ray.errors import UserError
from prioritycut_ray.inference.animate import BATCH, Rendered, find_best_frame, to_tensor
from prioritycut_ray.inference.footage import Footage, cut_picture, squares
from prioritycut_ray.inference.pretrained import Animator
from prioritycut_ray.prefetch import prefetch
from prioritycut_ray.video.boxes import Box, Crop, box_of
from prioritycut_ray.video.decoding import read_picture
from prioritycut_ray.video.sound import Sound, survey_sound
from prioritycut_ray.video.source import Frame
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
    """Animate a scene, batch by batch; decoded and computed in prefetch threads."""

    def driving() -> Iterator[Frame]:
        return prefetch(squares(scene.driving, scene.driving_box, animator.size), BATCH)

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
    return prefetch(rendered)


def check_motion(motion: Motion) -> None:
    """Refuse options that absolute motion does not have.

    Raises:
        UserError: naming the option.
    """
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


def _words(box: Box) -> str:
    shape = f"{box.right - box.left}x{box.bottom - box.top}"
    return f"{','.join(map(str, box))} ({shape})"
