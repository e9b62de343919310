"""The samples of a WebDataset shard that somebody else wrote, checked where they lie.

webdataset's own iteration decides which members form a sample, so the index lists what its readers
see: adjacent members whose names are equal up to the first dot. It is given headers instead of
contents, because it knows neither where a member lies nor what its tar reader skips.
"""

import hashlib
import io
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

from pydantic import BaseModel, ConfigDict
from webdataset.tariterators import base_plus_ext, group_by_keys

from prioritycut_ray.data.loader import Decoding, load
from prioritycut_ray.packing.clips import TOO_SHORT
from prioritycut_ray.packing.entries import Entry, Rejected, printable
from prioritycut_ray.packing.manifest import SPLIT_NAMES
from prioritycut_ray.packing.scenes import count_and_cuts
from prioritycut_ray.packing.tar_members import (
    NoTar,
    json_object,
    opened_tar,
    usable_members,
    without_sample,
    word,
)
from prioritycut_ray.storage.filesystem import filesystem
from prioritycut_ray.storage.reading import read_bytes
from prioritycut_ray.video.decoding import frames_upright, probe
from prioritycut_ray.video.random_access import SIZE_STEP, read_frames
from prioritycut_ray.video.remux import check_stream
from prioritycut_ray.video.source import VideoError

NO_JSON = "none"
PATIENCE_S = 600
"""A decoder that takes longer over a whole clip hangs."""


class ShardOptions(NamedTuple):
    """How the samples of shards are read.

    Attributes:
        video: extension of the video in a sample, as webdataset names it: all that follows the
            first dot, in lower case.
        json: extension of the JSON object; ``none`` if there is none.
        trust: take the number of frames from the header of the video instead of decoding it.
    """

    video: str
    json: str
    trust: bool


class IndexedSample(BaseModel):
    """A video in a shard that training can read where it lies.

    Attributes:
        key: as webdataset names the sample.
        member: name of the video in the tar.
        offset: its first byte in the tar.
        size: its bytes.
        sha256: of the video.
        frames: number of frames.
        fps: frames per second.
        variable_rate: whether ``fps`` is only an average.
        side: width and height in pixels.
        key_distance: maximum number of frames from one key frame to the next.
        cuts: number of hard cuts; 0 if it was not decoded.
        identity: from the JSON; empty if that does not say.
        split: from the JSON; empty if that does not say.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    key: str
    member: str
    offset: int
    size: int
    sha256: str = ""
    frames: int = 0
    fps: float = 0.0
    variable_rate: bool = False
    side: int = 0
    key_distance: int = 0
    cuts: int = 0
    identity: str = ""
    split: str = ""


class ShardOutcome(BaseModel):
    """The result for one shard.

    Attributes:
        samples: the clips that training can read, in their order.
        rejected: file and reason of everything else.
        lasting: whether another try would give the same result.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    samples: tuple[IndexedSample, ...] = ()
    rejected: tuple[tuple[str, str], ...] = ()
    lasting: bool = True


def check_shard(shard: Entry, options: ShardOptions) -> ShardOutcome:
    """List the samples of a shard and check every video of them.

    Videos are decoded in a process of their own, which a damaged one may take down.
    """
    rejected: list[Rejected] = []
    try:
        found = list_samples(shard, options, rejected)
    except NoTar as error:
        return ShardOutcome(rejected=((shard.shown, str(error)),), lasting=error.lasting)
    if not found and not rejected:
        rejected.append(Rejected(shard.shown, "contains no samples"))
    checked = load(
        partial(_checked, shard, found, options.trust),
        [[position] for position in range(len(found))],
        1,
        lambda position: found[position].key,
        PATIENCE_S,
    )
    samples: list[IndexedSample] = []
    for sample, result in zip(found, checked, strict=True):
        if isinstance(result, IndexedSample):
            samples.append(result)
        else:
            rejected.append(Rejected(f"{shard.shown}/{printable(sample.member)}", result))
    return ShardOutcome(
        samples=tuple(samples), rejected=tuple((item.file, item.reason) for item in rejected)
    )


# ---------------------------------------------------------------------------------------------
# Which samples are there
# ---------------------------------------------------------------------------------------------


def list_samples(
    shard: Entry, options: ShardOptions, rejected: list[Rejected]
) -> list[IndexedSample]:
    """List the samples of a shard from its headers; videos are not read.

    Args:
        shard: the tar.
        options: which members to use.
        rejected: gets everything that belongs to no usable sample.

    Raises:
        NoTar: it is not a tar whose members can be found by their bytes.
    """
    samples: list[IndexedSample] = []
    strays: list[str] = []
    with opened_tar(shard) as tar:
        for sample in _grouped(shard, tar, strays, rejected):
            found = _sample_of(sample, tar, options)
            if isinstance(found, IndexedSample):
                samples.append(found)
            elif isinstance(found, Rejected):
                rejected.append(found._replace(file=f"{shard.shown}/{printable(found.file)}"))
            else:
                parts = (part for part in sample.values() if isinstance(part, tarfile.TarInfo))
                strays += [part.name for part in parts]
    rejected += without_sample(shard, strays)
    return samples


def _grouped(
    shard: Entry, tar: tarfile.TarFile, strays: list[str], rejected: list[Rejected]
) -> Iterator[dict[str, Any]]:
    """Let webdataset group the headers of a tar into samples."""
    current = ""

    def headers() -> Iterator[dict[str, Any]]:
        nonlocal current
        for member in usable_members(shard, tar, rejected):
            current = member.name
            if base_plus_ext(member.name)[0] is None:  # A hidden file, or one without an extension.
                strays.append(member.name)
            else:
                yield {"fname": member.name, "data": member, "__url__": shard.source}

    def refuse(error: Exception) -> bool:
        rejected.append(Rejected(f"{shard.shown}/{printable(current)}", "is in its sample already"))
        return True

    samples: Iterator[dict[str, Any]] = group_by_keys(headers(), handler=refuse)
    return samples


def _sample_of(
    sample: Mapping[str, Any], tar: tarfile.TarFile, options: ShardOptions
) -> IndexedSample | Rejected | None:
    """Return a sample that is complete, why it is not, or None if it has nothing to use."""
    video: tarfile.TarInfo | None = sample.get(options.video)
    described: tarfile.TarInfo | None = sample.get(options.json)
    if video is None and described is None:
        return None
    if video is None:
        return Rejected(sample["__key__"], f"has no .{options.video} beside its .{options.json}")
    facts: dict[str, Any] | None = {}
    if described is not None:
        facts = json_object(tar, described)
    elif options.json != NO_JSON:
        hint = "name another with --json-extension, or `none` to use videos without"
        return Rejected(video.name, f"has no .{options.json} beside it; {hint}")
    if facts is None:
        return Rejected(video.name, f"its .{options.json} is not a JSON object")
    split = word(facts.get("split"))
    return IndexedSample(
        key=printable(sample["__key__"]),
        member=printable(video.name),
        offset=video.offset_data,
        size=video.size,
        identity=word(facts.get("identity")) or word(facts.get("identity_id")),
        split=SPLIT_NAMES.get(split.casefold(), split),
    )


# ---------------------------------------------------------------------------------------------
# Are they fit for training
# ---------------------------------------------------------------------------------------------


def _checked(
    shard: Entry,
    samples: Sequence[IndexedSample],
    trust: bool,
    positions: Sequence[int],
    avoid: Mapping[int, str],
    decoding: Decoding,
) -> IndexedSample | str:
    """Check one video in a loader worker, which it may take down; return why it is unfit, if so."""
    [position] = positions
    if position in avoid:
        return avoid[position]
    sample = samples[position]
    fs, path = filesystem(shard.source)
    end = sample.offset + sample.size
    data = read_bytes(fs, path, shard.source, start=sample.offset, end=end)
    if len(data) < sample.size:
        return f"is cut off after {len(data)} of {sample.size} bytes"
    try:
        with decoding(position):
            return _facts(data, sample, trust)
    except VideoError as error:
        return error.reason


def _facts(data: bytes, sample: IndexedSample, trust: bool) -> IndexedSample:
    """Check a video, and add what was found out.

    Raises:
        VideoError: training cannot read it as it is.
    """
    stream = check_stream(io.BytesIO(data))
    if stream.side % SIZE_STEP:
        raise VideoError(
            "clip", f"is {stream.side} pixels wide; training reads multiples of {SIZE_STEP}"
        )
    info = probe(io.BytesIO(data))
    frames, cuts = info.packets, 0
    if not trust:
        frames, places = count_and_cuts(frames_upright(io.BytesIO(data)))
        cuts = len(places)
    if frames < 2:
        raise VideoError("clip", TOO_SHORT)
    if frames != info.packets:
        hidden = info.packets - frames
        raise VideoError(
            "clip", f"{hidden} of its {info.packets} frames are hidden by an edit list"
        )
    if not trust:
        read_frames(data, [0, frames - 1], stream.side)  # With the decoder that training uses.
    return sample.model_copy(
        update={
            "sha256": hashlib.sha256(data).hexdigest(),
            "frames": frames,
            "fps": info.fps,
            "variable_rate": info.variable_rate,
            "side": stream.side,
            "key_distance": stream.key_distance,
            "cuts": cuts,
        }
    )
