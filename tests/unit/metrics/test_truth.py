"""Errors by region and along the true motion, on cases that can be computed by hand."""

import numpy as np
import pytest
import torch

from prioritycut_ray.metrics.aggregate import mean_over_clips, value_of
from prioritycut_ray.metrics.truth import (
    MotionTruth,
    region_errors,
    regions,
    rim_width,
    warp,
    warping_error,
)


@pytest.mark.parametrize(("size", "width"), [(24, 1), (32, 1), (64, 2), (128, 4), (256, 8)])
def test_the_rim_grows_with_the_frame(size: int, width: int) -> None:
    assert rim_width(size) == width


def test_the_rim_is_all_that_is_near_a_disoccluded_pixel() -> None:
    """Against the definition, pixel by pixel."""
    hidden = np.random.default_rng(0).random((2, 64, 64)) < 0.002
    masks = regions(hidden)
    assert (sum(mask.astype(int) for mask in masks.values()) == 1).all()
    for frame, rim in zip(hidden, masks["rim"], strict=True):
        places = np.argwhere(frame)
        for row, column in np.ndindex(64, 64):
            distance = np.hypot(*(places - [row, column]).T).min()
            assert rim[row, column] == (0 < distance <= 2)


def test_a_frame_that_shows_nothing_new_has_neither_rim_nor_error_there() -> None:
    masks = regions(np.zeros((1, 8, 8), bool))
    scores = region_errors(torch.zeros(1, 3, 8, 8), torch.ones(1, 3, 8, 8), masks)
    assert [value_of(key, tally) for key, tally in scores.items()] == [None, None, 1.0]
    assert [tally.frames() for tally in scores.values()] == [0, 0, 1]


def test_regions_add_up_to_the_whole_error() -> None:
    generator = torch.Generator().manual_seed(0)
    predicted, true = (torch.rand(3, 3, 32, 32, generator=generator) for _ in range(2))
    masks = regions(np.random.default_rng(1).random((3, 32, 32)) < 0.01)
    sums = [tally.sums() for tally in region_errors(predicted, true, masks).values()]
    assert sum(pixels for _, pixels in sums) == 3 * 32 * 32
    whole = float((predicted - true).abs().mean())
    assert sum(error for error, _ in sums) / (3 * 32 * 32) == pytest.approx(whole)


def moving(frames: int = 4) -> tuple[torch.Tensor, MotionTruth]:
    """A random picture that moves one pixel to the right and two down in every frame."""
    picture = torch.rand(3, 32, 32, generator=torch.Generator().manual_seed(0))
    video = torch.stack([picture.roll((2 * t, t), (1, 2)) for t in range(frames)])
    flow = torch.tensor([-1.0, -2.0], dtype=torch.float64).expand(frames, 32, 32, 2)
    visible = torch.ones(frames, 32, 32, dtype=torch.bool)
    visible[0], visible[:, :2], visible[:, :, :1] = False, False, False
    return video, MotionTruth(flow, visible)


def test_a_video_that_moves_as_it_should_does_not_flicker() -> None:
    video, motion = moving()
    assert (warp(video[:-1], motion.flow[1:]) - video[1:])[:, :, 2:, 1:].abs().max() < 1e-5
    tally = warping_error(video, motion)
    assert value_of("flicker", tally) == pytest.approx(0, abs=1e-6)
    assert tally.frames() == 3
    assert tally.denominator.tolist() == [0, *[30 * 31] * 3]


def test_flicker_is_what_changes_besides_the_motion() -> None:
    video, motion = moving()
    flickering = video + 0.1 * torch.tensor([0.0, 1.0, 0.0, 1.0]).view(4, 1, 1, 1)
    assert value_of("flicker", warping_error(flickering, motion)) == pytest.approx(0.1, abs=1e-5)
    still = video[:1].expand_as(video)
    assert (value_of("flicker", warping_error(still, motion)) or 0) > 0.2


def test_frames_count_once_whatever_their_share_of_pixels() -> None:
    """An interval of a region is over identities; its count is of frames, not of pixels."""
    video, motion = moving()
    estimate = mean_over_clips("flicker", [warping_error(video, motion)] * 3, ["a", "b", "c"])
    assert (estimate.clips, estimate.frames, estimate.identities) == (3, 9, 3)
