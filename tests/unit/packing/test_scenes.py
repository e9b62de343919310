"""Hard cuts are found, and nothing else is taken for one; segments are even."""

import itertools

import numpy as np
import pytest

from prioritycut_ray.packing.scenes import count_and_cuts, even_length, numbered_segments
from prioritycut_ray.video.decoding import frames_upright
from prioritycut_ray.video.images import center_square, resize
from tests.places import DEV


def scene(seed: int, count: int, step: int = 1) -> list[np.ndarray]:
    """Large blobs of colour that move a little."""
    small = np.random.default_rng(seed).integers(0, 255, (8, 8, 3), np.uint8)
    picture = small.repeat(16, axis=0).repeat(16, axis=1)
    return [np.roll(picture, step * index, axis=1)[32:96, 32:96] for index in range(count)]


def test_hard_cuts_are_found() -> None:
    frames = scene(0, 20) + scene(1, 9) + scene(2, 30)
    assert count_and_cuts(iter(frames)) == (59, [20, 29])
    numbers = [number for number, _ in numbered_segments(frames, 1000)]
    assert numbers == [0] * 20 + [1] * 9 + [2] * 30
    assert all(
        np.array_equal(one, other)
        for one, (_, other) in zip(frames, numbered_segments(frames, 1000), strict=True)
    )


def test_motion_noise_flashes_and_stillness_are_no_cuts() -> None:
    rng = np.random.default_rng(0)
    noise = list(rng.integers(0, 255, (30, 64, 64, 3), np.uint8))
    white = [np.full((64, 64, 3), 255, np.uint8)]
    on_twos = [frame for frame in scene(3, 20, step=16) for _ in range(2)]
    fade = [np.full((64, 64, 3), 8 * level, np.uint8) for level in range(30)]
    flash = scene(0, 20) + white + scene(0, 40)[20:]
    for frames in (noise, flash, on_twos, fade, scene(4, 30, step=24), white * 30):
        assert count_and_cuts(frames) == (len(frames), [])


@pytest.mark.parametrize("length", [1, 2, 4, 6])
def test_clip_too_short_to_judge_stays_whole(length: int) -> None:
    frames = [frame for seed in range(length) for frame in scene(seed, 1)]
    assert count_and_cuts(frames) == (length, [])


@pytest.mark.parametrize(
    ("frames", "longest", "lengths"),
    [(10, 10, [10]), (11, 10, [6, 5]), (25, 10, [9, 9, 7]), (0, 10, [])],
)
def test_segments_are_even(frames: int, longest: int, lengths: list[int]) -> None:
    still = [np.zeros((32, 32, 3), np.uint8)] * frames
    segments = itertools.groupby(
        n for n, _ in numbered_segments(still, even_length(frames, longest))
    )
    assert [len([*group]) for _, group in segments] == lengths


@pytest.mark.slow
@pytest.mark.skipif(not DEV.exists(), reason="needs ../shared/data/dev")
def test_real_clips_have_no_cut() -> None:
    for path in sorted(DEV.glob("*.mp4")):
        frames = (resize(center_square(frame), 64) for frame in frames_upright(path))
        assert count_and_cuts(frames)[1] == [], path.name
