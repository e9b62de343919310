"""Write an animation as a file or a folder that appears under its name only when complete."""

import csv
import io
import os
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from PIL import Image

from prioritycut_ray.errors import UserError
from prioritycut_ray.storage.atomic import write_atomically
from prioritycut_ray.video.encoding import Timing, write_video
from prioritycut_ray.video.sound import Sound
from prioritycut_ray.video.source import Frame

TIMES_NAME = "times.csv"
_GIF_UNIT = 0.01
_GIF_SHORTEST = 2
"""Shortest duration of a GIF frame in units: browsers slow shorter ones down."""


def check_output(out: Path, inputs: Iterable[Path]) -> None:
    """Check that an output can be written, before any work is done for it.

    Args:
        out: a name that ends in .mp4 or .gif, or a folder for PNG frames.
        inputs: files that must not be overwritten.

    Raises:
        UserError: the format is unknown, or the output is in use or one of the inputs.
    """
    kind = out.suffix.lower()
    if kind not in (".mp4", ".gif", ""):
        raise UserError(
            f"{out}: cannot write {kind}; choose .mp4, .gif, or a folder for PNG frames (a name "
            "without an extension)"
        )
    if any(out.exists() and path.exists() and out.samefile(path) for path in inputs):
        raise UserError(f"{out}: is also an input; choose another --out")
    if kind and out.is_dir():
        raise UserError(f"{out}: is a folder; choose another --out")
    if not kind:
        check_new_folder(out)
    taken = next((p for p in out.parents if p.exists() and not p.is_dir()), None)
    if taken is not None:
        raise UserError(f"{out}: {taken} is a file; choose another --out")


def write_animation(
    out: Path, frames: Iterable[Frame], timing: Timing, fps: float, sound: Sound | None
) -> None:
    """Write frames as mp4, GIF or a folder of PNG files, depending on the name of the output.

    Args:
        out: see :func:`check_output`.
        frames: ``uint8 [H, W, 3]``, as many as the timing has.
        timing: of the frames.
        fps: mean frame rate.
        sound: written to mp4 only.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    kind = out.suffix.lower()
    if kind == ".mp4":
        write_video(out, frames, fps, timing=timing, sound=sound)
    elif kind == ".gif":
        _write_gif(out, frames, timing)
    else:
        _write_folder(out, frames, timing)


def _write_gif(out: Path, frames: Iterable[Frame], timing: Timing) -> None:
    schedule = gif_schedule(timing)
    pictures = [
        Image.fromarray(frame).quantize(256)
        for number, frame in enumerate(frames)
        if number in schedule
    ]
    encoded = io.BytesIO()
    pictures[0].save(
        encoded,
        format="GIF",
        save_all=True,
        append_images=pictures[1:],
        duration=[round(1000 * _GIF_UNIT) * units for units in schedule.values()],
        loop=0,
    )
    write_atomically(out, encoded.getbuffer())


def gif_schedule(timing: Timing) -> dict[int, int]:
    """Return the frames that a GIF shows, each with its duration in hundredths of a second.

    Start times are rounded, not durations, so that errors do not add up. Frames less than 0.02 s
    after the previous one are left out.
    """
    shown: list[int] = []
    ticks = [round(start / _GIF_UNIT) for start in timing.starts]
    for number, tick in enumerate(ticks):
        if not shown or tick - ticks[shown[-1]] >= _GIF_SHORTEST:
            shown.append(number)
    ends = [*(ticks[number] for number in shown[1:]), round(timing.end / _GIF_UNIT)]
    return {
        number: max(_GIF_SHORTEST, end - ticks[number])
        for number, end in zip(shown, ends, strict=True)
    }


def _write_folder(out: Path, frames: Iterable[Frame], timing: Timing) -> None:
    """Write numbered PNG files, and a table of the time at which each is shown."""
    with new_folder(out) as folder, (folder / TIMES_NAME).open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["file", "seconds"])
        for number, frame in enumerate(frames):
            name = f"{number:06d}.png"
            Image.fromarray(frame).save(folder / name)
            table.writerow([name, f"{timing.starts[number]:.6f}"])


def check_new_folder(out: Path) -> None:
    """Check that a folder does not exist or is empty.

    Raises:
        UserError: it is not empty, or it is a file.
    """
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise UserError(f"{out}: is in use; choose another --out, or remove it")


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """Yield a temporary folder that is renamed to ``out`` if the body succeeds."""
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as temporary:
        folder = Path(temporary, out.name)
        folder.mkdir()
        yield folder
        os.replace(folder, out)  # also replaces an empty folder
