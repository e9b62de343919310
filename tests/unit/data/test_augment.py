"""Both frames of a pair change alike, as torchvision would change them, and by the seed alone."""

import itertools
from typing import Any

import pytest
import torch
import torchvision.transforms.v2.functional as reference
from torch import Tensor

from prioritycut_ray.data.augment import _draw, augment

OFF: dict[str, Any] = {
    "horizontal_flip": False,
    "time_flip": False,
    "brightness": 0.0,
    "contrast": 0.0,
    "saturation": 0.0,
    "hue": 0.0,
}
JITTER = {"brightness": 0.3, "contrast": 0.4, "saturation": 0.5, "hue": 0.2}
ALL = OFF | JITTER | {"horizontal_flip": True, "time_flip": True}


def images(count: int, seed: int = 0) -> Tensor:
    return torch.rand(count, 3, 12, 10, generator=torch.Generator().manual_seed(seed))


def seeds(count: int) -> Tensor:
    return torch.arange(count) * 7919 + 2**62


def test_nothing_chosen_changes_nothing() -> None:
    source, driving = images(4), images(4, 1)
    changed = augment(source, driving, seeds(4), **OFF)
    assert torch.equal(changed[0], source)
    assert torch.equal(changed[1], driving)


@pytest.mark.parametrize("options", [OFF | JITTER, OFF | {"horizontal_flip": True}, ALL])
def test_equal_frames_stay_equal_and_do_change(options: dict[str, Any]) -> None:
    frames = images(16)
    source, driving = augment(frames, frames, seeds(16), **options)
    assert torch.equal(source, driving)
    assert not torch.equal(source, frames)


def test_values_stay_in_range() -> None:
    extremes = torch.cat([images(30), torch.zeros(1, 3, 12, 10), torch.ones(1, 3, 12, 10)])
    wild = ALL | {"brightness": 2.0, "contrast": 2.0, "saturation": 2.0, "hue": 0.5}
    for changed in augment(extremes, extremes.flip(0), seeds(32), **wild):
        assert changed.shape == extremes.shape
        assert changed.dtype == torch.float32
        assert torch.isfinite(changed).all()
        assert changed.min() >= 0
        assert changed.max() <= 1


@pytest.mark.parametrize("name", ["horizontal_flip", "time_flip"])
def test_flips_take_half_of_the_pairs(name: str) -> None:
    source, driving = images(400), images(400, 1)
    changed = augment(source, driving, seeds(400), **OFF | {name: True})
    flipped = {
        "horizontal_flip": (source.flip(-1), driving.flip(-1)),
        "time_flip": (driving, source),
    }[name]
    taken = 0
    for index in range(400):
        is_kept = torch.equal(changed[0][index], source[index])
        kept, other = (source, driving), flipped
        expected = kept if is_kept else other
        assert torch.equal(changed[0][index], expected[0][index])
        assert torch.equal(changed[1][index], expected[1][index])
        taken += not is_kept
    assert 150 < taken < 250


def test_sample_is_changed_alike_in_any_batch() -> None:
    source, driving = images(8), images(8, 1)
    whole = augment(source, driving, seeds(8), **ALL)
    for part in (slice(0, 3), slice(3, 8), slice(5, 6)):
        alone = augment(source[part], driving[part], seeds(8)[part], **ALL)
        for a, b in zip(whole, alone, strict=True):
            torch.testing.assert_close(a[part], b)
    shuffled = torch.randperm(8, generator=torch.Generator().manual_seed(3))
    mixed = augment(source[shuffled], driving[shuffled], seeds(8)[shuffled], **ALL)
    torch.testing.assert_close(mixed[0], whole[0][shuffled])


def test_switching_one_change_off_leaves_the_others() -> None:
    source, driving = images(8), images(8, 1)
    flip = augment(source, driving, seeds(8), **OFF | {"horizontal_flip": True})
    both = augment(source, driving, seeds(8), **OFF | {"horizontal_flip": True, "time_flip": True})
    for index in range(8):
        assert any(torch.equal(both[0][index], one[index]) for one in flip)


def test_global_random_state_is_left_alone() -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    augment(images(2), images(2), seeds(2), **ALL)
    assert torch.equal(torch.get_rng_state(), before)


def jittered_by_torchvision(image: Tensor, draw: dict[str, float]) -> Tensor:
    factor = {name: 1 - JITTER[name] + 2 * JITTER[name] * draw[name] for name in JITTER}
    image = reference.adjust_brightness(image, factor["brightness"])
    image = reference.adjust_contrast(image, factor["contrast"])
    image = reference.adjust_saturation(image, factor["saturation"])
    return reference.adjust_hue(image, (2 * draw["hue"] - 1) * JITTER["hue"])


def test_colours_change_as_in_torchvision() -> None:
    source, driving = images(12), images(12, 1)
    changed = augment(source, driving, seeds(12), **OFF | JITTER)
    draws = _draw(seeds(12), source)._asdict()
    for index, (before, after) in itertools.product(
        range(12), zip((source, driving), changed, strict=True)
    ):
        draw = {name: float(values[index]) for name, values in draws.items()}
        expected = jittered_by_torchvision(before[index], draw)
        torch.testing.assert_close(after[index], expected, atol=2e-5, rtol=0)


def test_hue_keeps_grays_and_comes_round() -> None:
    gray = torch.rand(5, 1, 6, 6).expand(5, 3, 6, 6)
    turned, _ = augment(gray, gray, seeds(5), **OFF | {"hue": 0.5})
    torch.testing.assert_close(turned, gray)
    colours = images(5)
    # A turn of the circle by 1 in all: 0.5 is only the usual limit.
    draw = _draw(seeds(5), colours).hue
    whole_turns, _ = augment(
        colours[:1], colours[:1], seeds(1), **OFF | {"hue": float(1 / (2 * draw[0] - 1))}
    )
    torch.testing.assert_close(whole_turns, colours[:1], atol=1e-4, rtol=0)


def test_factors_never_fall_below_zero() -> None:
    white = torch.ones(64, 3, 2, 2)
    changed, _ = augment(white, white, seeds(64), **OFF | {"brightness": 3.0})
    levels = changed[:, 0, 0, 0]
    # Factors are uniform in [0, 4]: a quarter of them darkens.
    assert 6 <= int((levels < 1).sum()) <= 26
    assert torch.equal(changed, levels.view(-1, 1, 1, 1).expand_as(changed))
