"""Pictures are read completely and in the right colours, from any container, or are refused."""

import io
import os
import random
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pillow_heif
import pytest
from PIL import Image, ImageCms
from PIL.TiffImagePlugin import ImageFileDirectory_v2

from prioritycut_ray.inference.footage import cut_picture, survey
from prioritycut_ray.video import images as pictures
from prioritycut_ray.video.boxes import Box
from prioritycut_ray.video.decoding import (
    frames_timed,
    frames_upright,
    probe,
    read_picture,
)
from prioritycut_ray.video.sound import survey_sound
from prioritycut_ray.video.source import VideoError

RAMP = np.linspace(0, 65535, 64 * 48).reshape(48, 64)
"""Black at the top left, white at the bottom right, in 16 bits."""


def quarters(width: int = 64, height: int = 48) -> Image.Image:
    """Four quarters of four colours: cropping, rotating or mirroring changes the picture."""
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[: height // 2, : width // 2] = (200, 30, 30)
    pixels[: height // 2, width // 2 :] = (30, 200, 30)
    pixels[height // 2 :, : width // 2] = (30, 30, 200)
    pixels[height // 2 :, width // 2 :] = (200, 200, 200)
    return Image.fromarray(pixels)


def assert_alike(found: np.ndarray, expected: Image.Image | np.ndarray, most: float = 6) -> None:
    expected = np.asarray(expected)
    assert found.shape == expected.shape
    assert np.abs(found.astype(int) - expected).mean() < most


# ---------------------------------------------------------------------------------------------
# Containers
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"tile_size": 256}], ids=["one", "tiles"])
def test_heic_is_read_completely(options: dict[str, int], tmp_path: Path) -> None:
    whole = quarters(512, 768)
    whole.save(tmp_path / "a.heic", quality=90, **options)
    assert_alike(read_picture(tmp_path / "a.heic").image, whole)
    # It is not by its name that a picture is known.
    (tmp_path / "a.heic").rename(tmp_path / "a.mp4")
    assert_alike(read_picture(tmp_path / "a.mp4").image, whole)
    with pytest.raises(VideoError, match="only one frame"):
        survey(tmp_path / "a.mp4")


def test_the_primary_picture_of_several_is_read(tmp_path: Path) -> None:
    several = pillow_heif.HeifFile()
    several.add_from_pillow(quarters(64, 96).convert("L").convert("RGB"))
    several.add_from_pillow(quarters(128, 64))
    several.save(tmp_path / "a.heic", primary_index=1, quality=90)
    assert_alike(read_picture(tmp_path / "a.heic").image, quarters(128, 64))


@pytest.mark.parametrize("kind", ["jpg", "png", "webp", "tif", "heic", "avif"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation_is_upright(kind: str, orientation: int, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"a.{kind}"
    # HEIC and AVIF say it by a property of their own, which these encoders make of the Exif.
    quarters().save(path, exif=exif if kind == "tif" else exif.tobytes(), quality=90)
    turn = pictures._TRANSPOSED.get(orientation)
    upright = quarters() if turn is None else quarters().transpose(turn)
    assert_alike(read_picture(path).image, upright)
    picture = read_picture(path)
    assert (picture.width, picture.height) == upright.size


def test_a_picture_with_damaged_exif_is_read(tmp_path: Path) -> None:
    quarters().save(tmp_path / "a.jpg", exif=b"Exif\0\0MM\0*\xff\xff\xff\xff\0\1", quality=95)
    assert_alike(read_picture(tmp_path / "a.jpg").image, quarters())


def test_previews_of_a_tiff_are_skipped(tmp_path: Path) -> None:
    preview = ImageFileDirectory_v2()
    preview[254] = 1
    small, whole = quarters(16, 12), quarters()
    small.save(tmp_path / "a.tif", tiffinfo=preview, save_all=True, append_images=[])
    with pytest.raises(VideoError, match="is camera raw"):
        read_picture(tmp_path / "a.tif")
    preview[50706] = b"\1\4\0\0"
    small.save(tmp_path / "a.dng", "TIFF", tiffinfo=preview)
    with pytest.raises(VideoError, match="is camera raw"):
        read_picture(tmp_path / "a.dng")
    small.encoderinfo = {"tiffinfo": {254: 1}}
    whole.encoderinfo = {"tiffinfo": {254: 0}}
    small.save(tmp_path / "b.tif", save_all=True, append_images=[whole])
    assert_alike(read_picture(tmp_path / "b.tif").image, whole)


@pytest.mark.parametrize("whole", [False, True])
def test_layers_are_read_only_if_merged(whole: bool, tmp_path: Path) -> None:
    head = struct.pack(">4sH6xHIIHH", b"8BPS", 1, 3, 48, 64, 8, 3)
    version = struct.pack(">I?", 1, whole) + bytes(9)
    resource = struct.pack(">4sHHI", b"8BIM", 1057, 0, len(version)) + version
    planes = np.asarray(quarters()).transpose(2, 0, 1).tobytes()
    parts = [head, bytes(4), struct.pack(">I", len(resource)), resource, bytes(4), bytes(2), planes]
    (tmp_path / "a.psd").write_bytes(b"".join(parts))
    if whole:
        assert_alike(read_picture(tmp_path / "a.psd").image, quarters())
    else:
        with pytest.raises(VideoError, match="has layers but no merged picture"):
            read_picture(tmp_path / "a.psd")


@pytest.mark.parametrize("brand", [b"heic", b"mif1", b"avif", b"jxl ", b"crx "])
def test_an_unreadable_still_picture_is_not_taken_for_a_video(brand: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.mov").write_bytes(b"\0\0\0\x18ftyp" + brand + bytes(200))
    for read in (read_picture, probe, lambda path: list(frames_upright(path))):
        with pytest.raises(VideoError, match=r"a\.mov: \S"):
            read(tmp_path / "a.mov")


def test_error_about_an_unknown_kind_of_picture_gives_a_way_out(tmp_path: Path) -> None:
    (tmp_path / "a.jxl").write_bytes(b"\xff\x0a" + bytes(200))
    with pytest.raises(VideoError, match=r"a\.jxl: is not a video.*; if it is a picture, save it"):
        read_picture(tmp_path / "a.jxl")


def test_pipes_and_devices_are_not_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    for path in (tmp_path / "pipe.png", Path("/dev/zero")):
        for read in (read_picture, probe, survey_sound, lambda path: list(frames_upright(path))):
            with pytest.raises(VideoError, match="is not a regular file"):
                read(path)


# ---------------------------------------------------------------------------------------------
# Modes
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["png", "tif", "jp2", "pgm", "im"])
def test_gray_of_16_bits_is_scaled(kind: str, tmp_path: Path) -> None:
    path = tmp_path / f"a.{kind}"
    Image.fromarray(RAMP.astype(np.uint16)).save(path)
    expected = np.repeat((RAMP / 257)[..., None], 3, axis=2)
    assert_alike(read_picture(path).image, expected, 0.6)


def test_gray_of_other_depths_is_scaled(tmp_path: Path) -> None:
    expected = np.repeat((RAMP / 257)[..., None], 3, axis=2)
    Image.fromarray((RAMP / 65535).astype(np.float32)).save(tmp_path / "float.tif")
    assert_alike(read_picture(tmp_path / "float.tif").image, expected, 0.6)
    inverted = {262: 0}
    Image.fromarray(RAMP.astype(np.uint16)).save(tmp_path / "white0.tif", tiffinfo=inverted)
    assert_alike(read_picture(tmp_path / "white0.tif").image, 255 - expected, 0.6)
    # Two pixels of 12 bits are three bytes.
    twelve = (RAMP / 16.0).astype(np.uint16).reshape(-1, 2)
    packed = np.stack(
        [twelve[:, 0] >> 4, (twelve[:, 0] & 15) << 4 | twelve[:, 1] >> 8, twelve[:, 1] & 255], 1
    )
    write_tiff(tmp_path / "12.tif", packed.astype(np.uint8).tobytes(), bits=12)
    assert_alike(read_picture(tmp_path / "12.tif").image, expected, 0.6)


def write_tiff(path: Path, data: bytes, bits: int) -> None:
    """Write 64x48 gray pixels in formats that Pillow does not write."""
    tags = {256: 64, 257: 48, 258: bits, 259: 1, 262: 1, 273: 0, 277: 1, 278: 48, 279: len(data)}
    head = 8 + 2 + 12 * len(tags) + 4
    tags[273] = head
    entries = b"".join(
        tag.to_bytes(2, "little") + b"\4\0\1\0\0\0" + value.to_bytes(4, "little")
        for tag, value in tags.items()
    )
    count = len(tags).to_bytes(2, "little")
    path.write_bytes(b"II*\0\x08\0\0\0" + count + entries + bytes(4) + data)


@pytest.mark.parametrize(
    ("pixels", "reason"),
    [
        (RAMP.astype(np.int32), "32-bit or signed"),
        (RAMP.astype(np.float32), "float pixels from 0 to 65535"),
        (np.full((48, 64), np.nan, np.float32), "NaN or infinite"),
    ],
)
def test_values_without_a_known_white_level_are_refused(
    pixels: np.ndarray, reason: str, tmp_path: Path
) -> None:
    Image.fromarray(pixels).save(tmp_path / "a.tif")
    with pytest.raises(VideoError, match=rf"a\.tif: .*{reason}"):
        read_picture(tmp_path / "a.tif")


@pytest.mark.parametrize(
    ("mode", "kind"),
    [
        *(("1", kind) for kind in ("png", "tif", "bmp")),
        *(("L", kind) for kind in ("png", "jpg", "webp", "tif", "avif")),
        *(("P", kind) for kind in ("png", "gif", "tif", "bmp", "pcx")),
        *(("RGB", kind) for kind in ("png", "jpg", "webp", "tif", "jp2", "avif", "ico", "ppm")),
        *(("CMYK", kind) for kind in ("jpg", "tif")),
        ("YCbCr", "jpg"),
        ("LAB", "tif"),
        ("RGBX", "tif"),
        *(("RGBA", kind) for kind in ("png", "webp", "tif", "avif", "heic", "jp2", "tga")),
        *(("LA", kind) for kind in ("png", "tif", "jp2")),
    ],
)
def test_every_mode_keeps_its_colours(mode: str, kind: str, tmp_path: Path) -> None:
    path = tmp_path / f"a.{kind}"
    if mode == "LAB":
        srgb, lab = (ImageCms.createProfile(name) for name in ("sRGB", "LAB"))
        converted = ImageCms.profileToProfile(quarters(), srgb, lab, outputMode="LAB")
        assert converted is not None
        expected = quarters()
    else:
        converted = quarters().convert(mode)
        expected = converted.convert("RGB")
    sizes: dict[str, Any] = {"sizes": [(64, 48)]} if kind == "ico" else {}
    converted.save(path, quality=95, **sizes)
    assert_alike(read_picture(path).image, expected)


def test_embedded_profiles_are_respected(tmp_path: Path) -> None:
    # A profile that says that red is green shows that it was read.
    profile = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    profile[:] = (
        profile.replace(b"rXYZ", b"tXYZ").replace(b"gXYZ", b"rXYZ").replace(b"tXYZ", b"gXYZ")
    )
    quarters().save(tmp_path / "a.png", icc_profile=bytes(profile))
    swapped = np.asarray(quarters())[..., [1, 0, 2]]
    assert_alike(read_picture(tmp_path / "a.png").image, swapped)
    quarters().save(tmp_path / "broken.png", icc_profile=b"no profile")
    assert_alike(read_picture(tmp_path / "broken.png").image, quarters())


@pytest.mark.parametrize("kind", ["png", "gif", "webp", "tif", "avif", "heic"])
def test_transparent_parts_are_black_in_source_and_driving(kind: str, tmp_path: Path) -> None:
    pixels = np.dstack([np.asarray(quarters()), np.zeros((48, 64), np.uint8)])
    pixels[:24, :, 3] = 255
    Image.fromarray(pixels).save(tmp_path / f"a.{kind}", quality=95)
    expected = np.asarray(quarters()).copy()
    expected[24:] = 0
    assert_alike(read_picture(tmp_path / f"a.{kind}").image, expected)
    if kind != "tif":  # Which is not a video.
        assert_alike(next(frames_upright(tmp_path / f"a.{kind}")), expected)


def test_a_transparent_colour_is_black(tmp_path: Path) -> None:
    for mode, transparency, pixel in (
        ("L", 200, 200),
        ("I;16", 51400, 51400),
        ("RGB", (9, 8, 7), (9, 8, 7)),
    ):
        image = Image.new(mode, (8, 8), 0)
        image.paste(pixel, (0, 0, 4, 8))
        image.save(tmp_path / "a.png", transparency=transparency)
        assert not read_picture(tmp_path / "a.png").image.any(), mode


# ---------------------------------------------------------------------------------------------
# Size and damage
# ---------------------------------------------------------------------------------------------


def test_a_photo_of_200_megapixels_is_read_reduced(tmp_path: Path) -> None:
    large = Image.new("L", (16320, 12240))
    large.paste(200, (8160, 0, 16320, 12240))
    large.save(tmp_path / "large.jpg")
    picture = read_picture(tmp_path / "large.jpg")
    assert (picture.width, picture.height) == (16320, 12240)
    assert picture.image.shape == (6120, 8160, 3)
    # A crop is given in pixels of the whole picture.
    assert cut_picture(picture, Box(8160, 0, 12000, 3840), 32).min() > 190
    assert cut_picture(picture, Box(4160, 0, 8000, 3840), 32).max() < 10


def test_a_picture_larger_than_any_camera_takes_is_refused(tmp_path: Path) -> None:
    quarters().save(tmp_path / "bomb.png")
    data = bytearray((tmp_path / "bomb.png").read_bytes())
    data[16:24] = struct.pack(">II", 30_000, 30_000)
    data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    (tmp_path / "bomb.png").write_bytes(data)
    with pytest.raises(VideoError, match=r"30000x30000 pixels, more than 400\.0 megapixels"):
        read_picture(tmp_path / "bomb.png")
    quarters().save(tmp_path / "a.png")
    with pytest.raises(VideoError, match="64x48 pixels, more than"):
        read_picture(tmp_path / "a.png", 64 * 48 - 1)


@pytest.mark.parametrize("kind", ["png", "jpg", "gif", "webp", "tif", "jp2", "avif", "heic", "ico"])
def test_damage_is_reported_in_one_line(kind: str, tmp_path: Path) -> None:
    path = tmp_path / f"a.{kind}"
    noise = np.random.default_rng(0).integers(0, 255, (48, 64, 3), np.uint8)
    options = {"compression": "tiff_lzw"} if kind == "tif" else {}
    Image.fromarray(noise).save(path, **options)
    whole = path.read_bytes()
    chance = random.Random(0)
    messages: list[str] = []
    for number in range(40):
        data = bytearray(whole)
        place = chance.randrange(len(data))
        if number % 2:
            data[place : place + 8] = chance.randbytes(8)
        path.write_bytes(data if number % 2 else data[:place])
        for read in (read_picture, lambda path: list(frames_timed(path)), probe):
            try:
                read(path)
            except VideoError as error:
                messages.append(str(error))
    assert len(messages) >= 15
    assert all(line.startswith(f"{path}: ") and "\n" not in line for line in messages)


# ---------------------------------------------------------------------------------------------
# Animated pictures
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["webp", "png", "avif", "gif"])
def test_an_animated_picture_is_a_video(kind: str, tmp_path: Path) -> None:
    path = tmp_path / f"a.{kind}"
    frames = [Image.new("RGB", (64, 48), (40 * n, 40 * n, 40 * n)) for n in range(5)]
    times = [100, 100, 200, 100, 100]
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=times, quality=95)
    shown = list(frames_timed(path))
    assert [round(frame.image.mean() / 40) for frame in shown] == [0, 1, 2, 3, 4]
    assert [round(frame.start or 0, 2) for frame in shown] == [0, 0.1, 0.2, 0.4, 0.5]
    assert [round(frame.duration, 2) for frame in shown] == [0.1, 0.1, 0.2, 0.1, 0.1]
    info = probe(path)
    assert (info.packets, info.variable_rate) == (5, True)
    assert info.fps == pytest.approx(5 / 0.6, rel=0.01)
    assert survey_sound(path) is None
    footage = survey(path)
    assert footage.timing.end == pytest.approx(0.6)
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 3 // 4])
    with pytest.raises(VideoError, match=rf"a\.{kind}: is damaged"):
        list(frames_timed(path))


@pytest.mark.parametrize("kind", ["gif", "webp", "png"])
def test_frames_without_a_duration_get_that_of_browsers(kind: str, tmp_path: Path) -> None:
    frames = [Image.new("L", (64, 48), 40 * n) for n in range(3)]
    path = tmp_path / f"a.{kind}"
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=[0, 10, 20])
    starts = [frame.start for frame in frames_timed(path)]
    assert starts == pytest.approx([0, 0.1, 0.2])
    assert probe(path).fps == pytest.approx(3 / 0.22)


def test_the_default_picture_of_an_animation_is_not_a_frame(tmp_path: Path) -> None:
    frames = [Image.new("L", (64, 48), 50 * n) for n in range(4)]
    frames[0].save(
        tmp_path / "a.png", save_all=True, append_images=frames[1:], default_image=True, duration=40
    )
    means = [round(frame.mean()) for frame in frames_upright(tmp_path / "a.png")]
    assert means == [50, 100, 150]
    assert read_picture(tmp_path / "a.png").image.mean() == 0


def test_bytes_are_read_like_files(tmp_path: Path) -> None:
    quarters().save(tmp_path / "a.webp", lossless=True)
    data = io.BytesIO((tmp_path / "a.webp").read_bytes())
    assert_alike(next(frames_upright(data)), quarters())
