"""All models and candidates of a models folder, with their state."""

from datetime import datetime
from typing import NamedTuple

from prioritycut_ray.retraining.gate import Verdict
from prioritycut_ray.retraining.job import DONE, JOB, VERDICT
from prioritycut_ray.retraining.registry import RUN, model_names, read_current, read_record
from prioritycut_ray.storage.folder import Folder


class ModelEntry(NamedTuple):
    """One model or candidate.

    Attributes:
        name: its name.
        state: current, former, adopted, refused or unfinished.
        is_anchor: whether it is pinned.
        has_weights: whether its weights are kept.
        promoted: when it was last promoted; None if it never was.
        reason: why it was promoted or refused; empty if neither.
    """

    name: str
    state: str
    is_anchor: bool
    has_weights: bool
    promoted: datetime | None
    reason: str


def list_entries(models: Folder) -> list[ModelEntry]:
    """Return the entries of a models folder, sorted by name.

    Raises:
        UserError: the pointer is damaged.
    """
    current = read_current(models)
    promotions = {entry.model: entry for entry in current.history} if current else {}
    entries = []
    for name in model_names(models):
        promotion = promotions.get(name)
        if current and name == current.model:
            state = "current"
        else:
            state = "former" if promotion else _state(models, name)
        entries.append(
            ModelEntry(
                name=name,
                state=state,
                is_anchor=current is not None and name == current.anchor.model,
                has_weights=models.exists(f"{name}/{RUN}"),
                promoted=promotion.at if promotion else None,
                reason=promotion.reason if promotion else _refusal(models, name),
            )
        )
    return entries


def _state(models: Folder, name: str) -> str:
    """Return the state of a model that was never current."""
    if not models.exists(f"{name}/{JOB}"):
        return "adopted"
    return "refused" if models.exists(f"{name}/{DONE}") else "unfinished"


def _refusal(models: Folder, name: str) -> str:
    path = f"{name}/{VERDICT}"
    if not models.exists(path):
        return ""
    return read_record(models, path, Verdict).reason
