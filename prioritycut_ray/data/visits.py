"""Which clip each visit of a training shows, computed for any visit by itself.

An *epoch* is a fixed number of places, which are visited in an order of its own
(:mod:`.permutation`). A place belongs to a *unit*, a clip or an identity, and units take turns.
"""

from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from prioritycut_ray.data.index import ClipIndex, Clips, identity_starts, were_seen
from prioritycut_ray.data.permutation import Numbers, key_of, permuted, random_bits

# More damaged clips in a row are not an accident: the data set is broken.
MOST_SUBSTITUTES = 8

VisitBy = Literal["clip", "identity"]


class Visits:
    """The visits to the clips of one split, numbered from 0 for a whole run.

    Attributes:
        per_epoch: number of visits in an epoch.
    """

    def __init__(
        self,
        clips: Clips,
        entropy: tuple[int, str],
        *,
        by: VisitBy,
        num_repeats: int,
        known: ClipIndex | None = None,
        replay: float = 0.0,
    ) -> None:
        """Set up the visits.

        Args:
            clips: of the split.
            entropy: the seed and the fingerprint of the data set.
            by: whether all clips, or all identities, are visited equally often.
            num_repeats: visits of each of them in an epoch, on average.
            known: index of the clips that an earlier model has seen; None treats all clips alike.
            replay: share of an epoch for known clips; the rest is for new ones.
        """
        whole = _pool(clips, None, by, num_repeats)
        self.per_epoch = whole.units * num_repeats
        self._pools = [whole._replace(places=self.per_epoch)]
        if known is not None:
            seen = were_seen(clips, known)
            old, new = (np.flatnonzero(rows).astype(np.uint32) for rows in (seen, ~seen))
            if len(old) and len(new):
                replayed = round(self.per_epoch * replay)
                self._pools = [
                    _pool(clips, old, by, replayed),
                    _pool(clips, new, by, self.per_epoch - replayed),
                ]
        self._order = key_of(*entropy, "order")
        self._turns = key_of(*entropy, "turns")
        self._substitutes = key_of(*entropy, "substitutes")

    def clips(self, visits: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the position of the clip that each visit shows."""
        epochs, places = self._places(visits)
        found = np.empty(len(visits), np.int64)
        first = 0
        for number, pool in enumerate(self._pools):
            inside = (places >= first) & (places < first + pool.places)
            if inside.any():
                # Turns go on from epoch to epoch, so that no unit is left out if places are few.
                turns = epochs[inside] * pool.places + (places[inside] - first)
                found[inside] = pool.clips(turns, random_bits(self._turns, number))
            first += pool.places
        return found

    def substitutes(self, visit: int) -> list[int]:
        """Return the positions of clips that may replace the one of a visit, in order.

        They are drawn at random for each visit, without repetition. With ``known``, clips of the
        same kind come first.
        """
        [shown] = self.clips(np.array([visit])).tolist()
        [place] = self._places(np.array([visit]))[1].tolist()
        pools = [pool for pool in self._pools if pool.places]
        if len(pools) > 1 and place >= pools[0].places:
            pools.reverse()
        key = random_bits(self._substitutes, visit)
        drawn = np.concatenate([pool.sample(key, MOST_SUBSTITUTES + 1) for pool in pools])
        return [clip for clip in drawn.tolist() if clip != shown][:MOST_SUBSTITUTES]

    def _places(self, visits: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return the epoch of each visit, and its place in that."""
        epochs, positions = np.divmod(visits, self.per_epoch)
        places = permuted(random_bits(self._order, epochs), self.per_epoch, positions)
        return epochs, places.astype(np.int64)


class _Pool(NamedTuple):
    """Clips that share a number of places in every epoch.

    Attributes:
        places: their number.
        rows: positions of the clips in the split; None if they are all.
        size: number of clips.
        starts: where each identity begins in the rows, and their number; None to visit by clip.
    """

    places: int
    rows: NDArray[np.uint32] | None
    size: int
    starts: NDArray[np.int64] | None

    @property
    def units(self) -> int:
        """Number of clips, or of identities, that take turns."""
        return self.size if self.starts is None else len(self.starts) - 1

    def clips(self, turns: NDArray[np.int64], key: Numbers) -> NDArray[np.int64]:
        """Return the position of the clip that is shown at each turn of the pool."""
        rounds, units = np.divmod(turns, self.units)
        if self.starts is None:
            return self._positions(units)
        # Each identity shows all of its clips before one of them again, in an order of its own.
        begin, end = self.starts[units], self.starts[units + 1]
        times, nth = np.divmod(rounds, end - begin)
        order = permuted(random_bits(random_bits(key, units), times), end - begin, nth)
        return self._positions(begin + order.astype(np.int64))

    def sample(self, key: Numbers, count: int) -> NDArray[np.int64]:
        """Draw different clips at random."""
        drawn = permuted(key, self.size, np.arange(min(count, self.size)))
        return self._positions(drawn.astype(np.int64))

    def _positions(self, members: NDArray[np.int64]) -> NDArray[np.int64]:
        return members if self.rows is None else self.rows[members].astype(np.int64)


def _pool(clips: Clips, rows: NDArray[np.uint32] | None, by: VisitBy, places: int) -> _Pool:
    size = len(clips) if rows is None else len(rows)
    if by == "clip":
        return _Pool(places, rows, size, None)
    codes = clips.values("identity")
    starts = identity_starts(codes if rows is None else codes[rows])
    return _Pool(places, rows, size, np.append(starts, size))
