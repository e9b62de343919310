"""An endless, reproducible stream of frame pairs, sliced by rank.

Samples are numbered 0, 1, 2, ... for a whole run. What sample ``n`` contains (clip, two frames,
augmentation) is a function of the seed, the data set's fingerprint and ``n`` only. Ranks and
loader workers just divide the numbers among themselves, so the order is the same for any number
of them, and "samples consumed" is the whole state to save and resume.
"""

import itertools
import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Int64, UInt8
from numpy.typing import NDArray
from torch import Tensor

from prioritycut_ray.config import DEFAULT_DECODER
from prioritycut_ray.data.cache import ClipCache
from prioritycut_ray.data.index import ClipIndex, clips_of
from prioritycut_ray.data.loader import Decoding, load, unwatched
from prioritycut_ray.data.permutation import key_of, random_bits, random_fractions
from prioritycut_ray.data.shards import Clip, ShardError, is_whole, read_clip
from prioritycut_ray.data.visits import VisitBy, Visits
from prioritycut_ray.errors import DataError, UserError
from prioritycut_ray.video.random_access import check_decoder, read_frames
from prioritycut_ray.video.source import VideoError

log = logging.getLogger(__name__)


class Batch(NamedTuple):
    """One rank's part of a global batch; its frames are in channels-last memory, as decoded.

    Attributes:
        source: RGB in 0..255.
        driving: RGB in 0..255; another frame of the same clip, if it has two.
        augment_seeds: one per sample, 0 or more; each determines the sample's augmentation.
    """

    source: UInt8[Tensor, "B 3 H W"]
    driving: UInt8[Tensor, "B 3 H W"]
    augment_seeds: Int64[Tensor, " B"]


class Damage(NamedTuple):
    """A clip that cannot be used, and why."""

    clip: str
    reason: str


class Draw(NamedTuple):
    """What a sample's number determines.

    Attributes:
        visit: number of the visit to a clip.
        clip: position of the clip; :meth:`FramePairs.substitutes` gives those that may replace it.
        places: of source and driving in [0, 1); :func:`two_frames` gives their frame numbers.
        augment_seed: 0 or more.
    """

    visit: int
    clip: int
    places: tuple[float, float]
    augment_seed: int


class FramePairs:
    """The stream over one split of a data set.

    It keeps no file open, so it can be sent to other processes.
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
        visit: VisitBy = "clip",
        decoder: str = DEFAULT_DECODER,
        cache: ClipCache | None = None,
        known: ClipIndex | None = None,
        replay: float = 0.0,
    ) -> None:
        """Set up the stream; no shard is opened yet.

        Args:
            url: the folder of the data set.
            index: its index.
            split: which clips to use.
            size: side of the frames in pixels; ideally the size at which the clips were packed.
            seed: 0 or more.
            num_repeats: how often an epoch visits each clip or identity, on average.
            pairs_per_visit: consecutive samples from a clip, fetched and opened once.
            visit: whether all clips, or all identities, are visited equally often.
            decoder: ``decord``, ``pyav`` or ``torchcodec``.
            cache: for clips of a remote data set.
            known: index of the clips that an earlier model has seen; None treats all clips alike.
            replay: share of an epoch for known clips; the rest is for new ones.

        Raises:
            UserError: the split has no clips, or the decoder or the cache cannot be used.
        """
        check_decoder(decoder)
        if cache is not None:
            cache.check()
        self.clips = clips_of(index, split)
        self.url = url
        self.size = size
        self.pairs_per_visit = pairs_per_visit
        self.decoder = decoder
        self.cache = cache
        entropy = (seed, index.fingerprint)
        self._visits = Visits(
            self.clips, entropy, by=visit, num_repeats=num_repeats, known=known, replay=replay
        )
        self._keys = [key_of(*entropy, name) for name in ("source", "driving", "augmentation")]

    @property
    def epoch_length(self) -> int:
        """Number of samples in an epoch."""
        return self._visits.per_epoch * self.pairs_per_visit

    def draw(self, number: int) -> Draw:
        """Determine sample ``number`` without reading anything."""
        [drawn] = self.draws([number])
        return drawn

    def draws(self, numbers: Sequence[int]) -> list[Draw]:
        """Determine samples without reading anything."""
        given = np.array(numbers, np.int64)
        visits = given // self.pairs_per_visit
        source, driving, augmentation = self._keys
        columns = (
            visits,
            self._visits.clips(visits),
            random_fractions(source, given),
            random_fractions(driving, given),
            random_bits(augmentation, given) >> np.uint64(1),
        )
        rows = zip(*(column.tolist() for column in columns), strict=True)
        return [Draw(visit, clip, (one, two), seed) for visit, clip, one, two, seed in rows]

    def substitutes(self, draw: Draw) -> list[int]:
        """Return the positions of the clips that may replace the one drawn, in order."""
        return self._visits.substitutes(draw.visit)

    def read(
        self,
        numbers: Sequence[int],
        avoid: Mapping[int, str] | None = None,
        decoding: Decoding = unwatched,
    ) -> tuple[Batch, list[Damage]]:
        """Read samples.

        A damaged clip is replaced by another one, which the visit's number determines.

        Args:
            numbers: of the samples, from 0; at least one.
            avoid: positions of clips to treat as damaged, with the reason.
            decoding: context in which the clip at a position is decoded.

        Returns:
            The samples, and the damaged clips, once for each sample for which they were drawn.

        Raises:
            DataError: all substitutes are damaged too.
            UserError: the storage cannot be read.
        """
        draws = self.draws(numbers)
        pictures = torch.empty((2, len(draws), self.size, self.size, 3), dtype=torch.uint8)
        damage: list[Damage] = []
        done = 0
        # Consecutive samples of one visit have the same clip, and are read together.
        for _, group in itertools.groupby(draws, key=lambda draw: draw.visit):
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
        """Read the frames of all draws of a visit, ``uint8 [2 len(visit), size, size, 3]``."""
        damage: list[Damage] = []
        for position in self._candidates(visit[0]):
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
            f"{damage[-1].clip!r}: {damage[-1].reason}); restore the data set or pack it again"
        )

    def _candidates(self, draw: Draw) -> Iterator[int]:
        yield draw.clip
        yield from self.substitutes(draw)

    def _fetch(self, clip: Clip) -> bytes:
        """Return the verified bytes of a clip, from the cache if possible."""
        if self.cache is None:
            return read_clip(self.url, clip)
        name = clip.sha256 or f"{clip.shard} {clip.offset} {clip.size}"
        data = self.cache.get(name)
        if data is None or not is_whole(data, clip):
            data = read_clip(self.url, clip)
            self.cache.put(name, data)
        return data


def two_frames(places: tuple[float, float], frames: int) -> tuple[int, int]:
    """Turn two draws from [0, 1) into two frame numbers, distinct if there are two frames.

    The result is uniform over all ordered pairs of distinct frames.
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

    Global batch ``b`` consists of the ``G`` samples from ``start + b G``; rank ``r`` of ``W`` gets
    the ``r``-th of its ``W`` equal parts. Only complete batches are yielded, so all ranks get
    equally many.

    Args:
        pairs: the stream.
        start: first sample number; the start-up cost does not depend on it.
        stop: sample number to end before.
        global_batch: samples G in a batch over all ranks.
        rank: of this process, from 0.
        world_size: number of ranks W.
        loader_workers: processes that prefetch batches; 0 reads in this process.
        pin_for: the GPU to which the batches go; loader workers then use pinned memory.

    Yields:
        Batches of G / W samples.

    Raises:
        UserError: G is not a multiple of W; from the iterator: the data cannot be read.
    """
    if global_batch % world_size:
        raise UserError(
            f"a global batch of {global_batch} cannot be divided among {world_size} workers: "
            f"choose a multiple of {world_size}"
        )
    share = global_batch // world_size
    firsts = range(start + rank * share, stop - global_batch + 1 + rank * share, global_batch)
    loaded = load(
        pairs.read,
        _Shares(firsts, share),
        loader_workers,
        lambda position: pairs.clips[position].key,
        pin_for=pin_for,
    )
    return _log_damage(pairs, loaded)


def _log_damage(pairs: FramePairs, loaded: Iterator[tuple[Batch, list[Damage]]]) -> Iterator[Batch]:
    """Yield the batches, and log warnings about damaged clips."""
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
