"""One video becomes clips, or is rejected with a reason."""

import io
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

from prioritycut_ray.errors import UserError
from prioritycut_ray.packing.clips import Outcome, Recipe, make_part, read_part, write_part
from prioritycut_ray.packing.entries import Entry, Span
from prioritycut_ray.packing.manifest import FrameRange
from prioritycut_ray.packing.pipeline import pack_videos
from prioritycut_ray.packing.tasks import make_part_within
from prioritycut_ray.video.boxes import Box
from prioritycut_ray.video.decoding import frames_upright
from prioritycut_ray.video.encoding import PRESETS, write_video
from prioritycut_ray.video.random_access import read_all
from tests.packing_inputs import moving_rectangle as film

ENCODE = Recipe(size=64, copy=False, max_frames=100)
COPY = Recipe(size=64, copy=True, max_frames=100)


def entry(path: Path, **changes: Any) -> Entry:
    size = path.stat().st_size
    return Entry(str(path), path.stem, path.stem, size=size)._replace(**changes)


def written(path: Path, frames: list[np.ndarray], **options: int) -> Path:
    write_video(path, frames, 25.0, **options)
    return path


def muxed(path: Path, frames: list[np.ndarray], codec: str, pixels: str = "yuv420p") -> Path:
    with av.open(str(path), "w") as file:
        stream = file.add_stream(codec, rate=25)
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt = pixels
        for number, image in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            frame.pts, frame.time_base = number, Fraction(1, 25)
            file.mux(stream.encode(frame))
        file.mux(stream.encode())
    return path


def outcome(path: Path, recipe: Recipe = ENCODE, **changes: Any) -> Outcome:
    return read_part(make_part_within(60, entry(path, **changes), recipe))[0]


# ---------------------------------------------------------------------------------------------
# Encoding
# ---------------------------------------------------------------------------------------------


def test_long_video_becomes_even_segments(tmp_path: Path) -> None:
    path = written(tmp_path / "a.mp4", film(25))
    found, clips = read_part(make_part(entry(path), ENCODE._replace(max_frames=10)))
    assert [(s.first_frame, s.frames) for s in found.segments] == [(0, 9), (9, 9), (18, 7)]
    joined = np.concatenate([read_all(clip, 64) for clip in clips]).astype(int)
    assert np.abs(joined - np.stack(film(25))).mean() < 4


def test_preset_for_random_access_has_key_frames_only(tmp_path: Path) -> None:
    original = film(17)
    path = written(tmp_path / "a.mp4", original)
    keys, errors = {}, {}
    for preset in PRESETS:
        _, [clip] = read_part(make_part(entry(path), ENCODE._replace(preset=preset)))
        with av.open(io.BytesIO(clip)) as file:
            keys[preset] = sum(packet.is_keyframe for packet in file.demux() if packet.size)
        errors[preset] = np.square(read_all(clip, 64).astype(float) - np.stack(original)).mean()
    assert keys == {"default": 3, "random-access": 17}
    assert errors["random-access"] < 1.2 * errors["default"]


def test_preset_is_known_and_not_for_copies() -> None:
    with pytest.raises(UserError, match="preset 'gop1' is unknown: choose default or random-acc"):
        pack_videos(["a.mp4"], "out", size=64, preset="gop1")
    with pytest.raises(UserError, match="--copy does not encode"):
        pack_videos(["a.mp4"], "out", size=64, copy=True, preset="random-access")


def test_video_is_split_at_a_hard_cut_and_lone_frames_left_out(tmp_path: Path) -> None:
    path = written(tmp_path / "a.mp4", film(12) + film(14, seed=5))
    found = outcome(path)
    assert [(s.first_frame, s.frames) for s in found.segments] == [(0, 12), (12, 14)]
    path = written(tmp_path / "b.mp4", film(12) + film(1, seed=5))
    found = outcome(path)
    assert [(s.first_frame, s.frames) for s in found.segments] == [(0, 12)]
    assert found.warnings == ("1 of its 13 frames stand alone between cuts and are left out",)


def test_range_of_frames_is_cut_at_its_own_cuts_and_length(tmp_path: Path) -> None:
    path = written(tmp_path / "a.mp4", film(12) + film(24, seed=5))
    frames = FrameRange(4, 34)
    found = outcome(path, ENCODE._replace(max_frames=15), frames=frames)
    assert [(s.first_frame, s.frames) for s in found.segments] == [(4, 8), (12, 15), (27, 7)]
    assert outcome(path, frames=FrameRange(30, None)).segments[0].first_frame == 30
    assert outcome(path, frames=FrameRange(30, 37)).rejected == (
        "start 30 and end 37 are outside its 36 frames"
    )
    assert "1 frame" in outcome(path, frames=FrameRange(35, None)).rejected


def test_box_is_cropped(tmp_path: Path) -> None:
    frames = film(6, 0, 96, 128)
    for frame in frames:
        frame[20:60, 70:110] = (250, 20, 20)
    path = written(tmp_path / "a.mp4", frames)
    [clip] = read_part(make_part(entry(path, box=Box(70, 20, 110, 60)), ENCODE))[1]
    assert np.abs(read_all(clip, 64).astype(int) - (250, 20, 20)).mean() < 12
    # One that is not square is cut to its centre square, never stretched.
    [clip] = read_part(make_part(entry(path, box=Box(60, 20, 120, 60)), ENCODE))[1]
    assert np.abs(read_all(clip, 64).astype(int) - (250, 20, 20)).mean() < 12
    outside = outcome(path, box=Box(100, 0, 140, 40)).rejected
    assert outside == "its box 100,0,140,40 is not inside its frames of 128x96"


def test_video_in_a_tar_is_read_by_its_byte_range(tmp_path: Path) -> None:
    data = written(tmp_path / "a.mp4", film(6)).read_bytes()
    path = tmp_path / "s.tar"
    path.write_bytes(b"x" * 777 + data + b"y" * 99)
    inside = {"span": Span(777, len(data)), "size": len(data)}
    assert outcome(path, **inside) == outcome(tmp_path / "a.mp4")
    inside = {"span": Span(777, len(data) + 500), "size": len(data) + 500}
    assert "is cut off after" in outcome(path, **inside).rejected
    assert outcome(path, span=Span(0, 0), size=0).rejected == "is empty (0 bytes)"
    assert "is not a video" in outcome(path, span=Span(0, 700), size=700).rejected


@pytest.mark.parametrize(
    ("codec", "pixels", "shape", "name"),
    [
        ("libx264", "yuv420p10le", (64, 64), "deep.mp4"),
        ("ffv1", "bgra", (64, 64), "alpha.mkv"),
        ("mjpeg", "yuvj420p", (64, 64), "motion.avi"),
        ("mpeg4", "yuv420p", (16, 2048), "wide.mp4"),
        ("libx264", "yuv420p", (1024, 16), "tall.mp4"),
        ("gif", "rgb8", (50, 70), "anim.gif"),
    ],
)
def test_unusual_videos_become_ordinary_clips(
    codec: str, pixels: str, shape: tuple[int, int], name: str, tmp_path: Path
) -> None:
    path = muxed(tmp_path / name, film(9, 0, *shape), codec, pixels)
    found, [clip] = read_part(make_part(entry(path), ENCODE))
    assert found.segments[0].frames == 9
    assert read_all(clip, 64).shape == (9, 64, 64, 3)


def test_video_cut_anywhere_is_rejected_with_a_reason(tmp_path: Path) -> None:
    for faststart in (True, False):
        whole = written(tmp_path / "a.mp4", film(30)).read_bytes()
        if not faststart:
            whole = muxed(tmp_path / "a.mp4", film(30), "libx264").read_bytes()
        cut = tmp_path / "cut.mp4"
        for length in range(0, len(whole) - 20, max(1, len(whole) // 12)):
            cut.write_bytes(whole[:length])
            reason = outcome(cut).rejected
            assert reason.startswith(("is empty", "is not a video", "is damaged", "has no "))
            # The bytes of a tar or from afar take another way in.
            assert outcome(cut, span=Span(0, length)).rejected.startswith(reason[:9])


def test_missing_file_folder_and_lone_frame_are_rejected(tmp_path: Path) -> None:
    one = written(tmp_path / "one.mp4", film(1))
    assert outcome(one).rejected.startswith("1 frame: no source/driving pair can be drawn")
    gone = Entry(str(tmp_path / "gone.mp4"), "gone", "gone")
    assert read_part(make_part_within(60, gone, ENCODE))[0].rejected == "No such file or directory"
    assert outcome(tmp_path).rejected == "Is a directory"
    remote = Entry("memory://nowhere/x.mp4", "x", "x")
    assert "No such file" in read_part(make_part_within(60, remote, ENCODE))[0].rejected


def test_disguised_playlist_opens_nothing(tmp_path: Path) -> None:
    written(tmp_path / "private.mp4", film(6))
    (tmp_path / "list.mp4").write_text("ffconcat version 1.0\nfile private.mp4\n")
    (tmp_path / "hls.mp4").write_text(
        f"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\n{tmp_path}/private.mp4\n#EXT-X-ENDLIST\n"
    )
    for name in ("list.mp4", "hls.mp4"):
        assert "is not a video" in outcome(tmp_path / name).rejected


def test_file_name_may_be_invalid_unicode(tmp_path: Path) -> None:
    path = Path(f"{tmp_path}/\udcff\n.mp4")
    shown = written(tmp_path / "a.mp4", film(6))
    path.write_bytes(shown.read_bytes())
    assert outcome(path) == outcome(shown)


# ---------------------------------------------------------------------------------------------
# Copying
# ---------------------------------------------------------------------------------------------


def test_copied_stream_shows_the_same_frames(tmp_path: Path) -> None:
    path = muxed(tmp_path / "a.mkv", film(30), "libx264")  # With B-frames.
    found, [clip] = read_part(make_part(entry(path), COPY))
    original = np.stack(list(frames_upright(path)))
    assert np.array_equal(np.stack(list(frames_upright(io.BytesIO(clip)))), original)
    assert np.array_equal(read_all(clip, 64), original)
    assert 0 < clip.index(b"moov") < clip.index(b"mdat")
    assert (found.segments[0].frames, found.warnings) == (30, ())
    assert read_part(make_part(entry(path), COPY))[1] == [clip]


def test_copied_stream_is_not_split_but_gives_warnings(tmp_path: Path) -> None:
    path = written(tmp_path / "a.mp4", film(60) + film(60, seed=5), gop=500)
    found = outcome(path, COPY)
    assert [segment.frames for segment in found.segments] == [120]
    assert "has a hard cut at frame 60" in found.warnings[0]
    assert "from one key frame to the next" in found.warnings[1] or len(found.warnings) == 1


@pytest.mark.parametrize(
    ("codec", "pixels", "shape", "reason"),
    [
        ("libx264", "yuv420p", (64, 96), "it is 96x64, not 64x64"),
        ("libx264", "yuv420p", (32, 32), "it is 32x32, not 64x64"),
        ("mpeg4", "yuv420p", (64, 64), "it is mpeg4, not h264"),
        ("libx264", "yuv444p", (64, 64), "it is yuv444p, not yuv420p"),
        ("libx264", "yuv420p10le", (64, 64), "it is yuv420p10le, not yuv420p"),
    ],
)
def test_stream_unfit_to_copy_is_rejected(
    codec: str, pixels: str, shape: tuple[int, int], reason: str, tmp_path: Path
) -> None:
    path = muxed(tmp_path / "a.mp4", film(6, 0, *shape), codec, pixels)
    assert outcome(path, COPY).rejected == f"cannot be copied: {reason}"


def test_stream_with_a_box_or_damage_is_not_copied(tmp_path: Path) -> None:
    path = written(tmp_path / "a.mp4", film(30))
    assert "selects a box" in outcome(path, COPY, box=Box(0, 0, 64, 64)).rejected
    assert "selects a range of frames" in outcome(path, COPY, frames=FrameRange(0, 5)).rejected
    path.write_bytes(path.read_bytes()[:-200])
    assert "is damaged or cut off" in outcome(path, COPY).rejected


# ---------------------------------------------------------------------------------------------
# Parts
# ---------------------------------------------------------------------------------------------


def test_damaged_part_is_never_taken_for_a_finished_one(tmp_path: Path) -> None:
    path = written(tmp_path / "a.mp4", film(8))
    part = make_part(entry(path), ENCODE)
    assert read_part(part)[0].rejected == ""
    for position in range(0, len(part), 97):
        changed = bytearray(part)
        changed[position] ^= 1
        for damaged in (part[:position], bytes(changed), part + b"x"):
            try:
                found, clips = read_part(damaged)
            except ValueError:
                continue
            # What passes has the same clips: at most a digit of the head differs.
            assert clips == read_part(part)[1]
            assert [s.sha256 for s in found.segments] == [
                s.sha256 for s in read_part(part)[0].segments
            ]


def test_rejection_survives_storage() -> None:
    rejection = Outcome(rejected="is a\nstory of “two” lines")
    assert read_part(write_part(rejection)) == (rejection, [])
