"""PriorityCut and CutMix masks and mixing, as properties (method §4)."""

from fractions import Fraction
from random import Random
from typing import NamedTuple

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from prioritycut_ray.models.animator import Animation
from prioritycut_ray.models.keypoints import Keypoints
from prioritycut_ray.priority_cut import (
    cutmix_mask,
    mix,
    mix_probability,
    mixing_mask,
    priority_mask,
    swap_roles,
)

properties = settings(deadline=None, max_examples=60)
percentages = st.integers(0, 400).map(lambda quarters: quarters / 4)


class Maps(NamedTuple):
    """Occlusion map and background mask `[B, 1, h, w]`."""

    occlusion: Tensor
    background: Tensor

    def mask(self, top_k: float) -> Tensor:
        """At the maps' own resolution."""
        size = tuple(self.occlusion.shape[2:])
        return priority_mask(self.occlusion, self.background, top_k=top_k, size=size)

    @property
    def foreground(self) -> Tensor:
        return self.background < 0.5


@st.composite
def maps(draw: st.DrawFn) -> Maps:
    """Random maps; few levels of occlusion give many ties, and 0 and 1 themselves."""
    batch, height, width = (draw(st.integers(1, n)) for n in (3, 12, 12))
    levels = draw(st.sampled_from([1, 2, 5, 2**20]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    shape = (batch, 1, height, width)
    occlusion = torch.randint(0, levels + 1, shape, generator=generator) / levels
    share = draw(st.sampled_from([0.0, 0.3, 0.9, 1.0]))
    background = (torch.rand(shape, generator=generator) < share).float()
    return Maps(occlusion, background * 0.75 + 0.1)


def uniform_maps(foreground_pixels: int, occlusion: float = 0.3) -> Maps:
    """One row of 200 pixels, the first of them foreground, all equally occluded."""
    background = (torch.arange(200) >= foreground_pixels).float().view(1, 1, 1, 200)
    return Maps(torch.full((1, 1, 1, 200), occlusion), background)


# PriorityCut


@properties
@given(maps(), percentages)
@example(uniform_maps(150), 7.0)  # 10.5 pixels: k/100 · n in floating point is 10.500000000000002
@example(uniform_maps(50), 29.0)  # 14.5 pixels: 14.499999999999998
def test_exactly_k_percent_of_the_foreground_is_cut_in_each_sample(m: Maps, top_k: float) -> None:
    cut = (m.mask(top_k) == 0).flatten(1).sum(1).tolist()
    foreground = m.foreground.flatten(1).sum(1).tolist()
    assert cut == [round(Fraction(top_k) * n / 100) for n in foreground]


@properties
@given(maps(), percentages)
def test_background_is_never_cut_and_the_mask_is_binary(m: Maps, top_k: float) -> None:
    mask = m.mask(top_k)
    assert ((mask == 0) | (mask == 1)).all()  # not NaN, too
    assert (mask[~m.foreground] == 1).all()


@properties
@given(maps(), percentages)
def test_no_pixel_left_is_more_occluded_than_one_that_is_cut(m: Maps, top_k: float) -> None:
    for mask, occlusion, foreground in zip(m.mask(top_k), m.occlusion, m.foreground, strict=True):
        cut, left = occlusion[foreground & (mask == 0)], occlusion[foreground & (mask == 1)]
        if len(cut) and len(left):
            assert cut.max() <= left.min()


@properties
@given(maps(), percentages)
def test_ties_go_to_the_first_pixel_in_reading_order(m: Maps, top_k: float) -> None:
    for mask, occlusion, foreground in zip(m.mask(top_k), m.occlusion, m.foreground, strict=True):
        cut = foreground & (mask == 0)
        if not cut.any():
            continue
        of_level = mask[foreground & (occlusion == occlusion[cut].max())]
        assert torch.equal(of_level, of_level.sort().values)


@properties
@given(maps(), percentages, st.randoms())
def test_samples_of_a_batch_are_independent(m: Maps, top_k: float, random: Random) -> None:
    order = list(range(len(m.occlusion)))
    random.shuffle(order)
    permuted = Maps(m.occlusion[order], m.background[order])
    assert torch.equal(permuted.mask(top_k), m.mask(top_k)[order])
    alone = Maps(m.occlusion[:1], m.background[:1])
    assert torch.equal(alone.mask(top_k), m.mask(top_k)[:1])


@properties
@given(maps(), percentages)
def test_same_input_gives_the_same_mask_and_stays_untouched(m: Maps, top_k: float) -> None:
    before = m.occlusion.clone(), m.background.clone()
    assert torch.equal(m.mask(top_k), m.mask(top_k))
    assert torch.equal(m.occlusion, before[0])
    assert torch.equal(m.background, before[1])


@properties
@given(maps())
def test_k_of_0_cuts_nothing_and_k_of_100_the_whole_foreground(m: Maps) -> None:
    assert (m.mask(0.0) == 1).all()
    assert torch.equal(m.mask(100.0) == 0, m.foreground)


def test_a_larger_k_cuts_more() -> None:
    m = Maps(torch.rand(2, 1, 9, 9), torch.rand(2, 1, 9, 9))
    small, large = m.mask(20.0), m.mask(60.0)
    assert (small >= large).all()
    assert (small > large).any()


def test_all_background_cuts_nothing() -> None:
    assert (uniform_maps(0, occlusion=0.0).mask(100.0) == 1).all()


def test_all_equal_occlusion_cuts_the_first_foreground_pixels() -> None:
    background = torch.tensor([[[[1.0, 0, 0], [0, 1, 0]]]])
    mask = Maps(torch.full((1, 1, 2, 3), 0.4), background).mask(50.0)
    assert mask.tolist() == [[[[1, 0, 0], [1, 1, 1]]]]


def test_occluded_pixels_are_cut_and_visible_ones_are_not() -> None:
    """Polarity: O = 0 is occluded; M = 0 is where the generated image shows."""
    occlusion = torch.tensor([[[[0.9, 0.1], [0.8, 0.0]]]])
    background = torch.tensor([[[[0.0, 0.2], [0.49, 0.5]]]])  # the last pixel is background
    mask = priority_mask(occlusion, background, top_k=34.0, size=(2, 2))
    assert mask.tolist() == [[[[1, 0], [1, 1]]]]
    mixed = mix(torch.ones(1, 3, 2, 2), torch.zeros(1, 3, 2, 2), mask)
    assert mixed[0, 0].tolist() == [[1, 0], [1, 1]]


def test_occlusions_too_small_to_tell_from_one_by_subtraction_are_ordered() -> None:
    """1 − 2e-9 and 1 − 1e-9 are the same float32; their order is not lost."""
    occlusion = torch.tensor([[[[2e-9, 1e-9]]]])
    mask = Maps(occlusion, torch.zeros(1, 1, 1, 2)).mask(50.0)
    assert mask.tolist() == [[[[1, 0]]]]


def test_the_threshold_moves_the_foreground() -> None:
    background = torch.tensor([[[[0.1, 0.4, 0.6, 0.9]]]])
    occlusion = torch.zeros(1, 1, 1, 4)

    def cut(threshold: float) -> list[float]:
        mask = priority_mask(
            occlusion, background, top_k=100.0, size=(1, 4), background_threshold=threshold
        )
        return (1 - mask).flatten().tolist()

    assert cut(0.5) == [1, 1, 0, 0]
    assert cut(0.2) == [1, 0, 0, 0]
    assert cut(0.95) == [1, 1, 1, 1]


@properties
@given(maps(), percentages, st.integers(1, 4))
def test_the_mask_is_enlarged_in_blocks(m: Maps, top_k: float, factor: int) -> None:
    height, width = m.occlusion.shape[2:]
    size = (height * factor, width * factor)
    enlarged = priority_mask(m.occlusion, m.background, top_k=top_k, size=size)
    blocks = m.mask(top_k).repeat_interleave(factor, 2).repeat_interleave(factor, 3)
    assert torch.equal(enlarged, blocks)


def test_enlargement_by_a_broken_factor_stays_binary() -> None:
    m = Maps(torch.tensor([[[[0.1, 0.9, 0.2]]]]), torch.zeros(1, 1, 1, 3))
    mask = priority_mask(m.occlusion, m.background, top_k=67.0, size=(2, 5))
    assert mask[0, 0].tolist() == [[0, 0, 1, 1, 0]] * 2


# CutMix


def box(area_ratio: float, x: float = 0.5, y: float = 0.5, invert: float = 0.9) -> Tensor:
    """The mask of one sample at 64x48 pixels."""
    return cutmix_mask(torch.tensor([[area_ratio, x, y, invert]]), (64, 48))[0, 0]


@properties
@given(st.tuples(*[st.floats(0, 1, exclude_max=True, width=32)] * 4))
def test_cutmix_mask_is_a_box_or_its_inverse(uniform: tuple[float, float, float, float]) -> None:
    mask = box(*uniform)
    assert ((mask == 0) | (mask == 1)).all()
    inside = (mask == 1) if uniform[3] < 0.5 else (mask == 0)
    rows, columns = inside.any(1), inside.any(0)
    assert torch.equal(inside, rows[:, None] & columns)
    for line in (rows, columns):  # without gaps
        assert (line.int().diff() == 1).sum() <= 1


@pytest.mark.parametrize("ratio", [0.0, 0.25, 0.75, 0.96])
def test_cutmix_box_has_side_root_one_minus_lambda(ratio: float) -> None:
    inside = box(ratio) == 0
    side = (1 - ratio) ** 0.5
    assert abs(int(inside.any(1).sum()) - side * 64) <= 1
    assert abs(int(inside.any(0).sum()) - side * 48) <= 1


def test_cutmix_box_is_centred_and_clipped() -> None:
    inside = box(0.75, x=0.25, y=0.0) == 0
    rows, columns = inside.any(1).nonzero(), inside.any(0).nonzero()
    assert (rows.min().item(), rows.max().item()) == (0, 15)  # half of the 32 are outside
    assert (columns.min().item(), columns.max().item()) == (0, 23)  # around column 12


def test_cutmix_inverts_below_one_half() -> None:
    assert torch.equal(box(0.3, invert=0.49), 1 - box(0.3, invert=0.5))


def test_cutmix_draws_a_mask_for_each_sample() -> None:
    one, other = [0.5, 0.2, 0.2, 0.9], [0.5, 0.8, 0.8, 0.9]
    masks = cutmix_mask(torch.tensor([one, other]), (16, 16))
    assert masks.shape == (2, 1, 16, 16)
    assert not torch.equal(masks[0], masks[1])


# Mixing


def test_mix_with_ones_is_real_and_with_zeros_is_fake() -> None:
    real, fake = torch.rand(2, 3, 4, 4), torch.rand(2, 3, 4, 4)
    assert torch.equal(mix(real, fake, torch.ones(2, 1, 4, 4)), real)
    assert torch.equal(mix(real, fake, torch.zeros(2, 1, 4, 4)), fake)


@properties
@given(st.integers(0, 2**31))
def test_mix_is_its_equation_and_swaps_with_the_mask(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    real, fake = torch.rand(2, 2, 3, 5, 5, generator=generator)
    mask = torch.randint(0, 2, (2, 1, 5, 5), generator=generator).float()
    mixed = mix(real, fake, mask)
    assert torch.equal(mixed, mask * real + (1 - mask) * fake)
    assert torch.equal(mixed, mix(fake, real, 1 - mask))


def test_masked_values_do_not_leak() -> None:
    mask = torch.tensor([[[[1.0, 0.0]]]])
    real, fake = torch.tensor([[[[0.5, torch.nan]]]]), torch.tensor([[[[torch.inf, 0.25]]]])
    assert mix(real, fake, mask).tolist() == [[[[0.5, 0.25]]]]


def test_swap_inverts_the_samples_that_are_drawn() -> None:
    mask = torch.randint(0, 2, (3, 1, 4, 4)).float()
    uniform = torch.tensor([0.1, 0.3, 0.9])
    assert torch.equal(swap_roles(mask, uniform, 0.0), mask)
    assert torch.equal(swap_roles(mask, uniform, 1.0), 1 - mask)
    swapped = swap_roles(mask, uniform, 0.3)
    assert torch.equal(swapped[:1], 1 - mask[:1])
    assert torch.equal(swapped[1:], mask[1:])


@pytest.mark.parametrize("kind", ["priority", "cutmix"])
def test_mixing_mask_is_of_the_configured_kind(kind: str) -> None:
    keypoints = Keypoints(torch.zeros(2, 3, 2))
    animation = Animation(
        prediction=torch.rand(2, 3, 16, 16),
        occlusion_map=torch.sigmoid(torch.randn(2, 1, 8, 8, requires_grad=True)),
        background_mask=torch.sigmoid(torch.randn(2, 1, 8, 8, requires_grad=True)),
        source_keypoints=keypoints,
        driving_keypoints=keypoints,
    )
    uniform = torch.rand(2, 5)
    mask = mixing_mask(
        animation,
        uniform,
        mask=kind,
        top_k=30.0,
        background_threshold=0.4,
        swap_prob=1.0,
    )
    priority = priority_mask(
        animation.occlusion_map,
        animation.background_mask,
        top_k=30.0,
        size=(16, 16),
        background_threshold=0.4,
    )
    expected = priority if kind == "priority" else cutmix_mask(uniform[:, :4], (16, 16))
    assert torch.equal(mask, 1 - expected)
    assert not mask.requires_grad


# When


def test_mixing_probability_ramps_up_and_stays() -> None:
    ramp = [mix_probability(n, mix_prob=0.5, warmup_samples=100) for n in (0, 50, 100, 1000)]
    assert ramp == [0.0, 0.25, 0.5, 0.5]
    assert mix_probability(0, mix_prob=0.5, warmup_samples=0) == 0.5
