"""``prioritycut app``: a local web page (Gradio) that animates what is dropped on it."""

import functools
import os
import shutil
import signal
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageDraw
from rich.console import Console

from prioritycut_ray.errors import UserError
from prioritycut_ray.evaluation.evaluate import short_names
from prioritycut_ray.inference.footage import Limits, survey
from prioritycut_ray.inference.mask import example_mask
from prioritycut_ray.inference.pretrained import Animator
from prioritycut_ray.inference.scene import Motion, Scene, render_scene, set_scene, sound_of
from prioritycut_ray.video.boxes import Box, box_of, parse_crop
from prioritycut_ray.video.decoding import frames_upright, read_picture
from prioritycut_ray.video.encoding import write_video
from prioritycut_ray.video.sound import Sound
from prioritycut_ray.video.source import Frame
from prioritycut_ray.visualize import motion_panel, tiles

LOOPBACK = ("127.0.0.1", "localhost", "::1")
MOST_PIXELS = 4096 * 2304
"""Of a picture, or of a frame of a driving video."""
_KEPT_SECONDS = 3600
# Browsers do not know all of them as pictures or videos.
_SOURCES = ["image", "video", ".heic", ".heif", ".avif", ".mkv"]
_DRIVING = ["video", ".gif", ".webp", ".apng", ".avif", ".mkv"]
# Looked at for every change of the crop. Gradio names an upload by its content.
_survey = functools.lru_cache(maxsize=4)(survey)
_INTRO = (
    "# PriorityCut\n\nDrop a picture and a clip: the picture moves like the clip. Use pictures of "
    "people who agreed to it, and say of the result that it is animated."
)
_TILES = (
    "Above: source, driving, result. Below: occlusion map (black = hidden in the source), hidden "
    "parts in red, the mask in blue:"
)


class Result(NamedTuple):
    """What one model made.

    Attributes:
        animation: mp4, with the sound of the driving video.
        panel: mp4 of the tiles of :func:`prioritycut_ray.visualize.motion_panel`.
    """

    animation: Path
    panel: Path


def serve(
    runs: Sequence[str],
    *,
    host: str,
    port: int | None,
    max_megabytes: int,
    max_seconds: float,
    console: Console,
) -> None:
    """Show the page until Ctrl-C.

    Files that people bring, and results, live in one temporary folder, which goes with the server;
    no other file can be read through it.

    Args:
        runs: one or two models, see :meth:`prioritycut_ray.Animator.from_pretrained`.
        host: address to listen on.
        port: the first free one from 7860 on unless given.
        max_megabytes: of one upload.
        max_seconds: of a driving video.
        console: where the address is told.

    Raises:
        UserError: Gradio is not installed, a model is missing, or the port is taken.
    """
    if len(runs) > 2:
        raise UserError("the page compares two models at most: drop one")
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends as by Ctrl-C, and cleans up
    names = short_names(runs)
    animators = {name: Animator.from_pretrained(run) for name, run in zip(names, runs, strict=True)}
    with tempfile.TemporaryDirectory(prefix="prioritycut-app-") as temporary:
        folder = Path(temporary)
        os.environ["GRADIO_TEMP_DIR"] = str(folder / "uploads")  # read when gradio is imported
        limits = Limits(max_seconds, MOST_PIXELS)
        page = build_page(animators, folder / "results", limits)
        try:
            _, url, _ = page.launch(
                server_name=host,
                server_port=port,
                max_file_size=max_megabytes * 1024**2,
                allowed_paths=[],
                share=False,
                ssr_mode=False,
                mcp_server=False,
                footer_links=[],
                theme=_theme(),
                quiet=True,
                prevent_thread_lock=True,
            )
        except OSError as error:
            raise UserError(f"port {port} of {host}: {error}; choose another --port") from error
        console.print(f"Page: {url} (Ctrl-C ends it)")
        if host not in LOOPBACK:
            console.print(f"warning: whoever reaches {host} can use the page and this machine")
        page.block_thread()


def build_page(animators: dict[str, Animator], results: Path, limits: Limits) -> Any:
    """The page, as a Gradio app that is not yet served.

    Args:
        animators: by the name that is shown.
        results: folder for what is made; of the last request only.
        limits: of what people bring.

    Raises:
        UserError: Gradio is not installed.
    """
    gr = _gradio()

    def animate(
        source: str | None,
        driving: str | None,
        source_crop: str,
        driving_crop: str,
        relative: bool,
        adapt_scale: bool,
        best_frame: bool,
        progress: Any = gr.Progress(),  # noqa: B008
    ) -> list[str]:
        if source is None or driving is None:
            raise gr.Error("Choose a source and a driving video first", print_exception=False)
        motion = Motion(relative, adapt_scale and relative, best_frame and relative)
        with _told(gr, source, driving):
            made = animate_upload(
                animators,
                (Path(source), Path(driving)),
                (source_crop, driving_crop),
                motion,
                results,
                limits,
                lambda done, total, name: progress((done, total), desc=name),
                lambda remark: gr.Warning(remark),
            )
        return [str(path) for result in made for path in result]

    def look(show: Callable[[Path, str, Limits], Frame]) -> Callable[..., Frame | None]:
        def shown(path: str | None, crop: str) -> Frame | None:
            if path is None:
                return None
            with _told(gr, path):
                return show(Path(path), crop, limits)

        return shown

    with gr.Blocks(
        title="PriorityCut", analytics_enabled=False, delete_cache=(_KEPT_SECONDS, _KEPT_SECONDS)
    ) as page:
        gr.Markdown(_INTRO)
        inputs = []
        with gr.Row():
            for name, label, kinds, show in (
                ("source", "Source: a picture, or a video", _SOURCES, source_with_box),
                ("driving", "Driving: a video", _DRIVING, driving_with_box),
            ):
                with gr.Column():
                    file = gr.File(label=label, file_types=kinds, elem_id=name)
                    crop = gr.Textbox(
                        "auto", label="Crop: auto, none, or left,top,right,bottom in pixels"
                    )
                    gr.Markdown("What the model sees is inside the frame:")
                    view = gr.Image(
                        show_label=False,
                        interactive=False,
                        buttons=[],
                        format="png",
                        elem_id=f"{name}-crop",
                    )
                gr.on([file.change, crop.submit, crop.blur], look(show), [file, crop], view)
                inputs.append((file, crop))
        with gr.Row():
            options = [
                gr.Checkbox(True, label="Relative motion"),
                gr.Checkbox(False, label="Adapt scale"),
                gr.Checkbox(False, label="Best frame"),
            ]
        button = gr.Button("Animate", variant="primary", elem_id="animate")
        videos = []
        with gr.Row():
            for name in animators:
                with gr.Column():
                    gr.Markdown(f"### {name}")
                    videos.append(_video(gr))
                    gr.Markdown(_TILES)
                    videos.append(_video(gr))
        (source, source_crop), (driving, driving_crop) = inputs
        button.click(
            animate,
            [source, driving, source_crop, driving_crop, *options],
            videos,
            concurrency_limit=1,
        )
    return page.queue(max_size=8)


def _video(gr: Any) -> Any:
    return gr.Video(show_label=False, interactive=False, buttons=["download"], loop=True)


def animate_upload(
    animators: dict[str, Animator],
    files: tuple[Path, Path],
    crops: tuple[str, str],
    motion: Motion,
    results: Path,
    limits: Limits,
    on_frame: Callable[[int, int, str], None],
    on_remark: Callable[[str], None],
) -> list[Result]:
    """Animate by every model.

    Args:
        animators: by name.
        files: source and driving video.
        crops: of the two, see :func:`prioritycut_ray.video.boxes.parse_crop`.
        motion: how the source is moved.
        results: folder; what was in it is removed.
        limits: of what people bring.
        on_frame: called with how many frames are done, of how many, and the name of the model.
        on_remark: called with what is wrong with the sound, if anything.

    Raises:
        UserError: a file cannot be read, or is beyond the limits.
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
        made.append(_result(animator, scene, motion, folder, sound, name, on_frame))
    return made


def _result(
    animator: Animator,
    scene: Scene,
    motion: Motion,
    folder: Path,
    sound: Sound | None,
    name: str,
    on_frame: Callable[[int, int, str], None],
) -> Result:
    """Render once; the limits keep the frames of one video small enough to hold."""
    plain: list[Frame] = []
    timing, fps = scene.driving.timing, scene.driving.fps

    def panels() -> Iterator[Frame]:
        for pair, animation in render_scene(animator, scene, motion):
            mask = example_mask(animation, animator.config)
            plain.extend(tiles([animation.prediction]).numpy())
            yield from motion_panel(pair, animation, mask).numpy()
            on_frame(len(plain), len(timing.starts), name)

    result = Result(folder / "animation.mp4", folder / "panel.mp4")
    write_video(result.panel, panels(), fps, timing=timing)
    write_video(result.animation, plain, fps, timing=timing, sound=sound)
    return result


def source_with_box(path: Path, crop: str, limits: Limits) -> Frame:
    """A source with the part that the model sees in a frame."""
    picture = read_picture(path, limits.pixels).image
    height, width = picture.shape[:2]
    return _framed(picture, box_of(parse_crop(crop), width, height, name=str(path)))


def driving_with_box(path: Path, crop: str, limits: Limits) -> Frame:
    """The first frame of a driving video with the part that the model sees in a frame."""
    footage = _survey(path, limits)
    box = box_of(parse_crop(crop), footage.width, footage.height, footage.motion, str(path))
    return _framed(next(frames_upright(path)), box)


def _framed(picture: Frame, box: Box) -> Frame:
    image = Image.fromarray(picture)
    width = max(2, max(image.size) // 100)
    ImageDraw.Draw(image).rectangle(
        (box.left, box.top, box.right - 1, box.bottom - 1), outline=(255, 90, 0), width=width
    )
    return np.asarray(image)


@contextmanager
def _told(gr: Any, *paths: str) -> Iterator[None]:
    """Errors for users as Gradio shows them, without the folders of the server."""
    try:
        yield
    except UserError as error:
        text = str(error)
        for path in paths:
            text = text.replace(f"{Path(path).parent}/", "")
        raise gr.Error(text, print_exception=False) from error


def _gradio() -> Any:
    try:
        import gradio
    except ModuleNotFoundError as error:
        raise UserError("the page needs Gradio: pip install 'prioritycut_ray[app]'") from error
    return gradio


def _theme() -> Any:
    """Fonts of the reader's system: the default theme would fetch its own from elsewhere."""
    fonts = ["system-ui", "sans-serif"]
    return _gradio().themes.Base(font=fonts, font_mono=["monospace"])
