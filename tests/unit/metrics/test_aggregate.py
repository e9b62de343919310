"""Means and intervals: what is averaged, and what is only counted."""

import math

import numpy as np
import pytest
import torch

from prioritycut_ray.metrics.aggregate import (
    HIGHEST_PSNR,
    Metric,
    Tally,
    concatenate,
    difference_over_clips,
    difference_over_frames,
    every_frame,
    is_better,
    mean_over_clips,
    mean_over_frames,
    value_of,
)
from prioritycut_ray.metrics.reconstruction import reconstruction_scores

NOWHERE = Tally(np.zeros(3), np.zeros(3))
"""No face in any of three frames."""


def tally(*values: float) -> Tally:
    return every_frame(torch.tensor(values, dtype=torch.float64))


def test_one_mean_weighs_clips_and_the_other_frames() -> None:
    tallies, who = [tally(1.0), tally(3.0, 3.0, 3.0)], ["a", "b"]
    assert mean_over_clips("l1", tallies, who).value == pytest.approx(2.0)
    assert mean_over_frames("l1", tallies, who).value == pytest.approx(2.5)


def test_psnr_comes_from_the_mean_squared_error() -> None:
    assert value_of("psnr", tally(0.01, 0.03)) == pytest.approx(-10 * math.log10(0.02))
    assert value_of("psnr", tally(0.0)) == pytest.approx(HIGHEST_PSNR)
    over_frames = mean_over_frames("psnr", [tally(0.01), tally(0.03)], ["a", "b"])
    assert over_frames.value == pytest.approx(-10 * math.log10(0.02))


def test_frames_without_a_face_are_left_out_and_counted() -> None:
    found = Tally(np.array([2.0, 0.0, 4.0]), np.array([1.0, 0.0, 1.0]))
    estimate = mean_over_clips("akd", [found, NOWHERE], ["a", "b"])
    assert estimate.value == pytest.approx(3.0)
    assert (estimate.clips, estimate.frames, estimate.identities) == (1, 2, 1)
    assert estimate.low is None, "one identity has no interval"
    assert mean_over_frames("akd", [NOWHERE], ["a"]).value is None
    assert value_of("akd", NOWHERE) is None


def test_intervals_contain_the_mean_and_are_repeatable() -> None:
    numbers = np.random.default_rng(0).normal(5, 1, 40)
    tallies, who = [tally(x) for x in numbers], [str(i) for i in range(40)]
    first = mean_over_clips("l1", tallies, who)
    assert first == mean_over_clips("l1", tallies, who)
    assert first.value is not None
    assert first.low is not None
    assert first.high is not None
    assert first.low < first.value < first.high
    assert first.high - first.low == pytest.approx(2 * 1.96 * numbers.std() / 40**0.5, rel=0.15)


def test_clips_of_one_identity_are_resampled_together() -> None:
    """Ten copies of a person's clip carry no more information than one."""
    clips, who = [tally(1.0), tally(2.0), tally(3.0)], ["a", "b", "c"]
    once = mean_over_clips("l1", clips, who)
    often = mean_over_clips("l1", clips * 10, who * 10)
    assert (once.low, once.high) == (often.low, often.high)


def test_differences_use_the_frames_that_count_in_both() -> None:
    first = Tally(np.array([1.0, 0.0, 5.0]), np.array([1.0, 0.0, 1.0]))
    second = Tally(np.array([2.0, 9.0, 0.0]), np.array([1.0, 1.0, 0.0]))
    over_clips = difference_over_clips("akd", [(first, second)], ["a"])
    assert over_clips.value == pytest.approx(-1.0)
    assert over_clips.frames == 1
    assert difference_over_frames("akd", [(first, second)], ["a"]).value == pytest.approx(-1.0)


def test_a_paired_difference_is_more_precise_than_two_intervals() -> None:
    numbers = np.random.default_rng(0).normal(5, 1, 20)
    pairs = [(tally(x), tally(x + 0.1)) for x in numbers]
    estimate = difference_over_clips("l1", pairs, [str(i) for i in range(20)])
    lower = Metric(key="l1", label="L1", definition="", decimals=4)
    assert is_better(lower, estimate) is True
    assert is_better(lower.model_copy(update={"higher_is_better": True}), estimate) is False
    swapped = [(tally(1.0), tally(2.0)), (tally(2.0), tally(1.0))]
    none = difference_over_clips("l1", swapped, ["a", "b"])
    assert is_better(lower, none) is None


def test_similarity_equals_that_of_torchmetrics() -> None:
    from torchmetrics.functional.image import (
        peak_signal_noise_ratio,
        structural_similarity_index_measure,
    )

    generator = torch.Generator().manual_seed(0)
    a, b = (torch.rand(3, 3, 32, 32, generator=generator) for _ in range(2))
    parts = [reconstruction_scores(a[:2], b[:2]), reconstruction_scores(a[2:], b[2:])]
    scores = concatenate(parts)
    expected = {
        "l1": (a - b).abs().mean(),
        "psnr": peak_signal_noise_ratio(a, b, data_range=(0.0, 1.0)),
        "ssim": structural_similarity_index_measure(a, b, data_range=(0.0, 1.0)),
    }
    for key, value in expected.items():
        assert value_of(key, scores[key]) == pytest.approx(float(value), rel=1e-5)
