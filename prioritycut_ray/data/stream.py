"""An endless, repeatable stream of frame pairs, sliced by rank.

Samples are numbered 0, 1, 2, ... for a whole run. What sample ``n`` holds (clip, two frames,
augmentation) is a function of the seed, the data set's fingerprint and ``n`` alone. Ranks and
loader workers only divide the numbers among themselves, so any number of them sees the same
order, and "samples consumed" is all there is to save and resume.
"""

import functools
import hashlib
import logging
import os
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Int64, UInt8
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from prioritycut_ray.data.shards import Clip, ClipIndex, ShardError, clips_of, read_clip
from prioritycut_ray.data.video import VideoError, read_frames
from prioritycut_ray.errors import DataError, UserError

log = logging.getLogger(__name__)

# This many damaged clips in a row are no accident: the data set is broken.
MOST_SUBSTITUTES = 8


class Sample(NamedTuple):
    """Two frames of one clip.

    Attributes:
        source: RGB in 0..255.
        driving: RGB in 0..255; another frame than the source, if the clip has two.
        number: the sample's number in the stream.
        augment_seed: decides the sample's augmentation; 0 or more.
    """

    source: UInt8[Tensor, "3 H W"]
    driving: UInt8[Tensor, "3 H W"]
    number: int
    augment_seed: int


class Batch(NamedTuple):
    """One rank's part of a global batch.

    Attributes:
        source: RGB in 0..255.
        driving: RGB in 0..255.
        augment_seeds: one a sample, 0 or more.
    """

    source: UInt8[Tensor, "B 3 H W"]
    driving: UInt8[Tensor, "B 3 H W"]
    augment_seeds: Int64[Tensor, " B"]


class Draw(NamedTuple):
    """What a sample's number decides.

    Attributes:
        clips: positions of the clip to use and, in their order, of those to use in its stead.
        places: of source and driving, in [0, 1): turned into frame numbers by :func:`two_frames`.
        augment_seed: 0 or more.
    """

    clips: list[int]
    places: tuple[float, float]
    augment_seed: int


class FramePairs(Dataset[Sample]):
    """The stream over one split of a data set: ``pairs[n]`` is sample ``n``, for any n from 0.

    It holds no open file, so it may be sent to other processes.
    """

    def __init__(
        self,
        url: str,
        index: ClipIndex,
        split: str,
        *,
        size: int,
        seed: int,
        num_repeats: int = 1,
        known: ClipIndex | None = None,
        replay: float = 0.0,
    ) -> None:
        """Describe the stream; nothing is opened yet.

        Args:
            url: the folder of the data set.
            index: its index.
            split: which clips to use.
            size: side of the frames in pixels; best the size that the clips were packed at.
            seed: 0 or more.
            num_repeats: how often an epoch shows each clip, on average.
            known: clips that an earlier model has seen; None treats all clips alike.
            replay: share of an epoch that shows known clips; the rest shows new ones.

        Raises:
            UserError: if the split has no clips.
        """
        # The order of the shards must not matter.
        self.clips = sorted(clips_of(index, split), key=lambda clip: clip.key)
        self.url = url
        self.size = size
        self.num_repeats = num_repeats
        self.entropy = (seed, int(index.fingerprint[:32], 16))
        self._visits = None if known is None else _visits(self.clips, known, num_repeats, replay)
        self._damaged = 0

    @property
    def epoch_length(self) -> int:
        """Samples in an epoch."""
        return len(self.clips) * self.num_repeats

    def draw(self, number: int) -> Draw:
        """Decide sample ``number``, without reading anything."""
        epoch, position = divmod(number, self.epoch_length)
        order = _epoch_order(self.entropy, epoch, self.epoch_length)
        clips = _next_distinct(order, position, len(self.clips), self._visits)
        rng = _generator(self.entropy, "sample", number)
        first, second = rng.random(2).tolist()
        return Draw(clips, (first, second), int(rng.integers(2**63)))

    def __getitem__(self, number: int) -> Sample:
        """Read sample ``number``.

        A damaged clip is replaced by the next one of the epoch's order, with a warning.

        Raises:
            DataError: if all clips that could stand in are damaged too.
        """
        draw = self.draw(number)
        for position in draw.clips:
            clip = self.clips[position]
            try:
                frames = self._read(clip, two_frames(draw.places, clip.frames))
            except (ShardError, VideoError) as error:
                self._warn(clip, error)
                continue
            source, driving = torch.from_numpy(frames).permute(0, 3, 1, 2).contiguous()
            return Sample(source, driving, number, draw.augment_seed)
        raise DataError(
            f"{self.url}: {len(draw.clips)} clips in a row cannot be read (the last: "
            f"{self.clips[draw.clips[-1]].key!r}); restore the data set or pack it anew"
        )

    def _read(self, clip: Clip, indices: Sequence[int]) -> NDArray[np.uint8]:
        """Fetch, verify and decode frames of one clip: ``uint8 [N, size, size, 3]``."""
        return read_frames(read_clip(self.url, clip), indices, self.size)

    def _warn(self, clip: Clip, error: UserError) -> None:
        self._damaged += 1
        # At 1, 2, 4, 8, ...: a broken shard must not flood the log.
        if self._damaged & (self._damaged - 1) == 0:
            log.warning(
                "clip %s is replaced by another one: %s (%d so far in process %d)",
                clip.key,
                error,
                self._damaged,
                os.getpid(),
            )


def two_frames(places: tuple[float, float], frames: int) -> tuple[int, int]:
    """Turn two draws from [0, 1) into two frame numbers, distinct if there are two frames.

    Both are uniform, and so is the pair over all ordered pairs of distinct frames.
    """
    source = int(places[0] * frames)
    if frames == 1:
        return 0, 0
    step = 1 + int(places[1] * (frames - 1))
    return source, (source + step) % frames


def batches(
    dataset: FramePairs,
    *,
    start: int,
    stop: int,
    global_batch: int,
    rank: int,
    world_size: int,
    loader_workers: int,
) -> Iterator[Batch]:
    """Iterate over one rank's share of the global batches from ``start`` to ``stop``.

    Global batch ``b`` is the samples from ``start + b G``; rank ``r`` of ``W`` gets the ``r``-th
    of its ``W`` equal parts. Only whole batches are given, so every rank gets equally many.

    Args:
        dataset: the stream.
        start: first sample number; what it costs to begin does not depend on it.
        stop: sample number to end before.
        global_batch: samples G in a batch over all ranks.
        rank: of this process, from 0.
        world_size: number of ranks W.
        loader_workers: processes that read ahead; 0 reads in this one.

    Yields:
        Batches of G / W samples, in pinned memory if there is a GPU.

    Raises:
        UserError: if G cannot be divided by W.
    """
    if global_batch % world_size:
        raise UserError(
            f"a global batch of {global_batch} cannot be shared by {world_size} workers: "
            f"choose a multiple of {world_size}"
        )
    share = global_batch // world_size
    whole = range(start, stop - global_batch + 1, global_batch)
    loader = DataLoader(
        dataset,
        batch_sampler=_Shares(whole, rank * share, share),
        num_workers=loader_workers,
        collate_fn=_collate,
        pin_memory=torch.cuda.is_available(),
        # Its own generator: else each iterator would draw from, and so shift, the global one.
        generator=torch.Generator(),
        # Fork: the package need not be imported again, which takes seconds in every process.
        multiprocessing_context="fork" if loader_workers else None,
    )
    return iter(loader)


class _Shares:
    """Lists the sample numbers of each of a rank's batches."""

    def __init__(self, starts: range, offset: int, share: int) -> None:
        self._starts, self._offset, self._share = starts, offset, share

    def __iter__(self) -> Iterator[list[int]]:
        for start in self._starts:
            first = start + self._offset
            yield list(range(first, first + self._share))

    def __len__(self) -> int:
        return len(self._starts)


def _collate(samples: list[Sample]) -> Batch:
    return Batch(
        source=torch.stack([sample.source for sample in samples]),
        driving=torch.stack([sample.driving for sample in samples]),
        augment_seeds=torch.tensor([sample.augment_seed for sample in samples], dtype=torch.int64),
    )


def _generator(entropy: tuple[int, int], purpose: str, number: int) -> np.random.Generator:
    # The purpose keeps epoch 5 and sample 5 apart.
    tag = int.from_bytes(hashlib.sha256(purpose.encode()).digest()[:4], "big")
    return np.random.default_rng([*entropy, tag, number])


@functools.lru_cache(maxsize=2)
def _epoch_order(entropy: tuple[int, int], epoch: int, length: int) -> NDArray[np.int64]:
    """Shuffle the places of an epoch: ``int64 [length]``; place p shows clip p mod clips."""
    return _generator(entropy, "epoch", epoch).permutation(length)


def _visits(
    clips: Sequence[Clip], known: ClipIndex, num_repeats: int, replay: float
) -> NDArray[np.int64]:
    """Which clip each place of an epoch shows: known and new ones in turn, by their shares."""
    seen = {(clip.key, clip.sha256) for clip in known.clips}
    old = [place for place, clip in enumerate(clips) if (clip.key, clip.sha256) in seen]
    new = [place for place in range(len(clips)) if place not in set(old)]
    length = len(clips) * num_repeats
    if not old or not new:
        return np.resize(np.array(old or new), length)
    replayed = round(length * replay)
    return np.concatenate([np.resize(old, replayed), np.resize(new, length - replayed)])


def _next_distinct(
    order: NDArray[np.int64], position: int, clips: int, visits: NDArray[np.int64] | None
) -> list[int]:
    """List the clip at a position, and the next other ones: those that may stand in for it."""
    found: list[int] = []
    for step in range(len(order)):
        place = int(order[(position + step) % len(order)])
        clip = place % clips if visits is None else int(visits[place])
        if clip not in found:
            found.append(clip)
        if len(found) > min(MOST_SUBSTITUTES, clips - 1):
            break
    return found
