"""Damaged copies of clips: cut off, with flipped bits, or with ranges of zeros."""

import random
from collections.abc import Sequence


def mutants(clips: Sequence[bytes], count: int) -> list[bytes]:
    """Return ``count`` damaged copies, always the same ones."""
    rng = random.Random(0)
    kinds = (_cut, _flipped, _zeroed)
    return [
        kinds[number % 3](bytearray(clips[number // 3 % len(clips)]), rng)
        for number in range(count)
    ]


def _cut(data: bytearray, rng: random.Random) -> bytes:
    return bytes(data[: rng.randrange(len(data))])


def _flipped(data: bytearray, rng: random.Random) -> bytes:
    # The first thousand bytes are the index of a small clip, where damage does the most.
    end = rng.choice([1000, len(data)])
    for _ in range(rng.choice([1, 3, 10, 100])):
        data[rng.randrange(end)] ^= 1 << rng.randrange(8)
    return bytes(data)


def _zeroed(data: bytearray, rng: random.Random) -> bytes:
    start = rng.randrange(len(data))
    length = min(rng.choice([1, 16, 256, 4096]), len(data) - start)
    data[start : start + length] = bytes(length)
    return bytes(data)
