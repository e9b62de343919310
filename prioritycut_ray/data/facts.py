"""The JSON object of a clip: facts that have no column in the index."""

import io
import json
import tarfile
from typing import Any

from prioritycut_ray.data.shards import Clip, locate_shard, shard_url
from prioritycut_ray.storage.filesystem import ABSENT
from prioritycut_ray.storage.reading import read_bytes

_LONGEST = 1 << 16


def read_facts(url: str, clip: Clip) -> dict[str, Any]:
    """Return the JSON object that the index has of a clip, or that follows it in its shard.

    Args:
        url: the folder of the data set.
        clip: the clip.

    Returns:
        The object; empty if there is none.

    Raises:
        UserError: the storage cannot be read.
    """
    if clip.extra:
        return dict(json.loads(clip.extra))
    fs, path = locate_shard(url, clip.shard)
    blocks = -(-clip.size // tarfile.BLOCKSIZE)
    start = clip.offset + blocks * tarfile.BLOCKSIZE
    try:
        data = read_bytes(fs, path, shard_url(url, clip.shard), start=start, end=start + _LONGEST)
        with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as tar:
            member = tar.next()
            file = tar.extractfile(member) if member else None
            if member is None or file is None or not member.name.endswith(".json"):
                return {}
            facts = json.loads(file.read())
    except (*ABSENT, tarfile.TarError, ValueError):
        return {}
    return facts if isinstance(facts, dict) else {}
