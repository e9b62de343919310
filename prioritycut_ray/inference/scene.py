"""A source and a driving video, prepared for a model, and the animation of the one by the other."""

from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from prioritycut_ray.inference.animate import BATCH, Rendered, find_best_frame, to_tensor
from prioritycut_ray.inference.footage import Footage, cut_picture, squares
from prioritycut_ray.inference.pretrained import Animator
from prioritycut_ray.inference.smoothing import window_of
from prioritycut_ray.prefetch import prefetch
from prioritycut_ray.video.boxes import Box, Crop, box_of
from prioritycut_ray.video.decoding import read_picture
from prioritycut_ray.video.source import Frame
from prioritycut_ray.visualize import tiles


class Motion(NamedTuple):
    """How the source moves (method §6).

    Attributes:
        relative: apply the motion since the initial driving frame; otherwise take over the
            driving pose itself.
        adapt_scale: scale relative motion to the size of the source.
        best_frame: start from the driving frame whose pose is nearest to the source's.
        smooth: smooth the driving keypoints, which jitter from frame to frame.
    """

    relative: bool = True
    adapt_scale: bool = False
    best_frame: bool = False
    smooth: bool = False


class Scene(NamedTuple):
    """A source and a driving video, cropped.

    Attributes:
        source: ``uint8 [S, S, 3]``.
        source_box: the part that was cut out of the source, in its pixels.
        driving: the driving video.
        driving_box: the part to cut out of each driving frame, in pixels.
    """

    source: Frame
    source_box: Box
    driving: Footage
    driving_box: Box


def set_scene(
    source: Path, driving: Path, crops: tuple[Crop, Crop], size: int, footage: Footage
) -> Scene:
    """Crop a source and a driving video.

    Args:
        source: an image, or a video, of which the first frame is used.
        driving: a video.
        crops: of the source and of the driving video.
        size: of the model's frames in pixels.
        footage: of the driving video.

    Raises:
        UserError: the source cannot be read, or a crop is not inside its picture.
    """
    picture = read_picture(source)
    source_box = box_of(crops[0], picture.width, picture.height, name=str(source))
    driving_box = box_of(crops[1], footage.width, footage.height, footage.motion, name=str(driving))
    return Scene(cut_picture(picture, source_box, size), source_box, footage, driving_box)


def describe_scene(source: Path, scene: Scene, size: int) -> list[str]:
    """Describe crops and timing, one line for the source and one for the driving video."""
    footage = scene.driving
    rate = f"{footage.fps:.2f} fps" + " (variable)" * footage.variable_rate
    return [
        f"Source:  {source.name}, crop {_box_text(scene.source_box)} -> {size}x{size}",
        f"Driving: {footage.path.name}, {footage.width}x{footage.height}, crop "
        f"{_box_text(scene.driving_box)} -> {size}x{size}, {len(footage.timing.starts)} frames, "
        f"{footage.timing.end:.2f} s, {rate}",
    ]


def render_scene(animator: Animator, scene: Scene, motion: Motion) -> Iterator[Rendered]:
    """Animate a scene batch by batch; threads decode and compute ahead of the caller."""

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
        smooth=window_of(scene.driving.fps) if motion.smooth else 0,
    )
    return prefetch(rendered)


def panel_frames(batches: Iterable[Rendered], *, panel: bool) -> Iterator[Frame]:
    """Yield the results frame by frame; as a panel, with source and driving crop beside each."""
    for pair, animation in batches:
        beside = [*pair] if panel else []
        yield from tiles([*beside, animation.prediction]).numpy()


def _box_text(box: Box) -> str:
    shape = f"{box.right - box.left}x{box.bottom - box.top}"
    return f"{','.join(map(str, box))} ({shape})"
