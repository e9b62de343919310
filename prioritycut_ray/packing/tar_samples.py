"""Samples of a WebDataset shard to pack: a video and a JSON object of the same key.

webdataset's own reader yields the contents of members without their offsets, silently skips links
and everything after a damaged header, and groups adjacent members only. Here a sample is a byte
range, and everything unusable is named. webdataset still decides where a key ends, so both readers
see the same samples.
"""

import tarfile
from collections.abc import Iterator
from typing import Any, NamedTuple

from webdataset.tariterators import base_plus_ext

from prioritycut_ray.packing.entries import (
    VIDEO_EXTENSIONS,
    Entry,
    Rejected,
    Span,
    printable,
)
from prioritycut_ray.packing.manifest import SPLIT_NAMES
from prioritycut_ray.packing.tar_members import (
    NoTar,
    json_object,
    opened_tar,
    usable_members,
    without_sample,
    word,
)


class _Sample(NamedTuple):
    """The members of one key of a tar."""

    video: tarfile.TarInfo | None = None
    facts: dict[str, Any] | None = None
    others: tuple[str, ...] = ()

    @property
    def is_sample(self) -> bool:
        """Whether there is a video or a JSON object."""
        return self.video is not None or self.facts is not None


def read_samples(shard: Entry) -> list[Entry | Rejected]:
    """List the samples of a tar, and its unusable parts; nothing is extracted."""
    shown = shard.shown
    rejected: list[Rejected] = []
    samples: dict[str, _Sample] = {}
    without_key: list[str] = []
    try:
        with opened_tar(shard) as tar:
            for member in usable_members(shard, tar, rejected):
                key, extension = base_plus_ext(member.name)
                if key is None:  # A hidden file, or one without an extension.
                    without_key.append(member.name)
                    continue
                sample = samples.get(key, _Sample())
                samples[key] = _added(sample, tar, member, extension.lower(), shown, rejected)
    except NoTar as error:
        return [Rejected(shown, str(error))]
    result: list[Entry | Rejected] = [*rejected]
    for key, sample in samples.items():
        result += _result(shard, key, sample)
    strays = [name for one in samples.values() if not one.is_sample for name in one.others]
    result += without_sample(shard, without_key + strays)
    return result or [Rejected(shown, "contains no samples")]


def _added(
    sample: _Sample,
    tar: tarfile.TarFile,
    member: tarfile.TarInfo,
    extension: str,
    shown: str,
    rejected: list[Rejected],
) -> _Sample:
    """Add a member to its sample, or name it if it cannot be used."""
    if f".{extension}" in VIDEO_EXTENSIONS:
        if sample.video is None:
            return sample._replace(video=member)
        rejected.append(
            Rejected(f"{shown}/{printable(member.name)}", "is a second video of its key")
        )
        return sample
    if extension == "json":
        facts = json_object(tar, member)
        if facts is None:
            rejected.append(Rejected(f"{shown}/{printable(member.name)}", "is not a JSON object"))
            return sample
        return sample._replace(facts=facts)
    return sample._replace(others=(*sample.others, member.name))


def _result(shard: Entry, key: str, sample: _Sample) -> Iterator[Entry | Rejected]:
    if sample.video is not None and sample.facts is not None:
        yield _entry(shard, key, sample.video, sample.facts)
    elif sample.video is not None:
        name = printable(sample.video.name)
        yield Rejected(f"{shard.shown}/{name}", "has no usable JSON beside it")
    elif sample.facts is not None:
        yield Rejected(f"{shard.shown}/{printable(key)}", "has no video beside its JSON")


def _entry(shard: Entry, key: str, video: tarfile.TarInfo, facts: dict[str, Any]) -> Entry:
    split = word(facts.get("split"))
    return shard._replace(
        name=f"{shard.name}/{key}",
        identity=word(facts.get("identity")) or word(facts.get("identity_id")),
        split=SPLIT_NAMES.get(split.casefold(), split),
        span=Span(video.offset_data, video.size),
        member=video.name,
        size=video.size,
    )
