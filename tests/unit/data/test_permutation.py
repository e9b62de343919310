"""Keyed permutations are permutations, of any size, and look random; random numbers do too."""

import itertools

import numpy as np
import pytest

from prioritycut_ray.data.permutation import key_of, permuted, random_bits, random_fractions


def test_every_position_of_every_size_is_hit_once() -> None:
    """All sizes from 1 to 2000, in one call: two million positions."""
    sizes = np.arange(1, 2001)
    lengths = np.repeat(sizes, sizes)
    firsts = np.repeat(np.cumsum(sizes) - sizes, sizes)
    positions = np.arange(sizes.sum()) - firsts
    images = permuted(7, lengths, positions).astype(np.int64)
    assert (images < lengths).all()
    assert np.bincount(images + firsts, minlength=sizes.sum()).max() == 1


@pytest.mark.parametrize("length", [10**7, 750_000_000, 2**40 + 1, 10**15])
def test_long_permutations_do_not_repeat_a_value(length: int) -> None:
    for first in (0, length // 2, length - 100_000):
        images = permuted(key_of(length), length, np.arange(first, first + 100_000))
        assert len(np.unique(images)) == 100_000
        assert images.max() < length
        # Spread over the whole range.
        assert np.abs(images.mean() / length - 0.5) < 0.01


def test_a_position_alone_gives_what_it_gives_in_company() -> None:
    keys, lengths, positions = np.array([1, 2, 3]), np.array([5, 1000, 77]), np.array([4, 500, 0])
    together = permuted(keys, lengths, positions)
    alone = [permuted(*one)[0] for one in zip(keys, lengths, positions, strict=True)]
    assert together.tolist() == alone


@pytest.mark.parametrize("length", [2, 3, 5, 7, 12, 30])
def test_every_image_of_every_position_is_equally_likely(length: int) -> None:
    keys = np.repeat(random_bits(1, np.arange(6000)), length)
    images = permuted(keys, length, np.tile(np.arange(length), 6000)).reshape(6000, length)
    expected = 6000 / length
    for position in range(length):
        counts = np.bincount(images[:, position].astype(int), minlength=length)
        # Chi-squared, more than six deviations above its mean for a fair one.
        assert ((counts - expected) ** 2 / expected).sum() < length + 6 * (2 * length) ** 0.5


def test_every_order_of_four_is_equally_likely() -> None:
    keys = np.repeat(random_bits(2, np.arange(12_000)), 4)
    images = permuted(keys, 4, np.tile(np.arange(4), 12_000)).reshape(-1, 4)
    orders = [tuple(row) for row in images.tolist()]
    counts = [orders.count(order) for order in itertools.permutations(range(4))]
    assert ((np.array(counts) - 500) ** 2 / 500).sum() < 23 + 6 * 46**0.5


def test_neighbours_are_not_kept_together() -> None:
    images = permuted(3, 100_000, np.arange(100_000)).astype(np.int64)
    positions = np.arange(100_000)
    assert abs(np.corrcoef(positions, images)[0, 1]) < 0.02
    assert abs(np.corrcoef(images[:-1], images[1:])[0, 1]) < 0.02
    assert (np.abs(np.diff(images)) == 1).sum() < 20


def test_random_numbers_are_known_ones_and_uniform() -> None:
    # The first outputs of SplitMix64 for the seed 1234567, as published with its implementations.
    expected = [6457827717110365317, 3203168211198807973, 9817491932198370423]
    assert random_bits(1234567, np.arange(3)).tolist() == expected
    fractions = random_fractions(5, np.arange(100_000))
    assert fractions.min() >= 0
    assert fractions.max() < 1
    counts = np.histogram(fractions, 100, (0, 1))[0]
    assert ((counts - 1000) ** 2 / 1000).sum() < 99 + 6 * 198**0.5


def test_keys_tell_facts_apart() -> None:
    keys = {key_of(1, "a"), key_of(1, "b"), key_of(2, "a"), key_of("1", "a")}
    assert len(keys) == 4
    assert all(0 <= key < 2**64 for key in keys)
