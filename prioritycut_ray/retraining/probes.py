"""What is seen of a clip without a model: hashes of its frames, brightness, motion, faces."""

from collections.abc import Mapping
from functools import lru_cache
from typing import NamedTuple

import imagehash
import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pydantic import BaseModel, ConfigDict

from prioritycut_ray.data.shards import Clip, read_clip
from prioritycut_ray.errors import UserError
from prioritycut_ray.metrics.landmarks import FaceFinder
from prioritycut_ray.video.random_access import read_frames

FRAMES = 5
"""Frames of a clip, evenly spaced, that are looked at."""
SIDE, SIDE_WITH_FACES = 64, 256
HASH_SIDE = 16
BITS = HASH_SIDE**2
NEAR = BITS // 8
"""Frames whose hashes differ in at most this many bits are nearly the same. Measured with 256 bits:
re-encoded, scaled or trimmed copies of a video 0 to 30, other videos 62 or more (medians over the
frames of a clip)."""
FLAT = 2.0
"""Frames whose grey levels have a smaller standard deviation have no meaningful hash."""
_BATCH = 4096


class ClipProbe(BaseModel):
    """What was seen of a clip.

    Attributes:
        hashes: perceptual hashes of its frames, in hex; flat frames have none.
        brightness: mean of its pixels, in 0..1.
        motion: mean absolute difference of successive probed frames, in 0..1.
        faces: share of its frames with a face; None if faces were not looked for.
    """

    model_config = ConfigDict(frozen=True)

    hashes: list[str]
    brightness: float
    motion: float
    faces: float | None


class ProbeTask(NamedTuple):
    """A clip to probe.

    Attributes:
        data: folder of shards, an absolute path or an fsspec URL.
        clip: which clip.
        faces: whether to look for faces.
    """

    data: str
    clip: Clip
    faces: bool


def probe_clip(task: ProbeTask) -> ClipProbe | None:
    """Look at a clip; None if it cannot be decoded, which an evaluation reports."""
    numbers = np.linspace(0, task.clip.frames - 1, FRAMES).round().astype(int).tolist()
    side = SIDE_WITH_FACES if task.faces else SIDE
    try:
        frames = read_frames(read_clip(task.data, task.clip), numbers, side)
    except UserError:
        return None
    scaled = frames / 255.0
    found = [_finder().find(frame) is not None for frame in frames] if task.faces else None
    return ClipProbe(
        hashes=[
            str(imagehash.phash(Image.fromarray(frame), hash_size=HASH_SIDE))
            for frame in frames
            if frame.mean(axis=-1).std() > FLAT
        ],
        brightness=float(scaled.mean()),
        motion=float(np.abs(np.diff(scaled, axis=0)).mean()),
        faces=None if found is None else float(np.mean(found)),
    )


@lru_cache(maxsize=1)
def _finder() -> FaceFinder:
    return FaceFinder()


def nearly_same(probes: Mapping[str, ClipProbe], others: Mapping[str, ClipProbe]) -> dict[str, str]:
    """Find clips that show nearly the same frames as another clip.

    Args:
        probes: by the key of the clip.
        others: the same of the clips to search.

    Returns:
        For each clip of which at least half of the frames are near those of one other clip: the key
        of that clip.
    """
    names = [key for key, probe in others.items() for _ in probe.hashes]
    known = _signs([text for probe in others.values() for text in probe.hashes])
    found: dict[str, str] = {}
    for key, probe in probes.items():
        nearest: dict[str, set[int]] = {}
        own = _signs(probe.hashes)
        for start in range(0, len(known), _BATCH):
            # Of vectors of ±1, the product is the number of equal bits less that of the others.
            distances = (BITS - own @ known[start : start + _BATCH].T) / 2
            for frame, other in zip(*np.nonzero(distances <= NEAR), strict=True):
                nearest.setdefault(names[start + other], set()).add(int(frame))
        best = max(nearest, key=lambda name: len(nearest[name]), default="")
        if best and 2 * len(nearest[best]) >= len(probe.hashes):
            found[key] = best
    return found


def _signs(hashes: list[str]) -> NDArray[np.float32]:
    """Return the bits of hashes as ±1, `[N, BITS]`."""
    if not hashes:
        return np.empty((0, BITS), np.float32)
    packed = np.array([list(bytes.fromhex(text)) for text in hashes], np.uint8)
    signs: NDArray[np.float32] = np.unpackbits(packed, axis=1).astype(np.float32) * 2 - 1
    return signs
