"""`prioritycut animate`: synthetic clips with sound and awkward timing, small random networks."""

import csv
import random
import re
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import av
import fsspec
import numpy as np
import pytest
import torch
from PIL import Image

from prioritycut_ray.config import load_config
from prioritycut_ray.data.puppets import render_clip
from prioritycut_ray.errors import UserError
from prioritycut_ray.inference.animate import animate, find_best_frame, to_tensor
from prioritycut_ray.inference.footage import Limits, survey
from prioritycut_ray.inference.output import gif_schedule, write_animation
from prioritycut_ray.models.animator import Animator
from prioritycut_ray.models.keypoints import pose_distance
from prioritycut_ray.networks import build_animator
from prioritycut_ray.training.checkpoint import save_checkpoint
from prioritycut_ray.training.state import new_state
from prioritycut_ray.video.boxes import Box, box_of, parse_crop
from prioritycut_ray.video.decoding import frames_timed, frames_upright, read_picture
from prioritycut_ray.video.encoding import Timing, write_video
from prioritycut_ray.video.source import VideoError
from tests.conftest import Prioritycut, Result, assert_one_line
from tests.networks import spread_keypoints
from tests.places import ALONE, FAMILIES, TINY, TINY_TPS

CPU = torch.device("cpu")
UNEVEN = [0, 40, 80, 200, 240, 500, 520, 560, 1000, 1040]
"""Times of the driving frames in milliseconds; the last frame is shown for 40."""
BEEP = 0.5
"""Time in seconds at which the sound begins; the sixth frame is shown then."""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with one checkpoint of random weights."""
    folder = tmp_path_factory.mktemp("runs") / "random"
    config = load_config(str(TINY))
    save_checkpoint(new_state(config, CPU), config, folder / "step_0000001")
    return folder


@pytest.fixture(scope="module")
def thin_plate_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same of the thin-plate family, in bfloat16 and without a discriminator."""
    folder = tmp_path_factory.mktemp("runs") / "splines"
    words = ["train.precision=bfloat16", "model.background=false", *ALONE]
    config = load_config(str(TINY_TPS), words)
    state = new_state(config, CPU)
    spread_keypoints(state.ema.module)
    save_checkpoint(state, config, folder / "step_0000001")
    return folder


@pytest.fixture(scope="module")
def driving(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A puppet at the right end of wide frames, at a variable rate, with a beep at BEEP."""
    path = tmp_path_factory.mktemp("driving") / "wide.mkv"
    write_uneven(path, codec="libopus", rate=48_000)
    return path


@pytest.fixture(scope="module")
def picture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("source") / "me.png"
    Image.fromarray(render_clip(7, size=64, frames=2).frames[0]).resize((90, 70)).save(path)
    return path


def write_uneven(path: Path, *, codec: str, rate: int, start: int = 0) -> None:
    """Write frames at the times of UNEVEN, and a sound that begins to beep at BEEP."""
    frames = render_clip(3, size=64, frames=len(UNEVEN)).frames
    with av.open(str(path), "w") as container:
        video = container.add_stream("libx264", rate=25)
        video.height, video.width, video.pix_fmt = 64, 160, "yuv420p"
        video.codec_context.time_base = Fraction(1, 1000)
        audio = container.add_stream(codec, rate=rate, layout="stereo")
        for image, time, end in zip(frames, UNEVEN, [*UNEVEN[1:], 1080], strict=True):
            wide = np.zeros((64, 160, 3), np.uint8)
            wide[:, 96:] = image
            frame = av.VideoFrame.from_ndarray(wide, format="rgb24")
            frame.pts, frame.time_base, frame.duration = time + start, Fraction(1, 1000), end - time
            container.mux(video.encode(frame))
        container.mux(video.encode())
        seconds = np.arange(round((1.08 + start / 1000) * rate)) / rate
        wave = np.sin(2 * np.pi * 440 * seconds) * (seconds > BEEP + start / 1000) * 0.5
        for first in range(0, len(wave), 1000):
            piece = np.stack([wave[first : first + 1000]] * 2).astype(np.float32)
            sound = av.AudioFrame.from_ndarray(piece, format="fltp", layout="stereo")
            sound.sample_rate, sound.pts, sound.time_base = rate, first, Fraction(1, rate)
            container.mux(audio.encode(sound))
        container.mux(audio.encode())


def beep_of(path: Path) -> float:
    """Seconds from the first frame to the beep."""
    first = next(iter(frames_timed(path))).start or 0.0
    with av.open(str(path)) as container:
        for frame in container.decode(audio=0):
            loud = np.flatnonzero(np.abs(frame.to_ndarray()).max(axis=0) > 0.1)
            if len(loud) and frame.time is not None:
                return frame.time + float(loud[0]) / frame.sample_rate - first
    raise AssertionError("no beep")


@pytest.fixture
def animated(
    prioritycut: Prioritycut, run: Path, picture: Path, driving: Path, tmp_path: Path
) -> "Animated":
    return Animated(prioritycut, run, picture, driving, tmp_path)


class Animated:
    """Runs the command with some inputs changed."""

    def __init__(
        self, prioritycut: Prioritycut, run: Path, picture: Path, driving: Path, folder: Path
    ) -> None:
        self.prioritycut, self.run, self.folder = prioritycut, run, folder
        self.inputs = {"source": picture, "driving": driving}

    def __call__(self, out: str, *words: str, **inputs: str | Path) -> Result:
        pairs = {**self.inputs, **inputs, "out": self.folder / out}
        options = [f"--{name}={path}" for name, path in pairs.items()]
        return self.prioritycut("animate", str(self.run), *options, *words)

    def left(self) -> list[str]:
        return sorted(path.name for path in self.folder.iterdir())


# ---------------------------------------------------------------------------------------------
# Outputs
# ---------------------------------------------------------------------------------------------


def test_mp4_keeps_the_timing_and_the_sound_in_sync(animated: Animated, tmp_path: Path) -> None:
    result = animated("out.mp4")
    assert result.returncode == 0, result.stderr
    frames = list(frames_timed(tmp_path / "out.mp4"))
    assert {frame.image.shape for frame in frames} == {(32, 32, 3)}
    starts = [round(1000 * ((f.start or 0) - (frames[0].start or 0)), 3) for f in frames]
    assert starts == UNEVEN
    assert frames[-1].duration == pytest.approx(0.04)
    assert beep_of(tmp_path / "out.mp4") == pytest.approx(BEEP, abs=0.03)
    assert "(variable)" in result.stdout
    assert "100%" in result.stderr
    assert "10/10 frames" in result.stderr
    assert animated.left() == ["out.mp4"]


@pytest.mark.parametrize(
    ("name", "codec", "rate", "start"),
    [
        ("a.mp4", "aac", 44_100, 0),
        ("b.mov", "pcm_s16le", 8_000, 0),
        ("c.mkv", "libopus", 48_000, 700),
    ],
)
def test_sound_of_any_codec_stays_in_sync(
    animated: Animated, tmp_path: Path, name: str, codec: str, rate: int, start: int
) -> None:
    write_uneven(tmp_path / name, codec=codec, rate=rate, start=start)
    assert beep_of(tmp_path / name) == pytest.approx(BEEP, abs=0.03)
    assert animated("out.mp4", driving=tmp_path / name).returncode == 0
    assert beep_of(tmp_path / "out.mp4") == pytest.approx(BEEP, abs=0.03)
    times = [frame.start or 0 for frame in frames_timed(tmp_path / "out.mp4")]
    assert [round(1000 * (time - times[0]), 3) for time in times] == UNEVEN


class Track(NamedTuple):
    """A sound of a driving video of one second.

    Attributes:
        codec: of the sound.
        seconds: how long it is.
        forms: rate and layout, changing at equal distances.
        start: seconds after the first picture.
        gap: seconds from and to which there is none.
    """

    codec: str = "aac"
    seconds: float = 1.0
    forms: tuple[tuple[int, str], ...] = ((48_000, "stereo"),)
    start: float = 0.0
    gap: tuple[float, float] = (0.0, 0.0)


def write_with_sound(path: Path, track: Track) -> Path:
    """Write a second of pictures, and a tone."""
    with av.open(str(path), "w") as file:
        video = file.add_stream("libx264", rate=25)
        video.height, video.width = 64, 64
        (rate, layout), *_ = track.forms
        sound = file.add_stream(track.codec, rate=rate, layout=layout)
        for number, image in enumerate(render_clip(3, size=64, frames=25).frames):
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            frame.pts, frame.time_base = number, Fraction(1, 25)
            file.mux(video.encode(frame))
        file.mux(video.encode())
        for part, (rate, layout) in enumerate(track.forms):
            encoder = av.CodecContext.create(track.codec, "w") if part else sound.codec_context
            if part:
                encoder.sample_rate, encoder.layout = rate, layout
                encoder.format, encoder.time_base = "fltp", Fraction(1, rate)
            length = track.seconds / len(track.forms)
            begin = track.start + part * length
            for first in range(0, round(length * rate), 1536):
                if track.gap[0] <= begin + first / rate < track.gap[1]:
                    continue
                wave = np.sin(2 * np.pi * 440 * np.arange(first, first + 1536) / rate) / 2
                channels = {"mono": 1, "stereo": 2, "5.1": 6}[layout]
                data = np.tile(wave.astype(np.float32), (channels, 1))
                piece = av.AudioFrame.from_ndarray(data, "fltp", layout)
                piece.sample_rate, piece.time_base = rate, Fraction(1, rate)
                piece.pts = round(begin * rate) + first
                mux_of(file, sound, encoder.encode(piece))
            mux_of(file, sound, encoder.encode(None))
    return path


def mux_of(file: Any, stream: Any, packets: list[Any]) -> None:
    for packet in packets:
        packet.stream = stream
        file.mux(packet)


def loudness(path: Path) -> tuple[float, list[bool]]:
    """Seconds of the sound, and of each twentieth whether there is any."""
    with av.open(str(path)) as file:
        seconds = float(file.streams.audio[0].duration * file.streams.audio[0].time_base)
        wave = np.concatenate([f.to_ndarray()[0] for f in file.decode(audio=0)])
    parts = np.abs(wave[: len(wave) // 2400 * 2400]).reshape(-1, 2400)
    return seconds, (parts.max(axis=1) > 0.2).tolist()


@pytest.mark.parametrize(
    ("name", "track", "silent"),
    [
        ("long.mp4", Track(seconds=30), range(0)),
        ("late.mkv", Track(seconds=3, start=0.5), range(10)),
        ("gap.mkv", Track(gap=(0.3, 0.6)), range(7, 11)),
        ("rates.ts", Track("ac3", forms=((44_100, "mono"), (48_000, "stereo"))), range(0)),
        ("layouts.ts", Track("ac3", forms=((48_000, "stereo"), (48_000, "5.1"))), range(0)),
    ],
)
def test_sound_lasts_as_long_as_the_video(
    animated: Animated, tmp_path: Path, name: str, track: Track, silent: range
) -> None:
    driving = write_with_sound(tmp_path / name, track)
    result = animated("out.mp4", driving=driving)
    assert result.returncode == 0, result.stderr
    assert "Sound:" not in result.stdout
    seconds, loud = loudness(tmp_path / "out.mp4")
    assert seconds == pytest.approx(1.0, abs=0.03)
    assert all(loud[part] == (part not in silent) for part in range(20) if part not in (6, 11))
    with av.open(str(tmp_path / "out.mp4")) as file:
        assert file.duration == pytest.approx(1_000_000, abs=30_000)


def test_damaged_pieces_of_a_sound_are_silent_and_reported(
    animated: Animated, tmp_path: Path
) -> None:
    driving = write_with_sound(tmp_path / "in.mp4", Track())
    with av.open(str(driving)) as file:
        pieces = [(packet.pos, packet.size) for packet in file.demux(audio=0) if packet.size]
    data = bytearray(driving.read_bytes())
    for place, size in pieces[10:20]:
        data[place : place + size] = random.Random(place).randbytes(size)
    driving.write_bytes(data)
    result = animated("out.mp4", driving=driving)
    assert result.returncode == 0, result.stderr
    printed = re.search(r"Sound: +(\d+) damaged pieces are silent", result.stdout)
    assert printed, result.stdout
    assert 5 <= int(printed[1]) <= 10
    seconds, loud = loudness(tmp_path / "out.mp4")
    assert seconds == pytest.approx(1.0, abs=0.03)
    assert loud[:4] == [True] * 4
    assert not all(loud[4:9])
    assert loud[10:20] == [True] * 10


def test_a_sound_that_cannot_be_decoded_is_named(animated: Animated, tmp_path: Path) -> None:
    driving = write_with_sound(tmp_path / "in.mkv", Track())
    data = driving.read_bytes()
    driving.write_bytes(data.replace(b"A_AAC", b"A_XYZ"))
    printed = animated("a.mp4", driving=driving).stdout
    assert "Sound:   left out: it cannot be decoded (unknown codec)" in printed
    driving = write_with_sound(tmp_path / "b.mp4", Track())
    with av.open(str(driving)) as file:
        pieces = [(packet.pos, packet.size) for packet in file.demux(audio=0) if packet.size]
    data = bytearray(driving.read_bytes())
    for place, size in pieces:
        data[place : place + size] = bytes([0xFF]) * size
    driving.write_bytes(data)
    printed = animated("b2.mp4", driving=driving).stdout
    assert "Sound:   left out: it cannot be decoded (aac)" in printed
    for name in ("a.mp4", "b2.mp4"):
        with av.open(str(tmp_path / name)) as file:
            assert not file.streams.audio


def test_an_animated_webp_is_a_driving_video(animated: Animated, tmp_path: Path) -> None:
    frames = [Image.fromarray(frame) for frame in render_clip(3, size=64, frames=6).frames]
    times = [100, 100, 300, 100, 100, 100]
    frames[0].save(tmp_path / "in.webp", save_all=True, append_images=frames[1:], duration=times)
    result = animated("out.mp4", driving=tmp_path / "in.webp")
    assert result.returncode == 0, result.stderr
    starts = [frame.start for frame in frames_timed(tmp_path / "out.mp4")]
    assert starts == pytest.approx([0, 0.1, 0.2, 0.5, 0.6, 0.7])


def test_gif_shows_every_frame_for_its_time(animated: Animated, tmp_path: Path) -> None:
    result = animated("out.gif")
    assert result.returncode == 0, result.stderr
    assert "only .mp4" in result.stdout
    with Image.open(tmp_path / "out.gif") as gif:
        durations = []
        for number in range(gif.n_frames):
            gif.seek(number)
            durations.append(gif.info["duration"])
    assert sum(durations) == 1080
    assert durations == list(np.diff([*UNEVEN, 1080]))


def test_a_gif_has_no_frame_shorter_than_browsers_show() -> None:
    starts = [number / 60 for number in range(60)]
    schedule = gif_schedule(Timing(starts, 1.0))
    assert sum(schedule.values()) == 100
    assert min(schedule.values()) == 2
    assert len(schedule) == 40


def test_folder_contains_frames_and_their_times(animated: Animated, tmp_path: Path) -> None:
    assert animated("frames").returncode == 0
    with (tmp_path / "frames" / "times.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [float(row["seconds"]) * 1000 for row in rows] == pytest.approx(UNEVEN)
    assert {read_picture(tmp_path / "frames" / row["file"]).image.shape for row in rows} == {
        (32, 32, 3)
    }
    assert animated.left() == ["frames"]


def test_panel_shows_source_driving_crop_and_result(animated: Animated, tmp_path: Path) -> None:
    assert animated("out", "--panel", "--crop=96,0,160,64", "--source-crop=auto").returncode == 0
    assert animated("plain", "--crop=96,0,160,64", "--source-crop=auto").returncode == 0
    panel = read_picture(tmp_path / "out" / "000003.png").image
    assert panel.shape == (32, 96, 3)
    assert (panel[:, 64:] == read_picture(tmp_path / "plain" / "000003.png").image).all()
    source = read_picture(animated.inputs["source"]).image[:, 10:80]
    small = np.asarray(Image.fromarray(source).resize((32, 32), Image.Resampling.LANCZOS))
    assert np.abs(panel[:, :32].astype(int) - small).max() <= 1
    driving = list(frames_upright(animated.inputs["driving"]))[3][:, 96:]
    small = np.asarray(Image.fromarray(driving).resize((32, 32), Image.Resampling.LANCZOS))
    assert np.abs(panel[:, 32:64].astype(int) - small).max() <= 1


# ---------------------------------------------------------------------------------------------
# Crops
# ---------------------------------------------------------------------------------------------


def test_crops_are_printed_and_auto_finds_the_motion(animated: Animated) -> None:
    printed = animated("out.mp4").stdout
    assert "me.png, crop 10,0,80,70 (70x70) -> 32x32" in printed
    found = re.search(
        r"160x64, crop (\d+),0,(\d+),64 \(64x64\) -> 32x32, 10 frames, 1.08 s", printed
    )
    assert found, printed
    # The puppet is between 96 and 160, and fills it but for a rim.
    assert 80 <= int(found[1]) <= 96


def test_boxes_and_no_crop(animated: Animated) -> None:
    printed = animated("a.mp4", "--crop=96,0,160,64", "--source-crop=none").stdout
    assert "me.png, crop 0,0,90,70 (90x70)" in printed
    assert "crop 96,0,160,64 (64x64)" in printed
    printed = animated("b.mp4", "--crop=10,0,60,20").stdout
    assert "me.png, crop 25,0,45,20 (20x20)" in printed, "the centred square of the box"


def test_an_invalid_crop_is_an_error_of_one_line(animated: Animated) -> None:
    assert_one_line(animated("a.mp4", "--source-crop=0,0,91,70"), "me.png", "0,0,91,70", "90x70")
    for text in ("face", "1,2,3", "5,5,5,9", "-1,0,5,5"):
        assert_one_line(animated("a.mp4", f"--crop={text}"), text, "LEFT,TOP,RIGHT,BOTTOM")
    assert animated.left() == []


@pytest.mark.parametrize(("width", "height"), [(300, 100), (100, 300), (100, 100)])
def test_auto_is_the_largest_square_that_fits(width: int, height: int) -> None:
    still = box_of("auto", width, height)
    left, top = (width - 100) // 2, (height - 100) // 2
    assert still == Box(left, top, left + 100, top + 100)
    motion = np.zeros((height // 10, width // 10))
    motion[0, 0] = 1.0
    assert box_of("auto", width, height, motion)[:2] == (0, 0)
    motion[:] = 0.0
    motion[-1, -1] = 1.0
    assert box_of("auto", width, height, motion)[2:] == (width, height)
    assert box_of("auto", width, height, motion * 0) == still


def test_parse_crop_reads_what_is_printed() -> None:
    assert parse_crop("96,0,160,64") == Box(96, 0, 160, 64)
    assert parse_crop("auto") == "auto"


# ---------------------------------------------------------------------------------------------
# The best frame
# ---------------------------------------------------------------------------------------------


either_family = pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)


def built(family: Path) -> Animator:
    animator = build_animator(load_config(str(family)).model).eval()
    spread_keypoints(animator)
    return animator


@either_family
def test_the_best_frame_is_the_one_whose_pose_is_nearest(family: Path) -> None:
    animator = built(family)
    frames = render_clip(5, size=32, frames=40).frames
    still = to_tensor(frames[29:30], CPU)
    assert find_best_frame(animator, still, frames) == 29


def test_the_pose_distance_ignores_position_and_size() -> None:
    torch.manual_seed(0)
    pose = torch.rand(1, 5, 2)
    moved = torch.cat([pose * 0.3 + 0.4, pose.flip(1), torch.zeros(1, 5, 2)])
    near, far, nothing = pose_distance(pose, moved).tolist()
    assert near == pytest.approx(0, abs=1e-9)
    assert far > 0.1
    assert nothing == float("inf"), "a frame whose keypoints span no area is never the best"
    with pytest.raises(UserError, match="source frame lie on one line"):
        pose_distance(torch.zeros(1, 5, 2), pose)


@either_family
def test_animating_outward_from_the_best_frame_equals_animating_in_order(family: Path) -> None:
    animator = built(family)
    frames = list(render_clip(5, size=32, frames=20).frames)
    still, best = to_tensor(render_clip(6, size=32, frames=1).frames, CPU), 7

    def moved(order: list[np.ndarray]) -> torch.Tensor:
        parts = animate(
            animator, still, order, relative=True, adapt_scale=False, initial=frames[best]
        )
        return torch.cat([part.animation.prediction for part in parts])

    outward = torch.cat([moved(frames[best::-1]).flip(0), moved(frames[best:])[1:]])
    torch.testing.assert_close(outward, moved(frames), atol=1e-5, rtol=0)


def test_a_thin_plate_run_animates_with_every_option(
    animated: Animated, thin_plate_run: Path, tmp_path: Path
) -> None:
    animated.run = thin_plate_run
    options = {
        "relative": [],
        "absolute": ["--no-relative"],
        "scaled": ["--adapt-scale"],
        "best": ["--best-frame", "--panel"],
        "smooth": ["--smooth"],
    }
    pictures = {}
    for name, words in options.items():
        result = animated(name, *words)
        assert result.returncode == 0, result.stderr
        assert len(list((tmp_path / name).glob("*.png"))) == len(UNEVEN)
        pictures[name] = read_picture(tmp_path / name / "000004.png").image
    assert pictures["best"].shape == (32, 96, 3)
    plain = pictures["relative"]
    assert plain.shape == (32, 32, 3)
    for name in ("absolute", "scaled", "smooth"):
        assert (pictures[name] != plain).any(), name
    assert (pictures["best"][:, 64:] != plain).any()


def test_best_frame_changes_the_result(animated: Animated, tmp_path: Path) -> None:
    assert animated("first").returncode == 0
    assert animated("best", "--best-frame", "--adapt-scale").returncode == 0
    first, best = (read_picture(tmp_path / name / "000004.png").image for name in ("first", "best"))
    assert (first != best).any()


# ---------------------------------------------------------------------------------------------
# Errors
# ---------------------------------------------------------------------------------------------


def test_bad_inputs_are_errors_of_one_line_and_leave_nothing_behind(
    animated: Animated, tmp_path: Path
) -> None:
    bad = tmp_path / "inputs"
    bad.mkdir()
    frames = list(render_clip(1, size=32, frames=30).frames)
    write_video(bad / "one.mp4", frames[:1], 25)
    write_video(bad / "whole.mp4", frames, 25)
    data = (bad / "whole.mp4").read_bytes()
    (bad / "cut.mp4").write_bytes(data[: len(data) * 2 // 3])
    (bad / "page.png").write_bytes(b"<html>not found</html>")
    with av.open(str(bad / "sound.wav"), "w") as container:
        audio = container.add_stream("pcm_s16le", rate=8000, layout="mono")
        piece = av.AudioFrame.from_ndarray(
            np.zeros((1, 800), np.int16), format="s16", layout="mono"
        )
        piece.sample_rate = 8000
        container.mux(audio.encode(piece))
    for option, name, reason in (
        ("driving", "one.mp4", "only one frame"),
        ("driving", "cut.mp4", "damaged or cut off"),
        ("driving", "sound.wav", "sound.wav"),
        ("driving", "missing.mp4", "No such file"),
        ("source", "page.png", "is not a video"),
        ("source", "missing.png", "No such file"),
    ):
        for out in ("out.mp4", "out.gif", "out"):
            assert_one_line(animated(out, **{option: bad / name}), name, reason)
    assert animated.left() == ["inputs"]


def test_sources_and_driving_videos_come_from_any_storage(
    animated: Animated, picture: Path, driving: Path, tmp_path: Path
) -> None:
    remote = fsspec.filesystem("memory")
    remote.pipe_file("/inputs/me.png", picture.read_bytes())
    remote.pipe_file("/inputs/him.mp4", driving.read_bytes())
    remote.pipe_file("/inputs/page.png", b"<html>not found</html>")
    assert animated("local.mp4").returncode == 0
    places = {"source": "memory://inputs/me.png", "driving": "memory://inputs/him.mp4"}
    result = animated("remote.mp4", **places)
    assert result.returncode == 0, result.stderr
    assert "me.png" in result.stdout
    assert (tmp_path / "remote.mp4").read_bytes() == (tmp_path / "local.mp4").read_bytes()
    for name, reason in (("page.png", "page.png: "), ("none.png", "there is no such file")):
        url = f"memory://inputs/{name}"
        assert_one_line(animated("x.mp4", source=url), url, reason)


def test_an_output_must_be_on_this_machine(
    animated: Animated, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    words = [f"--{name}={path}" for name, path in animated.inputs.items()]
    result = animated.prioritycut("animate", str(animated.run), *words, "--out=s3://bucket/x.mp4")
    assert_one_line(result, "s3://bucket/x.mp4", "a path on this machine")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    result = animated.prioritycut("animate", str(animated.run), *words, "--out=~/x.mp4")
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "home" / "x.mp4").exists()
    assert animated.left() == ["home"]


def test_an_output_in_use_is_refused_before_any_work(animated: Animated, tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("keep")
    (tmp_path / "file").write_text("keep")
    (tmp_path / "folder.mp4").mkdir()
    for out, reason in (
        ("full", "in use"),
        ("file", "in use"),
        ("folder.mp4", "is a folder"),
        ("out.avi", ".gif"),
        ("file/out.mp4", "is a file"),
    ):
        assert_one_line(animated(out), out, reason)
    source = tmp_path / "source.gif"
    Image.fromarray(np.zeros((40, 40, 3), np.uint8)).save(source)
    assert_one_line(animated("source.gif", source=source), "is also an input")
    assert (tmp_path / "full" / "mine.txt").read_text() == "keep"


@pytest.mark.parametrize("option", ["--adapt-scale", "--best-frame"])
def test_options_that_require_relative_motion_are_refused_without_it(
    animated: Animated, option: str
) -> None:
    assert_one_line(animated("a.mp4", option, "--no-relative"), option)


def test_an_interrupt_leaves_nothing_behind(tmp_path: Path) -> None:
    def interrupted() -> Iterator[np.ndarray]:
        yield from render_clip(1, size=32, frames=3).frames
        raise KeyboardInterrupt

    for out in ("out.mp4", "out.gif", "out"):
        with pytest.raises(KeyboardInterrupt):
            write_animation(tmp_path / out, interrupted(), Timing([0, 1, 2, 3], 4), 1.0, None)
    assert list(tmp_path.iterdir()) == []


def test_a_video_beyond_the_limits_is_not_read_to_its_end(driving: Path) -> None:
    with pytest.raises(VideoError, match=r"longer than 0\.3 s"):
        survey(driving, Limits(seconds=0.3, pixels=10**6))
    with pytest.raises(VideoError, match=r"160x64, more than 0\.01 megapixels"):
        survey(driving, Limits(seconds=9.0, pixels=10**4))


def test_survey_finds_the_times_of_a_variable_rate(driving: Path) -> None:
    starts = survey(driving).timing.starts
    assert [round(1000 * start) for start in starts] == UNEVEN
