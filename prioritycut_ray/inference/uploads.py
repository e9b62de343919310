"""What the web page makes of uploaded files: a preview of each crop, and the animations."""

import functools
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw

from prioritycut_ray.inference.footage import Limits, sound_of, survey
from prioritycut_ray.inference.mask import example_mask
from prioritycut_ray.inference.pretrained import Animator
from prioritycut_ray.inference.scene import Motion, Scene, render_scene, set_scene
from prioritycut_ray.video.boxes import Box, box_of, parse_crop
from prioritycut_ray.video.decoding import frames_upright, read_picture
from prioritycut_ray.video.encoding import write_video
from prioritycut_ray.video.sound import Sound
from prioritycut_ray.video.source import Frame
from prioritycut_ray.visualize import motion_panel, tiles

OnFrame = Callable[[int, int, str], None]
"""Called with the number of frames done, the total, and the name of the model."""

# Every change of a crop needs it. Gradio names an upload after its content.
_survey = functools.lru_cache(maxsize=4)(survey)


class Result(NamedTuple):
    """The videos that one model made.

    Attributes:
        animation: mp4, with the sound of the driving video.
        panel: mp4 of the tiles of :func:`prioritycut_ray.visualize.motion_panel`.
    """

    animation: Path
    panel: Path


def animate_upload(
    animators: Mapping[str, Animator],
    files: tuple[Path, Path],
    crops: tuple[str, str],
    motion: Motion,
    results: Path,
    limits: Limits,
    on_frame: OnFrame,
    on_remark: Callable[[str], None],
) -> list[Result]:
    """Animate a source with a driving video, by every model.

    Args:
        animators: by name.
        files: source and driving video.
        crops: of the two, see :func:`prioritycut_ray.video.boxes.parse_crop`.
        motion: how the source moves.
        results: folder to write to; its previous content is deleted.
        limits: of the uploads.
        on_frame: see :data:`OnFrame`.
        on_remark: called with a remark if the sound is damaged or cannot be decoded.

    Returns:
        One result for each model.

    Raises:
        UserError: a file cannot be read or exceeds the limits.
    """
    source, driving = files
    parsed = parse_crop(crops[0]), parse_crop(crops[1])
    read_picture(source, limits.pixels)
    footage = _survey(driving, limits)
    sound, remark = sound_of(footage)
    if remark:
        on_remark(f"Sound: {remark}")
    shutil.rmtree(results, ignore_errors=True)
    made = []
    for number, (name, animator) in enumerate(animators.items()):
        scene = set_scene(source, driving, parsed, animator.size, footage)
        folder = results / str(number)
        folder.mkdir(parents=True)
        report = functools.partial(_report, on_frame, len(footage.timing.starts), name)
        made.append(_write_result(animator, scene, motion, folder, sound, report))
    return made


def _report(on_frame: OnFrame, total: int, name: str, done: int) -> None:
    on_frame(done, total, name)


def _write_result(
    animator: Animator,
    scene: Scene,
    motion: Motion,
    folder: Path,
    sound: Sound | None,
    on_done: Callable[[int], None],
) -> Result:
    """Render once for both videos; the limits keep the frames small enough for memory."""
    plain: list[Frame] = []
    timing, fps = scene.driving.timing, scene.driving.fps

    def panels() -> Iterator[Frame]:
        for pair, animation in render_scene(animator, scene, motion):
            mask = example_mask(animation, animator.config)
            plain.extend(tiles([animation.prediction]).numpy())
            yield from motion_panel(pair, animation, mask).numpy()
            on_done(len(plain))

    result = Result(folder / "animation.mp4", folder / "panel.mp4")
    write_video(result.panel, panels(), fps, timing=timing)
    write_video(result.animation, plain, fps, timing=timing, sound=sound)
    return result


def source_with_box(path: Path, crop: str, limits: Limits) -> Frame:
    """Draw the crop on a source.

    Raises:
        UserError: the file cannot be read or exceeds the limits, or the crop is not inside it.
    """
    picture = read_picture(path, limits.pixels).image
    height, width = picture.shape[:2]
    return _outlined(picture, box_of(parse_crop(crop), width, height, name=str(path)))


def driving_with_box(path: Path, crop: str, limits: Limits) -> Frame:
    """Draw the crop on the first frame of a driving video.

    Raises:
        UserError: the file cannot be read or exceeds the limits, or the crop is not inside it.
    """
    footage = _survey(path, limits)
    box = box_of(parse_crop(crop), footage.width, footage.height, footage.motion, str(path))
    return _outlined(next(frames_upright(path)), box)


def _outlined(picture: Frame, box: Box) -> Frame:
    image = Image.fromarray(picture)
    width = max(2, max(image.size) // 100)
    ImageDraw.Draw(image).rectangle(
        (box.left, box.top, box.right - 1, box.bottom - 1), outline=(255, 90, 0), width=width
    )
    return np.asarray(image)
