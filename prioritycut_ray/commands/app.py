"""``prioritycut app``: serve a local web page (Gradio) that animates uploaded files."""

import os
import signal
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from prioritycut_ray.errors import UserError
from prioritycut_ray.evaluation.evaluate import short_names
from prioritycut_ray.inference.footage import Limits
from prioritycut_ray.inference.pretrained import Animator
from prioritycut_ray.inference.web_page import build_page, import_gradio

LOOPBACK = ("127.0.0.1", "localhost", "::1")
MOST_PIXELS = 4096 * 2304
"""Of a picture, or of a frame of a driving video."""


def serve(
    runs: Sequence[str],
    *,
    host: str,
    port: int | None,
    max_megabytes: int,
    max_seconds: float,
    console: Console,
) -> None:
    """Serve the page until Ctrl-C or SIGTERM.

    Uploads and results are kept in one temporary folder, which is deleted with the server. No
    other file can be read through the page.

    Args:
        runs: one or two models, see :meth:`prioritycut_ray.Animator.from_pretrained`.
        host: address to listen on.
        port: to listen on; by default the first free one from 7860.
        max_megabytes: limit of an upload.
        max_seconds: limit of a driving video.
        console: where to print the address.

    Raises:
        UserError: Gradio is not installed, a model does not exist, or the port is in use.
    """
    if len(runs) > 2:
        raise UserError(f"the page compares at most two models: give two of these {len(runs)}")
    # As Ctrl-C: raises KeyboardInterrupt, so that the temporary folder is deleted.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    names = short_names(runs)
    animators = {name: Animator.from_pretrained(run) for name, run in zip(names, runs, strict=True)}
    with tempfile.TemporaryDirectory(prefix="prioritycut-app-") as temporary:
        folder = Path(temporary)
        os.environ["GRADIO_TEMP_DIR"] = str(folder / "uploads")  # read when gradio is imported
        page = build_page(animators, folder / "results", Limits(max_seconds, MOST_PIXELS))
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
            raise UserError(
                f"cannot listen on port {port} of {host}: {error}; choose another --port"
            ) from error
        console.print(f"Page: {url} (press Ctrl-C to stop)")
        if host not in LOOPBACK:
            console.print(
                f"warning: everyone who can reach {host} can use the page, without a password"
            )
        page.block_thread()


def _theme() -> Any:
    """Use the system fonts: the default theme would load its fonts from the Internet."""
    fonts = ["system-ui", "sans-serif"]
    return import_gradio().themes.Base(font=fonts, font_mono=["monospace"])
