"""Which identities are for training and which for tests, and warnings of what is missing."""

import hashlib
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from prioritycut_ray.data.shards import (
    Clip,
    ClipIndex,
)
from prioritycut_ray.errors import UserError
from prioritycut_ray.packing.clips import (
    Outcome,
    Segment,
)
from prioritycut_ray.packing.entries import Entry

TEST_SHARE = 0.1


class PackedClip(NamedTuple):
    """A clip to write: where it comes from, and which of its part's segments it is."""

    entry: Entry
    outcome: Outcome
    number: int

    @property
    def segment(self) -> Segment:
        """Where the clip lies in its video."""
        return self.outcome.segments[self.number]

    @property
    def name(self) -> str:
        """What its key is made of."""
        frames = self.entry.frames
        part = "" if frames is None else f"_{frames.start}-{frames.end or 'end'}"
        alone = len(self.outcome.segments) == 1
        return f"{self.entry.name}{part}" + ("" if alone else f"_{self.number:04d}")


def assign_splits(entries: Sequence[Entry], base: Sequence[Clip] = ()) -> list[str]:
    """Choose a split for every entry: its identity's in the data set, the manifest's, or a new one.

    A tenth of all identities (at least one, if there are two) is for ``test``: the first of those
    that have no split yet, in the order of their SHA-256, until there are enough; the others are
    ``train``.

    Args:
        entries: the videos.
        base: the clips of the data set that they are added to.
    """
    old = _splits_of(base)
    known = {entry.identity: entry.split for entry in reversed(entries) if entry.split}
    known |= {identity: splits[0] for identity, splits in old.items()}
    free = sorted({e.identity for e in entries} - set(known), key=_digest)
    everyone = len({*free, *old})
    wanted = max(1, round(TEST_SHARE * everyone)) if everyone > 1 else 0
    tests = max(0, wanted - sum("test" in splits for splits in old.values()))
    default = {name: "test" if rank < tests else "train" for rank, name in enumerate(free)}

    def choose(entry: Entry) -> str:
        # Where an identity is in both already, the manifest may go on to say which.
        if entry.split and not _is_elsewhere(entry, old):
            return entry.split
        if entry.split and entry.by_name:
            raise UserError(
                f"{entry.shown}: belongs to {entry.split}, but its identity {entry.identity!r}, "
                f"taken from its file name, is already in {' and '.join(old[entry.identity])}; set "
                "its identity in a manifest, or append the parent folder"
            )
        return (known | default)[entry.identity]

    return [choose(entry) for entry in entries]


def _splits_of(clips: Sequence[Clip]) -> dict[str, list[str]]:
    """List the splits of each identity, in the order of the clips."""
    splits: dict[str, list[str]] = defaultdict(list)
    for clip in clips:
        if clip.split not in splits[clip.identity]:
            splits[clip.identity].append(clip.split)
    return splits


def _is_elsewhere(entry: Entry, old: Mapping[str, Sequence[str]]) -> bool:
    """Whether an identity is in the data set, but in another split than its entry names."""
    return entry.identity in old and entry.split not in old[entry.identity]


def _digest(identity: str) -> str:
    return hashlib.sha256(identity.encode()).hexdigest()


def split_warnings(new: Sequence[PackedClip], base: ClipIndex | None) -> list[str]:
    """Warn of entries whose split differs from that of their identity in the data set."""
    old = _splits_of(base.clips if base else ())
    entries = [clip.entry for clip in new]
    warnings = [
        f"identity {identity!r} stays in {' and '.join(old[identity])}, where its other clips are"
        for identity in sorted({e.identity for e in entries if e.split and _is_elsewhere(e, old)})
    ]
    if alike := sorted({e.identity for e in entries if e.by_name} & {*old}):
        warnings.append(
            f"{len(alike)} identities taken from file names are already in the data set "
            f"({', '.join(alike[:3])}); if they are others, set identities in a manifest"
        )
    return warnings


def shared_identities(index: ClipIndex, entries: Sequence[Entry]) -> list[str]:
    """Warn of identities that are in both splits."""
    say = "the manifest says" if any(entry.row for entry in entries) else "the folders say"
    return [
        f"identity {identity!r} is in {' and '.join(sorted(splits))}, as {say}"
        for identity, splits in sorted(_splits_of(index.clips).items())
        if len(splits) > 1
    ]


def missing_splits(index: ClipIndex) -> list[str]:
    """Warn of the splits that training and evaluation would miss."""
    splits = {clip.split for clip in index.clips}
    return [
        f"no clip is in the {split!r} split, which {use} by default; set splits in a manifest, "
        f"or put videos into a folder named {split}"
        for split, use in (("train", "training reads"), ("test", "evaluation reads"))
        if split not in splits
    ]
