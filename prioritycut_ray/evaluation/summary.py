"""Scores of clips → means with intervals over identities, and paired differences."""

from collections.abc import Sequence
from statistics import fmean

import numpy as np

from prioritycut_ray.data.shards import Clip
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


def summarise(
    name: str,
    checkpoint: str,
    protocol: str,
    clips: Sequence[Clip],
    scores: dict[str, FrameScores],
) -> ModelScores:
    """Means and rows of one model; clips without scores are left out."""
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
            counted={key: int(t.denominator.sum()) for key, t in scores[clip.key].items()},
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
    """Every run against its baseline, then against the first run; never across protocols."""
    baselines = [name for name in table if name not in runs]
    pairs = [(run, base) for base in baselines for run in runs]
    pairs += [(run, runs[0]) for run in runs[1:]]
    return [
        _difference(model, reference, clips, table)
        for model, reference in pairs
        if protocol_of[model] == protocol_of[reference]
    ]


def _difference(model: str, reference: str, clips: Sequence[Clip], table: FrameTable) -> Difference:
    shared = [c for c in clips if c.key in table[model] and c.key in table[reference]]
    identities = [clip.identity for clip in shared]
    keys = list(table[model][shared[0].key])
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
    """A warning for each model whose predictions are not all finite numbers."""
    frames = {
        name: sum(int((~np.isfinite(clip["l1"].numerator)).sum()) for clip in clips.values())
        for name, clips in table.items()
    }
    return [
        f"{name}: the predictions of {count} frames are NaN or infinite; the training diverged, so "
        "evaluate an earlier checkpoint or train again with a lower optim.lr"
        for name, count in frames.items()
        if count
    ]


def summary_warnings(
    protocols: dict[str, Protocol], skipped: dict[str, str], clips: Sequence[Clip]
) -> list[str]:
    """What a reader of the scores must know: other protocols, clips left out, few identities."""
    warnings = []
    if len(protocols) > 1:
        warnings.append(
            f"the runs were measured under {len(protocols)} protocols "
            f"({', '.join(f'{h}: {p.size}²' for h, p in protocols.items())}): numbers of different "
            "protocols are not comparable, and no difference is taken between them"
        )
    if skipped:
        warnings.append(
            f"{len(skipped)} of {len(clips)} clips could not be decoded and count in no mean"
        )
    if len({clip.identity for clip in clips}) < 10:
        warnings.append(
            f"the intervals rest on {len({clip.identity for clip in clips})} identities: they are "
            "rough below about ten"
        )
    return warnings
