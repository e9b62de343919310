"""Metrics of animation without ground truth, where the answer is known."""

from functools import cache

import pytest
import torch

from prioritycut_ray.data.puppets import render_clip
from prioritycut_ray.inference.animate import to_tensor
from prioritycut_ray.metrics import transfer
from prioritycut_ray.metrics.aggregate import value_of
from prioritycut_ray.metrics.transfer import (
    CORRELATIONS,
    FLICKER,
    IDENTITY,
    LOWEST_CORRELATION,
    POSE,
    TRUE_ERRORS,
    transfer_metrics,
    transfer_scores,
)
from prioritycut_ray.models.perceptual import perceptual_features

CPU = torch.device("cpu")
FEATURES = perceptual_features("efficientnet_lite0")


@cache
def frames_of(seed: int) -> torch.Tensor:
    return to_tensor(render_clip(seed, frames=4).frames, CPU)


def values(source: torch.Tensor, frames: torch.Tensor) -> dict[str, float | None]:
    with torch.inference_mode():
        scores = transfer_scores(source, frames, None, FEATURES)
    return {key: value_of(key, tally) for key, tally in scores.items()}


def test_the_copied_source_is_itself_and_does_not_flicker() -> None:
    picture = frames_of(0)[:1]
    scores = values(picture, picture.expand(4, -1, -1, -1))
    assert scores[IDENTITY] == pytest.approx(0, abs=1e-5)
    assert scores[FLICKER] == pytest.approx(0, abs=1e-5)
    assert scores[POSE] is None, "nobody asked the picture for a pose"


def test_another_puppet_is_farther_away_than_the_same_one_in_another_pose() -> None:
    for seed in range(2):
        source = frames_of(seed)[:1]
        same, other = values(source, frames_of(seed)), values(source, frames_of(seed + 2))
        assert (other[IDENTITY] or 0) > 2 * (same[IDENTITY] or 0) > 0


def test_noise_that_changes_flickers_more_than_motion() -> None:
    frames = frames_of(1)
    noise = torch.rand(frames.shape, generator=torch.Generator().manual_seed(0)) - 0.5
    moving, noisy = values(frames[:1], frames), values(frames[:1], frames + 0.2 * noise)
    assert (noisy[FLICKER] or 0) > 2 * (moving[FLICKER] or 0) > 0


def test_frames_that_are_not_finite_are_scored_without_a_crash() -> None:
    frames = frames_of(1).clone()
    frames[2] = torch.nan
    with torch.inference_mode():
        tally = transfer_scores(frames[:1], frames, None, FEATURES)[FLICKER]
    assert torch.isnan(torch.from_numpy(tally.numerator)).tolist() == [False, False, True, True]


def test_a_metric_is_unvalidated_until_its_correlation_is_high(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert CORRELATIONS.keys() == TRUE_ERRORS.keys() == {m.key for m in transfer_metrics()}
    for value, validated in (
        (None, False),
        (LOWEST_CORRELATION - 0.01, False),
        (-0.9, False),
        (LOWEST_CORRELATION, True),
    ):
        monkeypatch.setattr(transfer, "CORRELATIONS", dict.fromkeys(CORRELATIONS, value))
        for metric in transfer_metrics():
            assert metric.label.endswith("(unvalidated)") != validated
            assert ("unvalidated" in metric.definition) != validated
            assert value is None or f"{value:.2f}" in metric.definition
