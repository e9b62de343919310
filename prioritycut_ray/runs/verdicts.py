"""Verdicts: how well the checkpoints of a run rebuild held-out clips, and which one is best.

Each validation leaves ``validation/step_0000100.json`` in the run's folder.
"""

import json
import math
from collections.abc import Iterable, Sequence

from pydantic import BaseModel, ConfigDict, ValidationError

from prioritycut_ray.config import VAL_L1, VALIDATION
from prioritycut_ray.runs.checkpoints import STEP_FORMAT
from prioritycut_ray.storage.folder import Folder

VERDICTS = "validation"
REPORT = "report.json"
"""File of a checkpoint: the attempt that wrote it, and the scalars at its step."""


class Verdict(BaseModel):
    """The scores of one checkpoint's averaged weights on held-out clips.

    Attributes:
        step: of the checkpoint.
        sample: hash of the clips and of how they are scored; only verdicts with the same hash can
            be compared.
        clips: number of clips that were scored.
        skipped: why the others could not be, by key.
        scores: means over clips, by the name of the scalar.
    """

    model_config = ConfigDict(frozen=True, ser_json_inf_nan="strings")

    step: int
    sample: str
    clips: int
    skipped: dict[str, str]
    scores: dict[str, float]


def write_verdict(folder: Folder, verdict: Verdict) -> None:
    """Write a verdict to the folder of a run."""
    name = f"{VERDICTS}/{STEP_FORMAT.format(verdict.step)}.json"
    folder.write(name, verdict.model_dump_json(indent=1).encode())


def read_verdicts(folder: Folder) -> list[Verdict]:
    """Return the verdicts of a run in the order of their steps; damaged ones are left out."""
    verdicts = []
    for name in folder.names(VERDICTS):
        try:
            verdicts.append(Verdict.model_validate_json(folder.read(f"{VERDICTS}/{name}")))
        except ValidationError:
            continue
    return sorted(verdicts, key=lambda verdict: verdict.step)


def remove_verdicts_beyond(folder: Folder, step: int) -> None:
    """Remove the verdicts of later steps, which will be trained again."""
    for verdict in read_verdicts(folder):
        if verdict.step > step:
            folder.remove(f"{VERDICTS}/{STEP_FORMAT.format(verdict.step)}.json")


def comparable(verdicts: Sequence[Verdict]) -> list[Verdict]:
    """Return the verdicts on the clips that the newest one was made on."""
    return [verdict for verdict in verdicts if verdict.sample == verdicts[-1].sample]


def has_stalled(verdicts: Iterable[Verdict], patience: int) -> bool:
    """Return whether ``val/l1`` has ever had no new lowest value in ``patience`` verdicts in a row.

    Args:
        verdicts: on the same clips, in the order of their steps.
        patience: 0 never ends.
    """
    lowest, count = math.inf, 0
    for verdict in verdicts:
        count += 1
        if verdict.scores[VAL_L1] < lowest:
            lowest, count = verdict.scores[VAL_L1], 0
        if 0 < patience <= count:
            return True
    return False


def checkpoint_scores(folder: Folder, metric: str, steps: Iterable[int]) -> dict[int, float | None]:
    """Return the scalar that ranks checkpoints, by step; None where it is unknown.

    Args:
        folder: of the run.
        metric: name of the scalar.
        steps: of the checkpoints.
    """
    if metric.startswith(VALIDATION):
        known = {v.step: v.scores.get(metric) for v in comparable(read_verdicts(folder))}
        return {step: known.get(step) for step in steps}
    return {step: _reported(folder, metric, step) for step in steps}


def _reported(folder: Folder, metric: str, step: int) -> float | None:
    """Read a scalar from the report that a checkpoint holds."""
    try:
        report = json.loads(folder.read(f"{STEP_FORMAT.format(step)}/{REPORT}"))
        return float(report["scalars"][metric])
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None
