"""Videos and pictures are decoded completely and upright, or refused with a reason."""

import csv
import io
import shutil
import struct
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from av.stream import Disposition
from av.video.reformatter import Colorspace
from PIL import Image

from prioritycut_ray.video.decoding import frames_timed, frames_upright, probe, read_picture
from prioritycut_ray.video.encoding import write_video
from prioritycut_ray.video.images import center_square, resize
from prioritycut_ray.video.remux import copy_stream
from prioritycut_ray.video.source import VideoError
from tests.places import BAD
from tests.video_files import alike, encoded, moving_square, muxed

EXPECTED = BAD / "EXPECTED.csv"
TABLE = EXPECTED.read_text(encoding="utf-8") if EXPECTED.exists() else ""
ROWS = list(csv.DictReader(TABLE.splitlines()))
VIDEOS = [row for row in ROWS if row["kind"] == "video"]
TARS = [row["file"] for row in ROWS if row["kind"] == "shard"]


def read_until_error(source: Any) -> tuple[int, VideoError | None]:
    count = 0
    try:
        for _ in frames_upright(source):
            count += 1
    except VideoError as error:
        return count, error
    return count, None


# ---------------------------------------------------------------------------------------------
# Damage, rotation and pixel shape
# ---------------------------------------------------------------------------------------------


@pytest.mark.skipif(not VIDEOS, reason="needs ../shared/data/bad")
@pytest.mark.parametrize("row", VIDEOS, ids=[row["file"] for row in VIDEOS])
def test_awkward_file_matches_its_expectation(row: dict[str, str], tmp_path: Path) -> None:
    path = BAD / row["file"]
    if not path.exists():
        path = tmp_path / row["file"]
        shutil.copyfile(BAD / "ok_reference.mp4", path)
    frames = []
    try:
        frames += list(frames_upright(path))
        error = None
    except VideoError as caught:
        error = str(caught)
    verdict = row["verdict"]
    if verdict in ("accept", "reject-for-training", "accept-or-named-reject"):
        assert error is None
        assert len(frames) == int(row["frames"])
        shape = (int(row["shown_height"]), int(row["shown_width"]), 3)
        assert {frame.shape for frame in frames} == {shape}
        assert all(frame.dtype == np.uint8 for frame in frames)
    else:
        assert verdict in ("reject", "reject-or-partial")
        assert error is not None
        assert error.startswith(f"{path}: ")
        assert "\n" not in error


@pytest.mark.skipif(not TARS, reason="needs ../shared/data/bad")
@pytest.mark.parametrize("name", TARS)
def test_tar_given_as_a_video_is_refused(name: str) -> None:
    count, error = read_until_error(BAD / name)
    assert count == 0
    assert error is not None


@pytest.mark.parametrize(
    ("container", "codec"),
    [
        ("mp4", "libx264"),
        ("mp4", "libx265"),
        ("mp4", "mpeg4"),
        ("matroska", "libx264"),
        ("webm", "libvpx-vp9"),
        ("mpegts", "libx264"),
        ("avi", "mpeg4"),
    ],
)
def test_frames_are_the_same_if_others_are_skipped(container: str, codec: str) -> None:
    data = muxed(container, codec, moving_square(40))
    whole = [*frames_upright(io.BytesIO(data))]
    for skip in (1, 11, 12, 13, 30, 39, 40):
        rest = [*frames_upright(io.BytesIO(data), skip)]
        assert len(rest) == 40 - skip
        assert all(map(np.array_equal, rest, whole[skip:]))


@pytest.mark.skipif(not VIDEOS, reason="needs ../shared/data/bad")
@pytest.mark.parametrize("row", VIDEOS, ids=[row["file"] for row in VIDEOS])
def test_frames_of_an_awkward_file_may_be_skipped(row: dict[str, str]) -> None:
    path = BAD / row["file"]
    if row["verdict"] != "accept" or not path.exists():
        pytest.skip("is not complete")
    whole = [*frames_upright(path)]
    for skip in (len(whole) // 3, len(whole) - 1):
        assert all(map(np.array_equal, frames_upright(path, skip), whole[skip:]))


def test_skipped_frames_are_not_decoded() -> None:
    data = bytearray(encoded(moving_square(40), gop=10))
    whole = [*frames_upright(io.BytesIO(data))]
    with av.open(io.BytesIO(data)) as file:
        packets = [packet for packet in file.demux(video=0) if packet.size]
    begin, end = packets[2].pos, packets[8].pos
    data[begin:end] = b"\xff" * (end - begin)
    assert read_until_error(io.BytesIO(data))[1] is not None
    assert all(map(np.array_equal, frames_upright(io.BytesIO(data), 25), whole[25:]))


@pytest.mark.skipif(not VIDEOS, reason="needs ../shared/data/bad")
def test_gray_file_has_equal_channels_and_hdr_file_keeps_its_range() -> None:
    gray = np.stack(list(frames_upright(BAD / "gray.mp4")))
    assert (gray == gray[..., :1]).all()
    assert gray.std() > 20
    hdr = np.stack(list(frames_upright(BAD / "hdr10_10bit_hevc.mp4"))).astype(int)
    # Ten bits that wrap around in eight give noise between neighbours.
    assert np.abs(np.diff(hdr, axis=2)).mean() < 10
    assert 60 < hdr.mean() < 190


@pytest.mark.skipif(not VIDEOS, reason="needs ../shared/data/bad")
def test_probe_distinguishes_variable_from_constant_rate() -> None:
    assert probe(BAD / "vfr.mp4").variable_rate
    assert probe(BAD / "vfr.mp4").fps == pytest.approx(1200 / 61)
    assert not probe(BAD / "ok_reference.mp4").variable_rate
    assert not probe(BAD / "webm_renamed.mp4").variable_rate
    assert probe(BAD / "one_frame.mp4") == (30.0, False, 1)


def test_probe_reads_the_rate() -> None:
    assert probe(io.BytesIO(encoded(moving_square(4), 29.97))).fps == pytest.approx(29.97)


@pytest.mark.parametrize(
    ("name", "data", "reason"),
    [
        ("zero.mp4", b"", "is empty"),
        ("page.mp4", b"<!DOCTYPE html><h1>404</h1>", "is not a video"),
        ("noise.mp4", np.random.default_rng(0).bytes(9000), "is not a video"),
        (
            "list.mp4",
            b"#EXTM3U\n#EXTINF:9,\nhttp://127.0.0.1:9/x.ts\n#EXT-X-ENDLIST\n",
            "is not a vid",
        ),
    ],
)
def test_files_that_are_not_videos_are_refused_by_name(
    name: str, data: bytes, reason: str, tmp_path: Path
) -> None:
    path = tmp_path / name
    path.write_bytes(data)
    count, error = read_until_error(path)
    assert count == 0
    assert str(error).startswith(f"{path}: {reason}")


def test_missing_file_folder_and_sound_alone_are_refused(tmp_path: Path) -> None:
    assert "No such file" in str(read_until_error(tmp_path / "no.mp4")[1])
    assert "Is a directory" in str(read_until_error(tmp_path)[1])
    sound = io.BytesIO()
    with av.open(sound, "w", format="mp4") as file:
        stream = file.add_stream("aac", rate=44100, layout="mono")
        silence = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
        silence.sample_rate = 44100
        file.mux(stream.encode(silence))
        file.mux(stream.encode())
    assert "no video stream" in str(read_until_error(io.BytesIO(sound.getvalue()))[1])


@pytest.mark.parametrize("part", [0.5, 0.8, 0.99])
def test_cut_off_mp4_is_flagged_with_the_number_of_frames(part: float) -> None:
    data = encoded(moving_square(60))
    count, error = read_until_error(io.BytesIO(data[: int(part * len(data))]))
    assert 0 < count < 60
    assert error is not None
    assert f"{count} frames could be decoded" in error.reason


def test_cut_off_between_two_frames_is_flagged() -> None:
    """No frame is damaged: only the count shows it."""
    data = encoded(moving_square(60), gop=1)
    with av.open(io.BytesIO(data)) as file:
        entries = file.streams.video[0].index_entries
        cut = max(entry.pos for entry in entries if entry.timestamp < entries[40].timestamp)
        cut = next(entry.pos for entry in entries if entry.pos > cut)
    count, error = read_until_error(io.BytesIO(data[:cut]))
    assert 0 < count < 60
    assert "of 60 frames" in str(error)


def test_overwritten_mp4_is_flagged() -> None:
    data = bytearray(encoded(moving_square(60)))
    middle = len(data) // 2
    data[middle : middle + len(data) // 5] = np.random.default_rng(1).bytes(len(data) // 5)
    count, error = read_until_error(io.BytesIO(bytes(data)))
    assert count < 60
    assert "damaged" in str(error)


def test_webm_without_a_frame_count_is_complete_or_flagged() -> None:
    noise = np.random.default_rng(0).integers(0, 255, (80, 32, 32, 3), np.uint8)
    data = muxed("webm", "libvpx-vp9", list(noise))
    assert read_until_error(io.BytesIO(data)) == (80, None)
    count, error = read_until_error(io.BytesIO(data[: len(data) // 2]))
    assert 0 < count < 80
    assert "of 3.2 s" in str(error)


def test_frames_hidden_by_an_edit_list_are_not_missing() -> None:
    data = muxed("mp4", "libx264", moving_square(60), first=-20, avoid_negative_ts="disabled")
    with av.open(io.BytesIO(data)) as file:
        assert file.streams.video[0].frames == 60
    assert read_until_error(io.BytesIO(data)) == (40, None)


@pytest.mark.parametrize(
    "name", ["-dash.mp4", "ünï cödé #1 (copy).mp4", "a:b.mp4", "frame%03d.mp4", "[x]*?.mp4"]
)
def test_file_names_are_never_interpreted(name: str, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    write_video(name, moving_square(3), 25.0)
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert read_until_error(name) == (3, None)


@pytest.mark.parametrize(
    ("matrix", "shown"),
    [
        ((0, 1, -1, 0), lambda image: np.rot90(image, -1)),
        ((-1, 0, 0, -1), lambda image: np.rot90(image, 2)),
        ((0, -1, 1, 0), lambda image: np.rot90(image, 1)),
        ((-1, 0, 0, 1), np.fliplr),
        ((1, 0, 0, -1), np.flipud),
        ((0, 1, 1, 0), lambda image: image.swapaxes(0, 1)),
        ((0, -1, -1, 0), lambda image: np.rot90(image, 2).swapaxes(0, 1)),
    ],
)
def test_display_matrix_is_applied(matrix: tuple[int, ...], shown: Any) -> None:
    frames = moving_square(3, 48, 64)
    data = bytearray(encoded(frames, crf=1))
    place = data.index(b"tkhd") + 44
    a, b, c, d = (value * 0x10000 for value in matrix)
    struct.pack_into(">9i", data, place, a, b, 0, c, d, 0, 0, 0, 0x40000000)
    upright = list(frames_upright(io.BytesIO(bytes(data))))
    for frame, original in zip(upright, frames, strict=True):
        assert frame.shape == shown(original).shape
        assert alike(frame, shown(original))


def test_pixel_aspect_is_applied() -> None:
    frames = moving_square(3, 64, 32)
    shown = next(frames_upright(io.BytesIO(muxed("mp4", "libx264", frames, sar=2))))
    assert shown.shape == (64, 64, 3)
    assert alike(shown, np.repeat(frames[0], 2, axis=1))


def test_impossible_pixel_aspect_is_refused() -> None:
    data = muxed("mp4", "libx264", moving_square(3, 64, 1024), sar=50)
    assert "pixel aspect" in str(read_until_error(io.BytesIO(data))[1])


# ---------------------------------------------------------------------------------------------
# Side data, colours and transparency
# ---------------------------------------------------------------------------------------------


def camera_frames(orientation: int, container: str) -> bytes:
    """Frames as a still camera writes them: JPEG with Exif."""
    pixels = np.zeros((48, 64, 3), np.uint8)
    pixels[:24, :32] = (220, 30, 30)
    exif = Image.Exif()
    exif[0x0112], exif[0x010F] = orientation, "camera"
    picture = io.BytesIO()
    Image.fromarray(pixels).save(picture, "JPEG", exif=exif, quality=95, subsampling=0)
    target = io.BytesIO()
    with av.open(target, "w", format=container) as file:
        stream = file.add_stream("mjpeg", rate=25)
        stream.height, stream.width, stream.pix_fmt = 48, 64, "yuvj444p"
        for number in range(3):
            packet = av.Packet(picture.getvalue())
            packet.pts = packet.dts = number
            packet.time_base, packet.stream = Fraction(1, 25), stream
            file.mux(packet)
    return target.getvalue()


@pytest.mark.parametrize("container", ["avi", "mov"])
@pytest.mark.parametrize(
    ("orientation", "corner"), [(1, (0, 0)), (2, (0, -1)), (3, (-1, -1)), (5, (0, 0)), (6, (0, -1))]
)
def test_frames_with_side_data_of_any_kind_are_read_upright(
    orientation: int, corner: tuple[int, int], container: str
) -> None:
    frames = list(frames_upright(io.BytesIO(camera_frames(orientation, container))))
    assert len(frames) == 3
    assert frames[0].shape == ((48, 64, 3) if orientation < 5 else (64, 48, 3))
    assert [tuple(int(v > 150) for v in frame[corner]) for frame in frames] == [(1, 0, 0)] * 3
    opposite = tuple(-1 - place for place in corner)
    assert frames[0][opposite].max() < 20


def plain(width: int, height: int, said: int, meant: Colorspace) -> bytes:
    """One colour, encoded with one matrix, and the matrix that the stream declares."""
    pixels = np.full((height, width, 3), (200, 40, 60), np.uint8)
    target = io.BytesIO()
    with av.open(target, "w", format="mp4") as file:
        stream = file.add_stream("libx264", rate=25, options={"preset": "ultrafast"})
        stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
        stream.codec_context.colorspace = said
        for number in range(2):
            rgb = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame = rgb.reformat(format="yuv420p", dst_colorspace=meant)
            frame.colorspace = said
            frame.pts, frame.time_base = number, Fraction(1, 25)
            file.mux(stream.encode(frame))
        file.mux(stream.encode())
    return target.getvalue()


@pytest.mark.parametrize(
    ("width", "height", "said", "meant"),
    [
        (64, 64, 2, Colorspace.ITU601),
        (720, 576, 2, Colorspace.ITU601),
        (1280, 720, 2, Colorspace.ITU709),
        (720, 1280, 2, Colorspace.ITU709),
        (1280, 720, 6, Colorspace.ITU601),
        (64, 64, 1, Colorspace.ITU709),
    ],
)
def test_colour_space_is_the_declared_or_else_the_usual_one(
    width: int, height: int, said: int, meant: Colorspace
) -> None:
    data = plain(width, height, said, meant)
    colour = next(frames_upright(io.BytesIO(data)))[height // 2, width // 2]
    assert np.abs(colour.astype(int) - (200, 40, 60)).max() <= 4


def test_colours_that_cannot_be_converted_are_named() -> None:
    with pytest.raises(VideoError, match=r"colours that cannot be converted \(matrix 8\)"):
        next(frames_upright(io.BytesIO(plain(64, 64, 8, Colorspace.ITU601))))


def test_a_large_stream_without_named_colours_is_not_copied() -> None:
    with pytest.raises(VideoError, match="does not name its colour space"):
        copy_stream(io.BytesIO(plain(608, 608, 2, Colorspace.ITU709)), 608)
    assert copy_stream(io.BytesIO(plain(608, 608, 1, Colorspace.ITU709)), 608).frames == 2


@pytest.mark.parametrize(
    ("container", "codec", "pixels"),
    [
        ("mov", "png", "rgba"),
        ("mov", "qtrle", "argb"),
        ("mov", "prores_ks", "yuva444p10le"),
        ("matroska", "ffv1", "bgra"),
        ("webm", "libvpx-vp9", "yuva420p"),
    ],
)
def test_transparent_parts_of_a_video_are_black(container: str, codec: str, pixels: str) -> None:
    image = np.full((64, 64, 4), 200, np.uint8)
    image[..., 3] = np.repeat([[0], [255]], 32, axis=0)
    target = io.BytesIO()
    with av.open(target, "w", format=container) as file:
        stream = file.add_stream(codec, rate=25)
        stream.height, stream.width, stream.pix_fmt = 64, 64, pixels
        for number in range(3):
            rgba = av.VideoFrame.from_ndarray(image, format="rgba")
            frame = rgba.reformat(format=pixels)
            frame.pts, frame.time_base = number, Fraction(1, 25)
            file.mux(stream.encode(frame))
        file.mux(stream.encode())
    frames = list(frames_timed(io.BytesIO(target.getvalue())))
    assert [round(frame.start or 0, 2) for frame in frames] == [0, 0.04, 0.08]
    for frame in frames:
        assert frame.image[:30].max() <= 3
        assert np.abs(frame.image[34:].astype(int) - 200).max() <= 6


def test_cover_art_is_not_a_video(tmp_path: Path) -> None:
    cover = io.BytesIO()
    Image.new("RGB", (64, 64), (200, 0, 0)).save(cover, "JPEG")
    for name, frames in (("song.mp4", []), ("film.mp4", moving_square(3))):
        with av.open(str(tmp_path / name), "w") as file:
            picture = file.add_stream("mjpeg", rate=25)
            picture.height, picture.width, picture.pix_fmt = 64, 64, "yuvj420p"
            picture.disposition = Disposition.attached_pic
            sound = file.add_stream("aac", rate=48_000, layout="mono")
            film = file.add_stream("libx264", rate=25) if frames else None
            if film is not None:
                film.height, film.width = 64, 64
            packet = av.Packet(cover.getvalue())
            packet.pts = packet.dts = 0
            packet.time_base, packet.stream = Fraction(1, 25), picture
            file.mux(packet)
            noise = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
            noise.sample_rate, noise.pts, noise.time_base = 48_000, 0, Fraction(1, 48_000)
            file.mux(sound.encode(noise))
            file.mux(sound.encode())
            for number, image in enumerate(frames):
                frame = av.VideoFrame.from_ndarray(image, format="rgb24")
                frame.pts, frame.time_base = number, Fraction(1, 25)
                file.mux(film.encode(frame))
            if film is not None:
                file.mux(film.encode())
    with pytest.raises(VideoError, match="has no video, only cover art"):
        list(frames_upright(tmp_path / "song.mp4"))
    assert alike(next(frames_upright(tmp_path / "film.mp4")), moving_square(1)[0])


# ---------------------------------------------------------------------------------------------
# Pictures
# ---------------------------------------------------------------------------------------------


def test_picture_is_upright_and_opaque(tmp_path: Path) -> None:
    pixels = moving_square(1, 48, 64)[0]
    exif = Image.Exif()
    exif[0x0112] = 6  # Shown turned clockwise.
    Image.fromarray(pixels).save(tmp_path / "phone.png", exif=exif)
    assert np.array_equal(read_picture(tmp_path / "phone.png").image, np.rot90(pixels, -1))
    alpha = np.dstack([pixels, np.zeros((48, 64), np.uint8)])
    alpha[:10, :, 3] = 255
    Image.fromarray(alpha).save(tmp_path / "alpha.png")
    opaque = read_picture(tmp_path / "alpha.png").image
    assert np.array_equal(opaque[:10], pixels[:10])
    assert not opaque[10:].any()
    Image.fromarray(pixels[..., 0]).save(tmp_path / "gray.png")
    assert np.array_equal(
        read_picture(tmp_path / "gray.png").image, pixels[..., :1].repeat(3, axis=2)
    )


def test_first_frame_of_a_video_is_a_picture(tmp_path: Path) -> None:
    write_video(tmp_path / "clip.mp4", moving_square(3), 25.0)
    assert alike(read_picture(tmp_path / "clip.mp4").image, moving_square(1)[0])


@pytest.mark.parametrize("data", [b"", b"<html>", b"\x89PNG\r\n\x1a\n" + b"\0" * 40])
def test_files_that_are_not_pictures_are_refused(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "x.png").write_bytes(data)
    with pytest.raises(VideoError, match=r"x\.png: "):
        read_picture(tmp_path / "x.png")
    with pytest.raises(VideoError, match="No such file"):
        read_picture(tmp_path / "missing.png")


def test_cut_off_picture_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "cut.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)).save(path)
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(VideoError, match=r"cut\.png: "):
        read_picture(path)


def test_square_is_centred() -> None:
    wide = np.arange(4 * 10 * 3, dtype=np.uint8).reshape(4, 10, 3)
    assert np.array_equal(center_square(wide), wide[:, 3:7])
    assert np.array_equal(center_square(wide.swapaxes(0, 1)), wide.swapaxes(0, 1)[3:7])
    assert center_square(wide[:, :4]).shape == (4, 4, 3)


def test_resizing_averages_fine_detail() -> None:
    checks = np.indices((64, 64)).sum(0) % 2 * 255
    frame = np.repeat(checks[..., None], 3, axis=2).astype(np.uint8)
    small = resize(frame, 16).astype(int)
    assert np.abs(small - 127).max() <= 8
    assert resize(frame, 128).shape == (128, 128, 3)
    assert resize(frame, 64) is frame
