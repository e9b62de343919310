"""Which videos are for training and which for tests, and warnings about what is missing."""

import hashlib
import re
from collections.abc import Mapping, Sequence

from prioritycut_ray.data.index import ClipIndex
from prioritycut_ray.errors import UserError
from prioritycut_ray.packing.entries import Entry
from prioritycut_ray.packing.folders import common_parts, path_parts
from prioritycut_ray.packing.manifest import SPLIT_NAMES

TEST_SHARE = 0.1


def split_by_folders(entries: Sequence[Entry], folders: Sequence[str]) -> list[Entry]:
    """Set missing splits from folders named ``train``, ``test`` and the like.

    The common folder of all inputs and the folders below it count, as does the name of a tar.

    Args:
        entries: the videos.
        folders: the folders that the inputs name.

    Raises:
        UserError: a video is in folders of several splits, or of none while others are.
    """
    above = max(0, len(common_parts(folders)) - 1)
    found = [entry.split or _folder_split(entry, above) for entry in entries]
    pairs = [*zip(entries, found, strict=True)]
    splits = {split for entry, split in pairs if not entry.split}
    if "" in splits and len(splits) > 1:
        stray = entries[found.index("")]
        raise UserError(
            f"{stray.shown}: is not in a split folder, but other videos are (in "
            f"{' and '.join(sorted(splits - {''}))}); move it into one of them, pack it "
            "separately, or set its split in a manifest"
        )
    return [entry._replace(split=split) for entry, split in pairs]


def _folder_split(entry: Entry, above: int) -> str:
    # Shards are often named after their split, with a number.
    parts = [re.sub(r"([-_.]?\d+)?\.tar$", "", part, flags=re.I) for part in path_parts(entry.path)]
    words = (part.casefold() for part in parts[above:-1])
    splits = sorted({SPLIT_NAMES[word] for word in words if word in SPLIT_NAMES})
    if len(splits) > 1:
        raise UserError(
            f"{entry.shown}: is in folders of several splits ({' and '.join(splits)}); set its "
            "split in a manifest"
        )
    return splits[0] if splits else ""


def assign_splits(
    entries: Sequence[Entry], old: Mapping[str, Sequence[str]] | None = None
) -> list[str]:
    """Choose a split for every entry: its identity's in the data set, the manifest's, or a new one.

    A tenth of all identities (at least one, if there are two) is for ``test``: of those that have
    no split yet, as many as are missing, in the order of their SHA-256. The others are ``train``.

    Args:
        entries: the videos.
        old: the splits of each identity in the data set to which they are added.
    """
    old = old or {}
    known = {entry.identity: entry.split for entry in reversed(entries) if entry.split}
    known |= {identity: splits[0] for identity, splits in old.items()}
    free = sorted({e.identity for e in entries} - set(known), key=_digest)
    everyone = len({*free, *old})
    wanted = max(1, round(TEST_SHARE * everyone)) if everyone > 1 else 0
    tests = max(0, wanted - sum("test" in splits for splits in old.values()))
    default = {name: "test" if rank < tests else "train" for rank, name in enumerate(free)}

    def choose(entry: Entry) -> str:
        # If an identity is in both already, the manifest may still choose.
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


def _is_elsewhere(entry: Entry, old: Mapping[str, Sequence[str]]) -> bool:
    """Return whether an identity is in the data set, but in another split than its entry names."""
    return entry.identity in old and entry.split not in old[entry.identity]


def _digest(identity: str) -> str:
    return hashlib.sha256(identity.encode()).hexdigest()


def split_warnings(entries: Sequence[Entry], base: ClipIndex | None) -> list[str]:
    """Warn of new entries whose split differs from that of their identity in the data set."""
    old = base.splits_of_identities() if base is not None else {}
    warnings = [
        f"identity {identity!r} stays in {' and '.join(old[identity])}, where its other clips are"
        for identity in sorted({e.identity for e in entries if e.split and _is_elsewhere(e, old)})
    ]
    if alike := sorted({e.identity for e in entries if e.by_name} & {*old}):
        warnings.append(
            f"{len(alike)} identities taken from file names are already in the data set "
            f"({', '.join(alike[:3])}); if they are different, set identities in a manifest"
        )
    return warnings


def shared_identities(index: ClipIndex, entries: Sequence[Entry]) -> list[str]:
    """Warn of identities that are in several splits."""
    say = "the manifest says" if any(entry.row for entry in entries) else "the folders say"
    if not (shared := index.shared_identities()):
        return []
    splits = index.splits_of_identities()
    return [f"identity {name!r} is in {' and '.join(splits[name])}, as {say}" for name in shared]


def missing_splits(index: ClipIndex) -> list[str]:
    """Warn if training or evaluation would find no clips by default."""
    splits = index.splits
    return [
        f"no clip is in the {split!r} split, which {use} by default; set splits in a manifest, "
        f"or put videos into a folder named {split}"
        for split, use in (("train", "training reads"), ("test", "evaluation reads"))
        if split not in splits
    ]
