"""Chosen frames of a packed clip are exact, with each decoder."""

import io
import os
import subprocess
import sys
from typing import Any

import numpy as np
import pytest

from prioritycut_ray.data.puppets import render_clip
from prioritycut_ray.errors import UserError
from prioritycut_ray.video.decoding import frames_upright
from prioritycut_ray.video.images import resize
from prioritycut_ray.video.random_access import read_all, read_frames
from prioritycut_ray.video.remux import copy_stream
from prioritycut_ray.video.source import VideoError
from tests.video_files import alike, encoded, moving_square, muxed


@pytest.mark.parametrize("gop", [1, 12, 250])
def test_frames_are_found_exactly(gop: int, decoder: str) -> None:
    frames = moving_square(40)
    data = encoded(frames, gop=gop)
    whole = read_all(data, 64, decoder)
    assert whole.shape == (40, 64, 64, 3)
    chosen = [39, 0, 13, 12, 13, 27]
    assert np.array_equal(read_frames(data, chosen, 64, decoder), whole[chosen])
    error = np.abs(whole.astype(int)[:, None] - np.stack(frames).astype(int)).mean((2, 3, 4))
    assert error.argmin(axis=1).tolist() == list(range(40))
    assert alike(whole, np.stack(frames))


def test_all_readers_give_identical_frames(decoder: str) -> None:
    data = encoded(moving_square(20))
    upright = np.stack(list(frames_upright(io.BytesIO(data))))
    assert np.array_equal(upright, read_all(data, 64, decoder))


@pytest.mark.parametrize("size", [64, 128])
def test_frames_at_another_size_differ_by_no_more_than_documented(size: int, decoder: str) -> None:
    data = encoded(render_clip(1, size=96, frames=10).frames)
    error = np.abs(read_all(data, size, decoder).astype(int) - read_all(data, size, "pyav"))
    assert error.mean() < (5 if decoder == "torchcodec" else 1e-9)


@pytest.mark.parametrize("options", [{}, {"bf": "3"}, {"bf": "3", "flags": "+cgop"}])
def test_frames_are_in_the_order_in_which_they_are_shown(
    options: dict[str, str], decoder: str
) -> None:
    """Copied streams may have B-frames, which are decoded later than they are shown."""
    data = muxed("mp4", "libx264", moving_square(40), **options)
    whole = np.stack(list(frames_upright(io.BytesIO(data))))
    assert np.array_equal(read_all(data, 64, decoder), whole)
    chosen = [39, 0, 13, 12, 13, 27]
    assert np.array_equal(read_frames(data, chosen, 64, decoder), whole[chosen])


def test_fragmented_clip_is_read_completely(decoder: str) -> None:
    """Its index lists the frames of the first fragment only."""
    fragmented = {"movflags": "frag_keyframe+empty_moov"}
    data = muxed("mp4", "libx264", moving_square(40), **fragmented)
    whole = np.stack(list(frames_upright(io.BytesIO(data))))
    assert np.array_equal(read_all(data, 64, decoder), whole)


def test_decoders_agree_on_a_copied_stream_that_begins_late(decoder: str) -> None:
    original = muxed("mp4", "libx264", moving_square(30), first=7)
    data = copy_stream(io.BytesIO(original), 64).data
    frames = read_all(data, 64, decoder)
    assert len(frames) == 30
    assert np.array_equal(frames, read_all(data, 64, "pyav"))


def test_clip_of_another_size_is_resized() -> None:
    frames = read_frames(encoded(moving_square(4)), [1, 2], 32)
    assert frames.shape == (2, 32, 32, 3)
    assert alike(frames[0], resize(moving_square(4)[1], 32))


@pytest.mark.parametrize("size", [0, 16, 48, 100])
def test_size_that_decord_fails_at_is_refused(size: int) -> None:
    with pytest.raises(UserError, match=f"size of {size} .* multiple of 32"):
        read_frames(encoded(moving_square(4)), [1], size)


@pytest.mark.parametrize("data", [b"", b"<!DOCTYPE html> secret", None, "cut"])
def test_damaged_clip_is_refused_without_printing_its_bytes(
    data: Any, decoder: str, capfd: Any
) -> None:
    if data is None:
        data = np.random.default_rng(0).bytes(5000)
    if data == "cut":
        whole = encoded(moving_square(60))
        data = whole[: len(whole) // 2]
    for read in (
        lambda: read_all(data, 64, decoder),
        lambda: read_frames(data, [0, 50], 64, decoder),
    ):
        with pytest.raises(VideoError) as caught:
            read()
        assert "secret" not in str(caught.value)
    captured = capfd.readouterr()
    assert len(captured.err) < 1000
    assert "secret" not in captured.err + captured.out


@pytest.mark.parametrize("index", [-1, 40])
def test_frame_beyond_the_clip_is_refused(index: int, decoder: str) -> None:
    with pytest.raises(VideoError, match=r"40 frames, but not number"):
        read_frames(encoded(moving_square(40)), [3, index], 64, decoder)


# ---------------------------------------------------------------------------------------------
# What is not installed
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("missing", ["decord", "torchcodec"])
def test_decoder_that_is_not_installed_names_the_key_and_the_way_out(missing: str) -> None:
    error = error_of_a_process(missing, f"sys.modules[{missing!r}] = None")
    assert error.startswith(f"data.decoder={missing}: {missing} ")
    assert "set data.decoder=pyav" in error


def test_torchcodec_without_ffmpeg_names_the_way_out() -> None:
    pytest.importorskip("torchcodec")
    error = error_of_a_process("torchcodec")
    if not error:
        pytest.skip("FFmpeg is installed")
    assert error.startswith("data.decoder=torchcodec: torchcodec finds no FFmpeg here; install ")
    assert "set data.decoder=pyav" in error


def error_of_a_process(decoder: str, preparation: str = "") -> str:
    """Return what a fresh process says about a decoder, without libraries that are set up here."""
    code = f"""
import sys
from prioritycut_ray.errors import UserError
from prioritycut_ray.video.random_access import check_decoder
{preparation}
try:
    check_decoder({decoder!r})
except UserError as error:
    print(error)
"""
    hidden = {name: value for name, value in os.environ.items() if name != "LD_LIBRARY_PATH"}
    ran = subprocess.run(
        [sys.executable, "-c", code], env=hidden, capture_output=True, text=True, check=True
    )
    assert len(ran.stdout.splitlines()) <= 1
    return ran.stdout
