"""Random numbers and permutations that are computed at any position, without what comes before.

Everything is a function of a 64-bit key, and works on arrays element by element. Random numbers are
those of SplitMix64 (Steele, Lea and Flood, "Fast splittable pseudorandom number generators", 2014),
which are a hash of key and position. Permutations are Feistel networks on a grid (Black and
Rogaway, "Ciphers with arbitrary finite domains", 2002): a position is a pair (row, column), and
each round adds a hash of the one to the other. The grid may have a few cells too many; positions
that land on one of those are permuted again ("cycle walking").
"""

import hashlib
from typing import TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

Numbers: TypeAlias = NDArray[np.uint64]

ROUNDS = 10
"""As many as NIST SP 800-38G recommends for small domains (FF1)."""
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_FIRST, _SECOND = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)


def key_of(*facts: object) -> int:
    """Hash facts to a key."""
    return int.from_bytes(hashlib.sha256(repr(facts).encode()).digest()[:8], "big")


def random_bits(key: ArrayLike, number: ArrayLike) -> Numbers:
    """Return 64 random bits for each number of a key: ``uint64``, of the arguments' shape.

    The results may be keys in turn.
    """
    bits = _numbers(key) + (_numbers(number) + np.uint64(1)) * _GOLDEN
    bits = (bits ^ (bits >> np.uint64(30))) * _FIRST
    bits = (bits ^ (bits >> np.uint64(27))) * _SECOND
    mixed: Numbers = bits ^ (bits >> np.uint64(31))
    return mixed


def random_fractions(key: ArrayLike, number: ArrayLike) -> NDArray[np.float64]:
    """Return a random number in [0, 1) for each number of a key."""
    return (random_bits(key, number) >> np.uint64(11)).astype(np.float64) * np.float64(2.0**-53)


def permuted(key: ArrayLike, length: ArrayLike, position: ArrayLike) -> Numbers:
    """Return what a random permutation of 0, 1, ..., length - 1 has at each position.

    Args:
        key: of the permutation; an array permutes each position by a key of its own.
        length: 1 or more, alike.
        position: 0 or more, and less than the length.
    """
    keys, lengths, places = np.broadcast_arrays(
        *(_numbers(given) for given in (key, length, position))
    )
    places = _one_pass(keys, lengths, places)
    while (outside := places >= lengths).any():
        places[outside] = _one_pass(keys[outside], lengths[outside], places[outside])
    return places


def _one_pass(keys: Numbers, lengths: Numbers, places: Numbers) -> Numbers:
    columns = np.ceil(np.sqrt(lengths)).astype(np.uint64)
    rows = (lengths + columns - np.uint64(1)) // columns
    row, column = np.divmod(places, columns)
    for number in range(0, ROUNDS, 2):
        row = (row + random_bits(random_bits(keys, number), column) % rows) % rows
        column = (column + random_bits(random_bits(keys, number + 1), row) % columns) % columns
    return row * columns + column


def _numbers(given: ArrayLike) -> Numbers:
    """Convert to an array of one dimension or more: scalars would warn of an overflow."""
    return np.atleast_1d(np.asarray(given, np.uint64))
