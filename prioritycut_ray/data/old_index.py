"""``index.json``, the index of version 0.1: read, never written."""

import hashlib
import json
from collections.abc import Iterator
from typing import Annotated, Literal

import pydantic
from pydantic import BaseModel, ConfigDict, Field, StringConstraints

from prioritycut_ray.data.shards import Clip
from prioritycut_ray.errors import UserError
from prioritycut_ray.validation import describe_problems

OLD_INDEX_NAME = "index.json"

_Sha256 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]


class _OldClip(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    key: Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_-]+$")]
    shard: Annotated[str, StringConstraints(pattern=r"^shard-\d{6}\.tar$")]
    offset: int = Field(ge=0)
    size: int = Field(gt=0)
    sha256: _Sha256
    frames: int = Field(gt=0)
    fps: float = Field(gt=0)
    width: int = Field(gt=0)
    height: int = Field(gt=0)
    identity: str
    split: str


class _OldIndex(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal[1] = 1
    fingerprint: _Sha256
    clips: tuple[_OldClip, ...] = Field(min_length=1)

    @pydantic.model_validator(mode="after")
    def _is_whole(self) -> "_OldIndex":
        if len({clip.key for clip in self.clips}) < len(self.clips):
            raise ValueError("two clips have the same key")
        facts = sorted((c.key, c.sha256, c.frames, c.identity, c.split) for c in self.clips)
        if self.fingerprint != hashlib.sha256(json.dumps(facts).encode()).hexdigest():
            raise ValueError("the fingerprint does not match the clips")
        return self


def read_old_clips(data: bytes, name: str) -> Iterator[Clip]:
    """Return the clips that an ``index.json`` lists.

    Args:
        data: the file.
        name: its path or URL, for messages.

    Raises:
        UserError: it is damaged.
    """
    try:
        index = _OldIndex.model_validate_json(data)
    except pydantic.ValidationError as error:
        raise UserError(
            f"{name}: the index is damaged ({describe_problems(error, _OldIndex)}); restore it "
            "from a backup, or rebuild it with `prioritycut shard`"
        ) from None
    return (Clip(**clip.model_dump()) for clip in index.clips)
