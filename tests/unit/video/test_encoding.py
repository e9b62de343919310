"""Encoded videos are complete, reproducible, and appear only when they are finished."""

import io
import weakref
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from prioritycut_ray.errors import UserError
from prioritycut_ray.video.encoding import write_video
from prioritycut_ray.video.random_access import read_all
from tests.video_files import encoded, moving_square


def test_same_frames_give_the_same_bytes() -> None:
    # x264 left to itself differs in every other run here, with where its buffers lie.
    y, x = np.mgrid[:96, :96] / 96
    noise = np.random.default_rng(0).normal(0, 3, (30, 96, 96, 1))
    waves = [127 + 100 * np.sin(6 * x + 4 * y * y + time / 5) for time in range(30)]
    frames = (np.stack(waves)[..., None] + noise).repeat(3, axis=3).clip(0, 255).astype(np.uint8)
    clutter, seen = [], set()
    for size in range(12):
        clutter.append(bytearray(7777 * size + 1))
        seen.add(encoded(list(frames)))
    assert len(seen) == 1


def test_index_comes_before_the_frames() -> None:
    data = encoded(moving_square(5))
    assert 0 < data.index(b"moov") < data.index(b"mdat")


def test_frames_are_not_kept_in_memory() -> None:
    alive: list[weakref.ref[np.ndarray]] = []

    def frames() -> Iterator[np.ndarray]:
        for frame in moving_square(40):
            copy = frame.copy()
            alive.append(weakref.ref(copy))
            yield copy
            del copy
            assert sum(reference() is not None for reference in alive) <= 2

    write_video(io.BytesIO(), frames(), 25.0)
    assert len(alive) == 40


def test_failed_write_leaves_only_the_old_file(tmp_path: Path) -> None:
    target = tmp_path / "clip.mp4"
    target.write_bytes(b"old")

    def frames() -> Iterator[np.ndarray]:
        yield from moving_square(5)
        raise RuntimeError("power cut")

    with pytest.raises(RuntimeError, match="power cut"):
        write_video(target, frames(), 25.0)
    assert target.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [target]


@pytest.mark.parametrize(
    ("frames", "fps", "reason"),
    [
        (moving_square(2, 63, 64), 25.0, "64x63: H.264 requires even sides"),
        (moving_square(2) + moving_square(1, 32, 32), 25.0, r"frames of \(64, 64, 3\) and"),
        ([], 25.0, "no frames"),
        (moving_square(2), 0.0, "above 0"),
        (moving_square(2), float("nan"), "above 0"),
    ],
)
def test_unwritable_videos_are_refused(
    frames: list[np.ndarray], fps: float, reason: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=reason):
        write_video(tmp_path / "clip.mp4", frames, fps)
    assert list(tmp_path.iterdir()) == []


def test_colours_survive() -> None:
    colours = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255), (0, 0, 0), (200, 120, 40)]
    frames = [np.full((32, 32, 3), colour, np.uint8) for colour in colours]
    decoded = read_all(encoded(frames, crf=1), 32).astype(int)
    assert np.abs(decoded - np.stack(frames)).max() <= 3
