"""Slices of the held-out clips: by identity, or by a key of the JSON beside each clip."""

from collections.abc import Collection, Sequence
from concurrent.futures import ThreadPoolExecutor

from prioritycut_ray.data.facts import read_facts
from prioritycut_ray.data.shards import Clip
from prioritycut_ray.errors import UserError

IDENTITY = "identity"
"""The slice key that the index has; every other key is one of the JSON."""
ABSENT = "(none)"
"""The value of a clip whose JSON lacks the key."""
_READERS = 16


def slice_values(data: str, clips: Sequence[Clip], keys: Collection[str]) -> list[dict[str, str]]:
    """Return for each clip its value of every key.

    Args:
        data: folder of shards, an absolute path or an fsspec URL.
        clips: the held-out clips.
        keys: of ``gate.slices``.

    Raises:
        UserError: no clip has a key, or the storage cannot be read.
    """
    others = [key for key in keys if key != IDENTITY]
    if not others:
        return [dict.fromkeys(keys, clip.identity) for clip in clips]
    with ThreadPoolExecutor(_READERS) as pool:
        facts = [*pool.map(lambda clip: read_facts(data, clip), clips)]
    for key in others:
        if not any(key in own for own in facts):
            known = sorted({name for own in facts for name in own} | {IDENTITY})
            raise UserError(
                f"gate.slices.{key}: the JSON of the held-out clips in {data} has no such key; use "
                f"one of {', '.join(known)}"
            )
    return [
        {key: clip.identity if key == IDENTITY else str(own.get(key, ABSENT)) for key in keys}
        for clip, own in zip(clips, facts, strict=True)
    ]
