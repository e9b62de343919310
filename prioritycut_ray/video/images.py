"""Pictures, by Pillow: read whole, upright, opaque, with 8 bits a channel; and resized.

A file may contain tiles, layers, thumbnails or several pictures: its main picture is read whole, or
the file is refused. Animated pictures (GIF, WebP, APNG, AVIF) are read like videos.
"""

import io
import math
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pillow_heif
from numpy.typing import NDArray
from PIL import Image, ImageCms, UnidentifiedImageError
from PIL.Image import Transpose

from prioritycut_ray.errors import reason_of
from prioritycut_ray.video.boxes import Box
from prioritycut_ray.video.source import (
    Frame,
    Source,
    TimedFrame,
    VideoError,
    check_pixels,
    check_regular,
    name_of,
)

pillow_heif.register_heif_opener()

LARGEST = 100_000_000
"""Maximum number of pixels of a picture; a larger one is reduced."""
# Formats that Pillow only recognises, or hands to another program.
_NOT_READ = {"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"}
# Still pictures in mp4-like containers: FFmpeg would show a tile, a thumbnail or a preview.
_STILL_BRANDS = {
    *(b"heic", b"heix", b"heim", b"heis", b"mif1", b"mif2", b"miaf", b"avif", b"avis"),
    *(b"jxl ", b"jp2 ", b"jpx ", b"crx "),
}
# Seconds: browsers show frames of at most the former duration for the latter.
_TOO_SHORT, _USUAL = 0.01, 0.1
_ORIENTATION = 0x0112
_TRANSPOSED = {
    2: Transpose.FLIP_LEFT_RIGHT,
    3: Transpose.ROTATE_180,
    4: Transpose.FLIP_TOP_BOTTOM,
    5: Transpose.TRANSPOSE,
    6: Transpose.ROTATE_270,
    7: Transpose.TRANSVERSE,
    8: Transpose.ROTATE_90,
}
"""The transposition that turns a picture upright, by its Exif orientation."""
_NEW_SUBFILE_TYPE, _BITS_PER_SAMPLE, _PHOTOMETRIC, _DNG_VERSION = 254, 258, 262, 50706
_filters = threading.Lock()
"""Held while Pillow's limit and Python's warnings are changed: all threads share them."""


class _Unfit(Exception):
    """Raised when a picture cannot be used; the message says why."""


class Picture(NamedTuple):
    """An upright picture, possibly reduced.

    Attributes:
        image: RGB ``uint8 [H, W, 3]``.
        width: of the picture in the file, in pixels; more than W if ``image`` is reduced.
        height: of the picture in the file, in pixels; more than H if ``image`` is reduced.
    """

    image: Frame
    width: int
    height: int


def read_picture_file(source: Source, most_pixels: int) -> Picture | None:
    """Read the main picture of a file; None if Pillow does not know its format: it may be a video.

    Raises:
        VideoError: the picture is damaged or too large, or its white level is unknown.
    """
    with _opened(source) as image:
        if image is None:
            return None
        _choose_page(image)
        width, height = image.size
        check_pixels(source, width, height, most_pixels)
        if width * height > LARGEST:
            # A JPEG can be decoded directly at a half, a quarter or an eighth of its size.
            side = math.sqrt(LARGEST / (width * height)) / 2
            image.draft(None, (int(side * width), int(side * height)))
        with _lenient():
            image.load()
        shown = _rgb(image)
        if (factor := math.ceil(math.sqrt(shown.width * shown.height / LARGEST))) > 1:
            shown = shown.reduce(factor)
        # Loading a TIFF has turned it already.
        turn = _TRANSPOSED.get(_orientation(image))
        if turn is not None:
            shown = shown.transpose(turn)
        if turn in (
            Transpose.TRANSPOSE,
            Transpose.TRANSVERSE,
            Transpose.ROTATE_90,
            Transpose.ROTATE_270,
        ):
            width, height = height, width
        return Picture(np.array(shown), width, height)


def picture_size(source: Source) -> tuple[int, int] | None:
    """Read the width and height of a picture from its header; None if it cannot be read."""
    try:
        with _opened(source) as image:
            return None if image is None else image.size
    except VideoError:
        return None


def is_picture_file(source: Source) -> bool:
    """Return whether a file, by its first bytes, is a picture that FFmpeg must not read."""
    check_regular(source)
    head = _head(source)
    return (
        head[:4] == b"GIF8"
        or (head[:4] == b"RIFF" and head[8:12] == b"WEBP")
        or head[:8] == b"\x89PNG\r\n\x1a\n"
        or (head[4:8] == b"ftyp" and head[8:12] in _STILL_BRANDS)
    )


def picture_frames(source: Source) -> Iterator[TimedFrame]:
    """Read the frames of an animated picture, or the only one of a still picture.

    Raises:
        VideoError: it cannot be opened, or it is damaged: then all frames before the damage have
            been yielded, and the message gives their number.
    """
    number, start = 0, 0.0
    try:
        with _opened(source) as image:
            if image is None:
                raise _Unfit("is not a picture that can be read")
            pages = _animation_pages(image)
            for page in pages:
                with _lenient():
                    image.seek(page)
                    image.load()
                duration = float(image.info.get("duration") or 0) / 1000
                if len(pages) > 1 and duration <= _TOO_SHORT:
                    duration = _USUAL
                yield TimedFrame(np.array(_rgb(image)), start, duration)
                number, start = number + 1, start + duration
    except VideoError as error:
        if not number:
            raise
        reason = f"{error.reason.rstrip('.')}; {number} frames could be decoded"
        raise VideoError(error.args[0], reason) from None


def _animation_pages(image: Image.Image) -> range:
    # The default picture of an APNG may be meant for viewers without animation.
    first = int(bool(image.info.get("default_image")))
    return range(first, getattr(image, "n_frames", 1))


def on_black(image: Image.Image) -> Image.Image:
    """Composite an RGBA picture on black."""
    black = Image.new("RGBA", image.size, (0, 0, 0, 255))
    return Image.alpha_composite(black, image).convert("RGB")


# ---------------------------------------------------------------------------------------------
# Opening
# ---------------------------------------------------------------------------------------------


@contextmanager
def _opened(source: Source) -> Iterator[Image.Image | None]:
    """Open a picture; None if Pillow does not know its format. Any failure becomes a VideoError."""
    check_regular(source)
    try:
        image = _identified(source)
        if image is None:
            yield None
            return
        with image:
            yield image
    except VideoError:
        raise
    except _Unfit as error:
        raise VideoError(name_of(source), str(error)) from None
    except Exception as error:  # Each of Pillow's formats has errors of its own.
        reason = getattr(error, "strerror", None) or f"is damaged or cut off: {reason_of(error)}"
        raise VideoError(name_of(source), reason) from None


def _identified(source: Source) -> Image.Image | None:
    file: Any = source
    if not isinstance(source, str | Path):
        source.seek(0)
    try:
        with _lenient():
            return Image.open(file, formats=_formats())
    except UnidentifiedImageError:
        if is_picture_file(source):
            raise _Unfit(
                "is damaged, or a kind of picture that cannot be read; save it as PNG or JPEG"
            ) from None
        return None


@contextmanager
def _lenient() -> Iterator[None]:
    """Silence Pillow's warnings about odd metadata, and lift its limit of 179 megapixels.

    Cameras take larger pictures, which Pillow takes for attacks; TOO_LARGE is the limit here.
    """
    with _filters, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        before, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        try:
            yield
        finally:
            Image.MAX_IMAGE_PIXELS = before


def _formats() -> list[str]:
    Image.init()
    return [name for name in Image.OPEN if name not in _NOT_READ]


def _head(source: Source) -> bytes:
    """Read the first bytes; none if the file cannot be opened, which is reported later."""
    if isinstance(source, str | Path):
        try:
            with open(source, "rb") as file:
                return file.read(16)
        except OSError:
            return b""
    source.seek(0)
    return source.read(16)


def _choose_page(image: Image.Image) -> None:
    """Seek to the main picture of a TIFF, past previews; refuse files without one.

    Raises:
        _Unfit: Pillow would show something other than the main picture.
    """
    if image.format == "TIFF":
        tags = image.tag_v2  # type: ignore[attr-defined]
        page = 0
        while tags.get(_NEW_SUBFILE_TYPE, 0) & 1 or _DNG_VERSION in tags:
            page += 1
            if _DNG_VERSION in tags or page >= image.n_frames:  # type: ignore[attr-defined]
                raise _Unfit("is camera raw, of which only a preview can be read; save it as JPEG")
            image.seek(page)
    if image.format == "PSD":
        # Version info (1057): whether the layers were also saved as one picture.
        version = [data for number, _, data in image.resources if number == 1057]  # type: ignore[attr-defined]
        if version and not version[0][4]:
            raise _Unfit("has layers but no merged picture; save it as PNG")


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(_ORIENTATION, 1))
    except Exception:  # Damaged Exif: take the picture as it is, like viewers do.
        return 1


# ---------------------------------------------------------------------------------------------
# Modes
# ---------------------------------------------------------------------------------------------


def _rgb(image: Image.Image) -> Image.Image:
    """Convert a picture of any mode to opaque RGB of 8 bits a channel.

    Raises:
        _Unfit: its white level is unknown.
    """
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        return Image.fromarray(_gray(image)).convert("RGB")
    if image.mode == "La":
        image = image.convert("LA")
    image = _in_srgb(image)
    return on_black(image.convert("RGBA")) if image.has_transparency_data else image.convert("RGB")


def _gray(image: Image.Image) -> NDArray[np.uint8]:
    """Scale gray values of more than 8 bits to 0..255; a transparent value becomes black."""
    values = np.asarray(image)
    if image.mode == "F":
        white = 1.0
        if not np.isfinite(values).all():
            raise _Unfit("has pixels that are NaN or infinite")
        if values.min() < -0.1 or values.max() > 1.1:
            raise _Unfit(
                f"has float pixels from {values.min():g} to {values.max():g}, whose white level is "
                "unknown; scale them to 0..1, or save it with 8 or 16 bits"
            )
    elif image.mode == "I" and image.format not in ("PNG", "PPM"):
        raise _Unfit(
            "has 32-bit or signed gray pixels, whose white level is unknown; save it with 8 or 16 "
            "bits"
        )
    else:
        white = 2.0 ** _bits(image) - 1
    scaled = np.clip(values / np.float32(white) * 255, 0, 255).round().astype(np.uint8)
    if image.format == "TIFF" and image.tag_v2.get(_PHOTOMETRIC) == 0:  # type: ignore[attr-defined]
        scaled = 255 - scaled  # White is zero, which Pillow handles for 8 bits only.
    if isinstance(transparent := image.info.get("transparency"), int):
        scaled[values == transparent] = 0
    return scaled


def _bits(image: Image.Image) -> int:
    bits = image.tag_v2.get(_BITS_PER_SAMPLE, (16,)) if image.format == "TIFF" else (16,)  # type: ignore[attr-defined]
    return int(bits[0])


def _in_srgb(image: Image.Image) -> Image.Image:
    """Apply the embedded colour profile, like viewers do; a broken profile is ignored."""
    profile = image.info.get("icc_profile")
    if not profile or image.mode not in ("RGB", "RGBA", "CMYK"):
        return image
    mode = "RGBA" if image.mode == "RGBA" else "RGB"
    try:
        converted = ImageCms.profileToProfile(
            image,
            ImageCms.ImageCmsProfile(io.BytesIO(profile)),
            ImageCms.createProfile("sRGB"),
            outputMode=mode,
        )
    except (ImageCms.PyCMSError, OSError):
        return image
    return converted or image


def center_square(frame: Frame) -> Frame:
    """Crop the largest centred square of a frame: ``[H, W, 3]`` to ``[S, S, 3]``, a view."""
    height, width = frame.shape[:2]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    return frame[top : top + side, left : left + side]


def crop_beyond(frame: Frame, box: Box) -> Frame:
    """Crop a box that may reach beyond the frame, whose border is replicated there."""
    height, width = frame.shape[:2]
    rows = np.clip(np.arange(box.top, box.bottom), 0, height - 1)
    columns = np.clip(np.arange(box.left, box.right), 0, width - 1)
    inside = frame[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    if inside.shape[:2] == (len(rows), len(columns)):
        return inside
    return np.asarray(inside[rows - rows[0]][:, columns - columns[0]])


def resize(frame: Frame, size: int) -> Frame:
    """Scale a frame to ``[size, size, 3]`` with an antialiased Lanczos filter."""
    return scaled(frame, size, size)


def scaled(image: Frame, width: int, height: int) -> Frame:
    """Scale an image to another size with an antialiased Lanczos filter."""
    if image.shape[:2] == (height, width):
        return image
    scaled = Image.fromarray(image).resize((width, height), Image.Resampling.LANCZOS)
    return np.array(scaled)  # torch needs writable arrays
