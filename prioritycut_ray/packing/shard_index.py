"""An index over WebDataset shards that somebody else wrote: nothing is copied or packed again.

Each shard is checked in a Ray task of its own, and its result is stored at once, so a killed run
resumes where it stopped. Training then reads byte ranges of those very shards.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import pydantic

from prioritycut_ray.data.index import ClipIndex, build_index, write_index
from prioritycut_ray.data.shard_writer import make_keys
from prioritycut_ray.data.shards import Clip
from prioritycut_ray.errors import UserError, describe
from prioritycut_ray.packing.clips import LONG_GOP
from prioritycut_ray.packing.entries import Entry, Rejected, Span, printable
from prioritycut_ray.packing.identities import name_identities
from prioritycut_ray.packing.layout import Layout
from prioritycut_ray.packing.rejections import nothing_usable, refused, write_rejected
from prioritycut_ray.packing.shard_inputs import find_shards
from prioritycut_ray.packing.shard_samples import (
    IndexedSample,
    ShardOptions,
    ShardOutcome,
    check_shard,
)
from prioritycut_ray.packing.splits import (
    assign_splits,
    missing_splits,
    shared_identities,
    split_by_folders,
)
from prioritycut_ray.packing.tasks import make_parts, watchdog
from prioritycut_ray.packing.workspace import Workspace
from prioritycut_ray.storage.paths import absolute

# Increased when the same shard and options would give another result: old ones are then redone.
OUTCOME_VERSION = 1


class IndexProgress(NamedTuple):
    """Progress of a run: shards done, their total, clips found, and members rejected."""

    done: int
    total: int
    clips: int
    rejected: int


@dataclass(frozen=True)
class IndexReport:
    """The result of a run.

    Attributes:
        index: as written to the output folder.
        shards: number of shards with clips.
        frames: number of frames in all clips.
        size_bytes: total size of their videos.
        kept: number of shards that an interrupted run of the same command had finished.
        rejected: what was left out; ``rejected.csv`` in the output folder says the same.
        warnings: one line each.
    """

    index: ClipIndex
    shards: int
    frames: int
    size_bytes: int
    kept: int
    rejected: tuple[Rejected, ...]
    warnings: tuple[str, ...]


OnProgress = Callable[[IndexProgress], None]


def index_shards(
    inputs: Sequence[str],
    out: str,
    *,
    video: str = "mp4",
    json_extension: str = "json",
    trust: bool = False,
    identity_from: str = "",
    strict: bool = False,
    on_progress: OnProgress | None = None,
) -> IndexReport:
    """Make a data set of WebDataset shards where they lie.

    A sample is a video and a JSON object, grouped by webdataset. The video must be one that
    training can read as it is: a square H.264 mp4, like those that ``shard --copy`` keeps.
    ``identity`` (or ``identity_id``) and ``split`` in the JSON are used. Ray is started if it is
    not running; every node must see the shards, now and in training. After a kill, the same call
    resumes.

    Args:
        inputs: see :func:`prioritycut_ray.packing.shard_inputs.find_shards`.
        out: folder to create for the index, a local path or any fsspec URL.
        video: extension of the videos: all that follows the first dot of a member's name.
        json_extension: extension of the JSON objects; ``none`` uses videos without.
        trust: take the number of frames from the headers of the videos instead of decoding them.
            Their checksums are computed all the same.
        identity_from: see :func:`prioritycut_ray.packing.identities.name_identities`.
        strict: fail if anything is rejected.
        on_progress: called after each shard.

    Returns:
        What was indexed and what was left out.

    Raises:
        UserError: an input does not exist, the output folder is in use, no clip is usable, or
            (with ``strict``) one is not.
    """
    Layout(identity_from=identity_from).check()
    options = ShardOptions(_extension(video), _extension(json_extension), trust)
    shards = find_shards(inputs)
    job = {
        "command": "data index",
        "inputs": [absolute(given) for given in inputs],
        "identity_from": identity_from,
        **options._asdict(),
    }
    work = Workspace(out)
    with work.claimed(job, appending=False):
        # Check every shard, or reuse what an interrupted run has finished.
        outcomes, kept = _outcomes(shards, options, work, on_progress)
        # Name what was left out.
        rejected = tuple(Rejected(*row) for outcome in outcomes for row in outcome.rejected)
        write_rejected(out, rejected, None)
        if strict and rejected:
            raise UserError(refused(out, rejected))
        samples = [sample for outcome in outcomes for sample in outcome.samples]
        if not samples:
            work.clear()
            raise UserError(nothing_usable(out, rejected))
        # Only then write the index.
        entries = _entries(shards, outcomes, identity_from)
        index = build_index(_clips(entries, samples, trust))
        write_index(index, out)
        work.clear()
    return IndexReport(
        index=index,
        shards=sum(bool(outcome.samples) for outcome in outcomes),
        frames=sum(sample.frames for sample in samples),
        size_bytes=sum(sample.size for sample in samples),
        kept=kept,
        rejected=rejected,
        warnings=(
            *_warnings(samples, trust),
            *shared_identities(index, entries),
            *missing_splits(index),
        ),
    )


def _extension(given: str) -> str:
    if not (extension := given.strip().lstrip(".").lower()):
        raise UserError("an extension is empty: write it as in `--video-extension mp4`")
    return extension


# ---------------------------------------------------------------------------------------------
# Outcomes
# ---------------------------------------------------------------------------------------------


def _outcomes(
    shards: Sequence[Entry],
    options: ShardOptions,
    work: Workspace,
    on_progress: OnProgress | None,
) -> tuple[list[ShardOutcome], int]:
    """Return the outcome of every shard, in order, and how many were finished already."""
    outcomes: dict[int, ShardOutcome] = {}
    clips = rejected = 0

    def settle(position: int, outcome: ShardOutcome) -> None:
        nonlocal clips, rejected
        outcomes[position] = outcome
        clips, rejected = clips + len(outcome.samples), rejected + len(outcome.rejected)
        if on_progress is not None:
            on_progress(IndexProgress(len(outcomes), len(shards), clips, rejected))

    names = [_part_name(shard, options) for shard in shards]
    for position, name in enumerate(names):
        if (finished := _read_outcome(work.kept(name))) is not None:
            settle(position, finished)
    kept = len(outcomes)
    missing = [position for position in range(len(shards)) if position not in outcomes]
    made = make_parts(shards, missing, options, make=check_within, failed=_failed)
    for position, part in made:
        outcome = ShardOutcome.model_validate_json(part)
        if outcome.lasting:
            work.keep(names[position], part)
        settle(position, outcome)
    return [outcomes[position] for position in range(len(shards))], kept


def check_within(seconds: int, shard: Entry, options: ShardOptions) -> bytes:
    """Check one shard; runs in a Ray worker.

    Raises:
        UserError: the storage cannot be read.
    """
    with watchdog(seconds):
        try:
            outcome = check_shard(shard, options)
        except UserError:
            raise
        except Exception as error:  # A strange file must not end the run, whatever it triggers.
            return _failed(shard, f"cannot be indexed ({printable(describe(error))})")
    return outcome.model_dump_json().encode()


def _failed(shard: Entry, reason: str) -> bytes:
    outcome = ShardOutcome(rejected=((shard.shown, reason),), lasting=False)
    return outcome.model_dump_json().encode()


def _part_name(shard: Entry, options: ShardOptions) -> str:
    """Name an outcome by everything it depends on; a shard that has changed gives another name."""
    facts = (OUTCOME_VERSION, shard.source, shard.size, shard.version, options)
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:32]


def _read_outcome(part: bytes | None) -> ShardOutcome | None:
    try:
        return None if part is None else ShardOutcome.model_validate_json(part)
    except pydantic.ValidationError:
        return None  # Damaged since: redo it.


# ---------------------------------------------------------------------------------------------
# The index
# ---------------------------------------------------------------------------------------------


def _entries(
    shards: Sequence[Entry], outcomes: Sequence[ShardOutcome], identity_from: str
) -> list[Entry]:
    """Return an entry for each sample, with its identity, and its split if something gives one."""
    entries = [
        shard._replace(
            name=f"{shard.name}/{sample.key}",
            identity=sample.identity,
            split=sample.split,
            span=Span(sample.offset, sample.size),
            member=sample.member,
        )
        for shard, outcome in zip(shards, outcomes, strict=True)
        for sample in outcome.samples
    ]
    folders = [shard.source.rpartition("/")[0] for shard in shards]
    return name_identities(split_by_folders(entries, folders), identity_from)


def _clips(entries: Sequence[Entry], samples: Sequence[IndexedSample], trust: bool) -> list[Clip]:
    counts = Counter(sample.key for sample in samples)
    # A key that is unique to its sample is kept; others are told apart by their shards.
    keys = make_keys(
        sample.key if counts[sample.key] == 1 else entry.name
        for entry, sample in zip(entries, samples, strict=True)
    )
    return [
        Clip(
            key=key,
            shard=entry.source,
            offset=sample.offset,
            size=sample.size,
            sha256=sample.sha256,
            frames=sample.frames,
            fps=sample.fps,
            width=sample.side,
            height=sample.side,
            identity=entry.identity,
            split=split,
            extra=json.dumps({"member": sample.member} | ({"trusted": True} if trust else {})),
        )
        for key, entry, sample, split in zip(
            keys, entries, samples, assign_splits(entries), strict=True
        )
    ]


def _warnings(samples: Sequence[IndexedSample], trust: bool) -> list[str]:
    warnings = []
    if trust:
        warnings.append(
            f"{len(samples)} clips were not decoded (--trust): they have as many frames as their "
            "headers say, and damage may show in training only; `prioritycut data verify` decodes "
            "them"
        )
    slow = [sample for sample in samples if sample.key_distance > LONG_GOP]
    if slow:
        warnings.append(
            f"{len(slow)} clips have more than {LONG_GOP} frames from one key frame to the next, "
            "which makes single frames slow to read; `prioritycut shard` encodes them again"
        )
    if cut := [sample for sample in samples if sample.cuts]:
        warnings.append(
            f"{len(cut)} clips have hard cuts, where they are not split, such as {cut[0].key}; "
            "`prioritycut shard` splits them"
        )
    if variable := [sample for sample in samples if sample.variable_rate]:
        warnings.append(f"{len(variable)} clips have a variable frame rate; theirs are averages")
    return warnings
