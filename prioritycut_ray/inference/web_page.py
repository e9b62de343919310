"""A Gradio page that animates uploaded files."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from prioritycut_ray.errors import UserError
from prioritycut_ray.inference.footage import Limits
from prioritycut_ray.inference.pretrained import Animator
from prioritycut_ray.inference.scene import Motion
from prioritycut_ray.inference.uploads import animate_upload, driving_with_box, source_with_box
from prioritycut_ray.video.source import Frame

_SECONDS_KEPT = 3600
"""Uploads older than this are deleted, by a check at this interval."""
# Browsers do not recognise all of these as pictures or videos.
_SOURCE_TYPES = ["image", "video", ".heic", ".heif", ".avif", ".mkv"]
_DRIVING_TYPES = ["video", ".gif", ".webp", ".apng", ".avif", ".mkv"]
_INTRO = (
    "# PriorityCut\n\nUpload a picture and a video: the picture moves like the video. Use pictures "
    "of people who have agreed to it, and label the result as animated."
)
_PANEL = (
    "Top: source, driving frame, result. Bottom: occlusion map (black = hidden in the source), "
    "hidden parts in red, the mask in blue:"
)


class _Input(NamedTuple):
    """The components of an upload."""

    file: Any
    crop: Any


def build_page(animators: Mapping[str, Animator], results: Path, limits: Limits) -> Any:
    """Build the page as a Gradio app that can be launched.

    Args:
        animators: by the name to show.
        results: folder for the videos of the latest request.
        limits: of the uploads.

    Raises:
        UserError: Gradio is not installed.
    """
    gr = import_gradio()
    with gr.Blocks(
        title="PriorityCut", analytics_enabled=False, delete_cache=(_SECONDS_KEPT, _SECONDS_KEPT)
    ) as page:
        gr.Markdown(_INTRO)
        with gr.Row():
            source = _upload(
                gr, "source", "Source: a picture or a video", _SOURCE_TYPES, source_with_box, limits
            )
            driving = _upload(
                gr, "driving", "Driving: a video", _DRIVING_TYPES, driving_with_box, limits
            )
        with gr.Row():
            options = [
                gr.Checkbox(True, label="Relative motion"),
                gr.Checkbox(False, label="Adapt scale"),
                gr.Checkbox(False, label="Best frame"),
            ]
        button = gr.Button("Animate", variant="primary", elem_id="animate")
        with gr.Row():
            videos = [video for name in animators for video in _result_videos(gr, name)]
        button.click(
            _animate(gr, animators, results, limits),
            [source.file, driving.file, source.crop, driving.crop, *options],
            videos,
            concurrency_limit=1,
        )
    return page.queue(max_size=8)


def import_gradio() -> Any:
    """Return the module.

    Raises:
        UserError: Gradio is not installed.
    """
    try:
        import gradio
    except ModuleNotFoundError as error:
        raise UserError(
            "the page requires Gradio: install it with `pip install 'prioritycut_ray[app]'`"
        ) from error
    return gradio


def _upload(
    gr: Any,
    name: str,
    label: str,
    types: list[str],
    draw: Callable[[Path, str, Limits], Frame],
    limits: Limits,
) -> _Input:
    """Add a column with a file, its crop, and a preview of the crop."""

    def shown(path: str | None, crop: str) -> Frame | None:
        if path is None:
            return None
        with _errors_on_page(gr, path):
            return draw(Path(path), crop, limits)

    with gr.Column():
        file = gr.File(label=label, file_types=types, elem_id=name)
        crop = gr.Textbox("auto", label="Crop: auto, none, or left,top,right,bottom in pixels")
        gr.Markdown("The model sees what is inside the frame:")
        preview = gr.Image(
            show_label=False, interactive=False, buttons=[], format="png", elem_id=f"{name}-crop"
        )
    gr.on([file.change, crop.submit, crop.blur], shown, [file, crop], preview)
    return _Input(file, crop)


def _result_videos(gr: Any, name: str) -> tuple[Any, Any]:
    """Add a column with the animation and the panel of a model."""
    with gr.Column():
        gr.Markdown(f"### {name}")
        animation = _video(gr)
        gr.Markdown(_PANEL)
        return animation, _video(gr)


def _video(gr: Any) -> Any:
    return gr.Video(show_label=False, interactive=False, buttons=["download"], loop=True)


def _animate(
    gr: Any, animators: Mapping[str, Animator], results: Path, limits: Limits
) -> Callable[..., list[str]]:
    """Return the function of the button."""

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
        with _errors_on_page(gr, source, driving):
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

    return animate


@contextmanager
def _errors_on_page(gr: Any, *paths: str) -> Iterator[None]:
    """Show a `UserError` on the page, without the folders of the server."""
    try:
        yield
    except UserError as error:
        text = str(error)
        for path in paths:
            text = text.replace(f"{Path(path).parent}/", "")
        raise gr.Error(text, print_exception=False) from error
