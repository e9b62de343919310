"""Smoothed keypoints against the true ones, which only synthetic motion has."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from prioritycut_ray.config import load_config
from prioritycut_ray.data.puppets import render_clip
from prioritycut_ray.errors import UserError
from prioritycut_ray.inference.animate import animate, to_tensor
from prioritycut_ray.inference.smoothing import Detected, smoothed, window_of
from prioritycut_ray.models.animator import Animator
from prioritycut_ray.models.keypoints import Keypoints
from prioritycut_ray.networks import build_animator
from tests.networks import spread_keypoints
from tests.places import FAMILIES

CPU = torch.device("cpu")
COUNT, WINDOW = 53, 9
SPEEDS = torch.tensor([[0.01, -0.02], [0.005, 0.0], [0.0, 0.015]])


def moving(times: torch.Tensor, *, jacobians: bool = True) -> Keypoints:
    """Three keypoints on parabolas, one for each time; their jacobians turn slowly."""
    value = SPEEDS * times[:, None, None] + 1e-4 * times[:, None, None].square()
    angles = 0.02 * times
    rows = [angles.cos(), -angles.sin(), angles.sin(), angles.cos()]
    turns = torch.stack(rows, dim=-1).view(-1, 1, 2, 2).expand(-1, 3, -1, -1)
    return Keypoints(value, turns if jacobians else None)


def in_batches(keypoints: Keypoints, size: int = 16) -> Iterator[Detected]:
    """Batches of frames that show their own number."""
    numbers = torch.arange(len(keypoints.value)).view(-1, 1, 1, 1).expand(-1, 3, 2, 2).float()
    for start in range(0, len(numbers), size):
        value, jacobian = keypoints
        part = slice(start, start + size)
        yield numbers[part], Keypoints(value[part], None if jacobian is None else jacobian[part])


def joined(batches: Iterator[Detected]) -> Keypoints:
    """The keypoints of all batches, whose frames are in order."""
    frames, keypoints = zip(*batches, strict=True)
    assert torch.cat(frames)[:, 0, 0, 0].tolist() == list(range(sum(map(len, frames))))
    values, jacobians = zip(*keypoints, strict=True)
    return Keypoints(
        torch.cat(values), None if jacobians[0] is None else torch.cat(list(jacobians))
    )


@pytest.mark.parametrize("count", [1, 2, 3, 4, 8, 9, 16, COUNT])
def test_constant_and_linear_motion_is_unchanged_to_the_first_and_last_frame(count: int) -> None:
    times = torch.arange(count, dtype=torch.float32)
    still = Keypoints(torch.rand(1, 3, 2).expand(count, -1, -1), None)
    even = Keypoints(SPEEDS * times[:, None, None], torch.rand(3, 2, 2) + times.view(-1, 1, 1, 1))
    for true in (still, even):
        got = joined(smoothed(in_batches(true), WINDOW))
        torch.testing.assert_close(got.value, true.value, atol=1e-6, rtol=1e-6)
        if true.jacobian is not None and got.jacobian is not None:
            torch.testing.assert_close(got.jacobian, true.jacobian, atol=1e-5, rtol=1e-6)


@pytest.mark.parametrize("jacobians", [True, False])
def test_jitter_is_reduced_and_the_true_motion_kept(jacobians: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    true = moving(torch.arange(400, dtype=torch.float32), jacobians=jacobians)

    def distance(keypoints: Keypoints) -> list[float]:
        """RMS distance from the true values, of each frame and from frame to frame."""
        parts = zip(keypoints, true, strict=True)
        off = torch.cat(
            [(a - b).flatten(1) for a, b in parts if a is not None and b is not None], 1
        )
        return [float(each.square().mean().sqrt()) for each in (off, off.diff(dim=0))]

    noisy = Keypoints(
        *(
            None if part is None else part + 0.01 * torch.randn(part.shape, generator=generator)
            for part in true
        )
    )
    # White noise: the filter's gain is √(59/231) = 0.51, and 0.22 for differences of frames.
    before, after = distance(noisy), distance(joined(smoothed(in_batches(noisy), WINDOW)))
    assert after[0] < 0.55 * before[0]
    assert after[1] < 0.25 * before[1]
    exact = distance(joined(smoothed(in_batches(true), WINDOW)))
    assert exact[0] < 1e-4, "parabolas are kept, and turns nearly"


def test_the_result_does_not_depend_on_the_size_of_batches() -> None:
    noisy = moving(torch.arange(COUNT) + torch.rand(COUNT, generator=torch.manual_seed(0)))
    expected = joined(smoothed(in_batches(noisy, COUNT), WINDOW))
    for size in (1, 3, 16, 40):
        batches = list(smoothed(in_batches(noisy, size), WINDOW))
        assert max(len(frames) for frames, _ in batches) <= size
        got = joined(iter(batches))
        torch.testing.assert_close(got, expected, atol=1e-6, rtol=0)
    # And frames far away change nothing.
    changed = Keypoints(noisy.value.clone(), noisy.jacobian)
    changed.value[30:] += 1
    got = joined(smoothed(in_batches(changed), WINDOW))
    torch.testing.assert_close(got.value[:26], expected.value[:26], atol=1e-6, rtol=0)
    assert (got.value[26:30] - expected.value[26:30]).abs().amax(dim=(1, 2)).min() > 1e-3


def test_a_long_video_is_filtered_in_bounded_memory() -> None:
    read = 0

    def endless() -> Iterator[Detected]:
        nonlocal read
        while True:
            times = torch.arange(read, read + 16, dtype=torch.float32)
            read += 16
            yield times.view(-1, 1, 1, 1).expand(-1, 3, 2, 2), moving(times)

    done = 0
    for frames, _ in smoothed(endless(), WINDOW):
        done += len(frames)
        assert frames.untyped_storage().nbytes() <= 4 * 3 * 2 * 2 * (16 + WINDOW)
        assert read - done <= WINDOW // 2 + 16
        if done > 10_000:
            break


@pytest.mark.parametrize(
    ("fps", "window"), [(1, 5), (12, 5), (24, 9), (25, 9), (29.97, 9), (50, 17), (60, 21)]
)
def test_the_window_is_a_third_of_a_second(fps: float, window: int) -> None:
    assert window_of(fps) == window


@pytest.mark.parametrize("window", [1, 3, 8, -5])
def test_a_window_that_smooths_nothing_is_refused(window: int) -> None:
    with pytest.raises(UserError, match=f"smooth={window}: must be an odd number"):
        next(smoothed(in_batches(moving(torch.arange(20))), window))


class Jittering:
    """Detects keypoints with an offset that changes from frame to frame."""

    def __init__(self, animator: Animator) -> None:
        self.detect, self.generator = animator.detect, torch.Generator().manual_seed(0)

    def __call__(self, frames: torch.Tensor) -> Keypoints:
        value, jacobian = self.detect(frames)
        return Keypoints(
            value + 0.005 * torch.randn(value.shape, generator=self.generator), jacobian
        )


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_an_animation_with_jittering_keypoints_flickers_less(family: Path) -> None:
    torch.manual_seed(0)
    animator = build_animator(load_config(str(family)).model).eval()
    spread_keypoints(animator)
    # A driving video that stands still: every change is flicker.
    frames = [render_clip(5, size=32, frames=1).frames[0]] * 24
    still = to_tensor(render_clip(6, size=32, frames=1).frames, CPU)

    def prediction(smooth: int) -> torch.Tensor:
        parts = animate(animator, still, frames, relative=True, adapt_scale=False, smooth=smooth)
        return torch.cat([part.animation.prediction.detach() for part in parts])

    steady = prediction(0)
    torch.testing.assert_close(prediction(WINDOW), steady, atol=1e-5, rtol=0)
    animator.detect = Jittering(animator)  # type: ignore[method-assign]
    flicker = [prediction(smooth).diff(dim=0).abs().mean() for smooth in (0, WINDOW)]
    assert flicker[1] < 0.5 * flicker[0]
