"""Clip scores to means with intervals over identities, paired differences, and warnings."""

import typing
from collections.abc import Sequence
from statistics import fmean

import numpy as np

from prioritycut_ray.evaluation.records import (
    ClipScores,
    Difference,
    FrameTable,
    IdentityScores,
    ModelScores,
    Protocol,
)
from prioritycut_ray.metrics.aggregate import (
    FrameScores,
    difference_over_clips,
    difference_over_frames,
    mean_over_clips,
    mean_over_frames,
    value_of,
)

FEW_IDENTITIES = 10
"""With fewer, the bootstrap has too little to resample: the intervals are rough."""


@typing.runtime_checkable
class Clip(typing.Protocol):
    """What is known of a scored clip, packed or rendered."""

    @property
    def key(self) -> str:
        """Its unique name."""

    @property
    def identity(self) -> str:
        """Who or what it shows."""

    @property
    def frames(self) -> int:
        """Number of frames."""


def summarise(
    name: str,
    checkpoint: str,
    protocol: str,
    clips: Sequence[Clip],
    scores: dict[str, FrameScores],
) -> ModelScores:
    """Summarise the scores of one model; clips without scores are left out."""
    scored = [clip for clip in clips if clip.key in scores]
    identities = [clip.identity for clip in scored]
    keys = list(next(iter(scores.values())))
    tallies = {key: [scores[clip.key][key] for clip in scored] for key in keys}
    rows = [
        ClipScores(
            key=clip.key,
            identity=clip.identity,
            frames=clip.frames,
            values={key: value_of(key, tally) for key, tally in scores[clip.key].items()},
            counted={key: tally.frames() for key, tally in scores[clip.key].items()},
        )
        for clip in scored
    ]
    return ModelScores(
        name=name,
        checkpoint=checkpoint,
        protocol=protocol,
        mean_over_clips={k: mean_over_clips(k, t, identities) for k, t in tallies.items()},
        mean_over_frames={k: mean_over_frames(k, t, identities) for k, t in tallies.items()},
        identities=[_identity(who, rows, keys) for who in sorted(set(identities))],
        clips=rows,
    )


def _identity(identity: str, rows: Sequence[ClipScores], keys: Sequence[str]) -> IdentityScores:
    own = [row for row in rows if row.identity == identity]
    values: dict[str, float | None] = {}
    for key in keys:
        known = [value for row in own if (value := row.values[key]) is not None]
        values[key] = fmean(known) if known else None
    return IdentityScores(
        identity=identity, clips=len(own), frames=sum(row.frames for row in own), values=values
    )


def differences(
    runs: Sequence[str],
    protocol_of: dict[str, str],
    clips: Sequence[Clip],
    table: FrameTable,
) -> list[Difference]:
    """Compare every run with its baseline and with the first run, never across protocols."""
    baselines = [name for name in table if name not in runs]
    pairs = [(run, base) for base in baselines for run in runs]
    pairs += [(run, runs[0]) for run in runs[1:]]
    return [
        difference(model, reference, clips, table)
        for model, reference in pairs
        if protocol_of[model] == protocol_of[reference]
    ]


def difference(model: str, reference: str, clips: Sequence[Clip], table: FrameTable) -> Difference:
    """Compare a model with a reference on the clips and metrics that both are scored on."""
    shared = [c for c in clips if c.key in table[model] and c.key in table[reference]]
    identities = [clip.identity for clip in shared]
    first = shared[0].key
    keys = [key for key in table[model][first] if key in table[reference][first]]
    pairs = {
        key: [(table[model][c.key][key], table[reference][c.key][key]) for c in shared]
        for key in keys
    }
    return Difference(
        model=model,
        reference=reference,
        mean_over_clips={k: difference_over_clips(k, p, identities) for k, p in pairs.items()},
        mean_over_frames={k: difference_over_frames(k, p, identities) for k, p in pairs.items()},
    )


def not_finite_warnings(table: FrameTable) -> list[str]:
    """Warn of each model that predicts NaN or infinite values."""
    frames = {
        name: sum(int((~np.isfinite(clip["l1"].numerator)).sum()) for clip in clips.values())
        for name, clips in table.items()
    }
    return [
        f"{name}: the predictions of {count} frames are NaN or infinite: the training diverged; "
        "evaluate an earlier checkpoint, or train again with a lower optim.lr"
        for name, count in frames.items()
        if count
    ]


def summary_warnings(
    protocols: dict[str, Protocol], skipped: dict[str, str], clips: Sequence[Clip]
) -> list[str]:
    """Warn of several protocols, of skipped clips and of few identities."""
    warnings = []
    if len(protocols) > 1:
        sizes = ", ".join(f"{key}: {protocol.size}²" for key, protocol in protocols.items())
        warnings.append(
            f"the runs were scored under {len(protocols)} protocols ({sizes}): scores of different "
            "protocols are not comparable, so differences between them are not computed"
        )
    if skipped:
        warnings.append(
            f"{len(skipped)} of {len(clips)} clips could not be decoded and are left out of all "
            "means"
        )
    identities = len({clip.identity for clip in clips})
    if identities < FEW_IDENTITIES:
        warnings.append(
            f"the intervals rest on {identities} identities: they are rough with fewer than "
            f"{FEW_IDENTITIES}"
        )
    return warnings
