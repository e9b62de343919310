"""An endless, repeatable stream of frame pairs, sliced by rank.

Samples are numbered 0, 1, 2, ... for a whole run. What sample ``n`` holds (clip, two frames,
augmentation) is a function of the seed, the data set's fingerprint and ``n`` alone. Ranks and
loader workers only divide the numbers among themselves, so any number of them sees the same
order, and "samples consumed" is all there is to save and resume.
"""

import functools
import hashlib
import itertools
import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Int64, UInt8
from numpy.typing import NDArray
from torch import Tensor

from prioritycut_ray.data.cache import ClipCache
from prioritycut_ray.data.loader import Decoding, load, unwatched
from prioritycut_ray.data.shards import (
    Clip,
    ClipIndex,
    ShardError,
    clips_of,
    is_whole,
    read_clip,
    were_seen,
)
from prioritycut_ray.errors import DataError, UserError
from prioritycut_ray.video.random_access import DEFAULT_DECODER, check_decoder, read_frames
from prioritycut_ray.video.source import VideoError

log = logging.getLogger(__name__)

# This many damaged clips in a row are no accident: the data set is broken.
MOST_SUBSTITUTES = 8


class Batch(NamedTuple):
    """One rank's part of a global batch; its frames lie channels last, as decoded.

    Attributes:
        source: RGB in 0..255.
        driving: RGB in 0..255; another frame of the same clip, if it has two.
        augment_seeds: one a sample, 0 or more; each decides the sample's augmentation.
    """

    source: UInt8[Tensor, "B 3 H W"]
    driving: UInt8[Tensor, "B 3 H W"]
    augment_seeds: Int64[Tensor, " B"]


class Damage(NamedTuple):
    """A clip that could not be used, and why."""

    clip: str
    reason: str


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


class FramePairs:
    """The stream over one split of a data set.

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
        pairs_per_visit: int = 1,
        decoder: str = DEFAULT_DECODER,
        cache: ClipCache | None = None,
        known: ClipIndex | None = None,
        replay: float = 0.0,
    ) -> None:
        """Describe the stream; no shard is opened yet.

        Args:
            url: the folder of the data set.
            index: its index.
            split: which clips to use.
            size: side of the frames in pixels; best the size that the clips were packed at.
            seed: 0 or more.
            num_repeats: how often an epoch visits each clip, on average.
            pairs_per_visit: samples in a row from one clip, for one fetch and one opening of it.
            decoder: ``decord`` or ``pyav``.
            cache: where clips of a remote data set are kept.
            known: clips that an earlier model has seen; None treats all clips alike.
            replay: share of an epoch that shows known clips; the rest shows new ones.

        Raises:
            UserError: if the split has no clips, or the decoder or the cache cannot be used.
        """
        check_decoder(decoder)
        if cache is not None:
            cache.check()
        # The order of the shards must not matter.
        self.clips = sorted(clips_of(index, split), key=lambda clip: clip.key)
        self.url = url
        self.size = size
        self.num_repeats = num_repeats
        self.pairs_per_visit = pairs_per_visit
        self.decoder = decoder
        self.cache = cache
        self.entropy = (seed, int(index.fingerprint[:32], 16))
        self._visits = None if known is None else _visits(self.clips, known, num_repeats, replay)

    @property
    def epoch_length(self) -> int:
        """Samples in an epoch."""
        return len(self.clips) * self.num_repeats * self.pairs_per_visit

    def draw(self, number: int) -> Draw:
        """Decide sample ``number``, without reading anything."""
        visits = len(self.clips) * self.num_repeats
        epoch, position = divmod(number // self.pairs_per_visit, visits)
        order = _epoch_order(self.entropy, epoch, visits)
        clips = _next_distinct(order, position, len(self.clips), self._visits)
        rng = _generator(self.entropy, "sample", number)
        first, second = rng.random(2).tolist()
        return Draw(clips, (first, second), int(rng.integers(2**63)))

    def read(
        self,
        numbers: Sequence[int],
        avoid: Mapping[int, str] | None = None,
        decoding: Decoding = unwatched,
    ) -> tuple[Batch, list[Damage]]:
        """Read samples.

        A damaged clip is replaced by the next one of the epoch's order.

        Args:
            numbers: of the samples, from 0, at least one.
            avoid: positions of clips to treat as damaged, with the reason.
            decoding: given the position of a clip, what it is decoded within.

        Returns:
            The samples, and what was damaged, once for each sample that it was drawn for.

        Raises:
            DataError: if all clips that could stand in are damaged too.
            UserError: if the storage fails.
        """
        draws = [self.draw(number) for number in numbers]
        pictures = torch.empty((2, len(draws), self.size, self.size, 3), dtype=torch.uint8)
        damage: list[Damage] = []
        done = 0
        # Neighbours of one visit name the same clips, and are read together.
        for _, group in itertools.groupby(draws, key=lambda draw: draw.clips):
            visit = list(group)
            frames, missed = self._read_visit(visit, avoid or {}, decoding)
            shown = torch.from_numpy(frames).view(len(visit), 2, self.size, self.size, 3)
            pictures[:, done : done + len(visit)] = shown.transpose(0, 1)
            damage += missed * len(visit)
            done += len(visit)
        seeds = torch.tensor([draw.augment_seed for draw in draws], dtype=torch.int64)
        source, driving = pictures.permute(0, 1, 4, 2, 3)
        return Batch(source, driving, seeds), damage

    def _read_visit(
        self, visit: Sequence[Draw], avoid: Mapping[int, str], decoding: Decoding
    ) -> tuple[NDArray[np.uint8], list[Damage]]:
        """Read the frames of draws of one clip, ``uint8 [2 len(visit), size, size, 3]``."""
        damage: list[Damage] = []
        for position in visit[0].clips:
            clip = self.clips[position]
            if position in avoid:
                damage.append(Damage(clip.key, avoid[position]))
                continue
            indices = [index for draw in visit for index in two_frames(draw.places, clip.frames)]
            try:
                data = self._fetch(clip)
                with decoding(position):
                    return read_frames(data, indices, self.size, self.decoder), damage
            except (ShardError, VideoError) as error:
                damage.append(Damage(clip.key, str(error)))
        raise DataError(
            f"{self.url}: {len(damage)} clips in a row cannot be read (the last: "
            f"{damage[-1].clip!r}: {damage[-1].reason}); restore the data set or pack it anew"
        )

    def _fetch(self, clip: Clip) -> bytes:
        """Get the verified bytes of a clip, from the cache if they are there."""
        if self.cache is None:
            return read_clip(self.url, clip)
        data = self.cache.get(clip.sha256)
        if data is None or not is_whole(data, clip):
            data = read_clip(self.url, clip)
            self.cache.put(clip.sha256, data)
        return data


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
    pairs: FramePairs,
    *,
    start: int,
    stop: int,
    global_batch: int,
    rank: int,
    world_size: int,
    loader_workers: int,
    pin_for: torch.device | None = None,
) -> Iterator[Batch]:
    """Iterate over one rank's share of the global batches from ``start`` to ``stop``.

    Global batch ``b`` is the samples from ``start + b G``; rank ``r`` of ``W`` gets the ``r``-th
    of its ``W`` equal parts. Only whole batches are given, so every rank gets equally many.

    Args:
        pairs: the stream.
        start: first sample number; what it costs to begin does not depend on it.
        stop: sample number to end before.
        global_batch: samples G in a batch over all ranks.
        rank: of this process, from 0.
        world_size: number of ranks W.
        loader_workers: processes that read ahead; 0 reads in this one.
        pin_for: the GPU that the batches go to; those of loader workers lie in pinned memory then.

    Yields:
        Batches of G / W samples.

    Raises:
        UserError: if G cannot be divided by W; from the iterator, if the data cannot be read.
    """
    if global_batch % world_size:
        raise UserError(
            f"a global batch of {global_batch} cannot be shared by {world_size} workers: "
            f"choose a multiple of {world_size}"
        )
    share = global_batch // world_size
    firsts = range(start + rank * share, stop - global_batch + 1 + rank * share, global_batch)
    name_of = lambda position: pairs.clips[position].key  # noqa: E731
    shares = _Shares(firsts, share)
    return _told(pairs, load(pairs.read, shares, loader_workers, name_of, pin_for=pin_for))


def _told(pairs: FramePairs, loaded: Iterator[tuple[Batch, list[Damage]]]) -> Iterator[Batch]:
    """Pass batches on, with a warning of what was damaged."""
    total = 0
    clips: set[str] = set()
    for batch, damage in loaded:
        for clip, reason in damage:
            total += 1
            clips.add(clip)
            # At 1, 2, 4, 8, ...: a broken shard must not flood the log.
            if total & (total - 1) == 0:
                log.warning(
                    "%s: clip %s is replaced by another one: %s (%d so far, of %d clips)",
                    pairs.url,
                    clip,
                    reason,
                    total,
                    len(clips),
                )
        yield batch


class _Shares(Sequence[Sequence[int]]):
    """The sample numbers of each of a rank's batches."""

    def __init__(self, firsts: range, share: int) -> None:
        self._firsts, self._share = firsts, share

    def __getitem__(self, place: int) -> range:  # type: ignore[override]
        first = self._firsts[place]
        return range(first, first + self._share)

    def __len__(self) -> int:
        return len(self._firsts)


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
    seen = were_seen(clips, known)
    old = [place for place, is_old in enumerate(seen) if is_old]
    new = [place for place, is_old in enumerate(seen) if not is_old]
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
