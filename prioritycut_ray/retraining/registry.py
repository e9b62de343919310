"""The models of a project, and which one is current.

::

    current.json            the pointer: current model, how it got there, checksum
    lease/                  who may write
    NAME/                   a model, or a candidate for one
      index.json            the clips that it has seen, and the holdout of its time
      job.json              how it came about
      run/                  its training, with checkpoints
      evaluation.json verdict.json report.html report.json    see ``job``

The pointer is replaced in one piece: a reader sees the old or the new one.
"""

import hashlib
import json
from datetime import UTC, datetime

from pydantic import BaseModel, ConfigDict, ValidationError

from prioritycut_ray.data.shards import INDEX_NAME, read_index
from prioritycut_ray.errors import UserError
from prioritycut_ray.runs.locate import find_checkpoint, read_config
from prioritycut_ray.runs.manifest import MANIFEST
from prioritycut_ray.storage.folder import Folder
from prioritycut_ray.storage.lease import Lease
from prioritycut_ray.training.checkpoint import check_weights, fork_checkpoint

CURRENT = "current.json"
RUN = "run"


class Promotion(BaseModel):
    """One move of the pointer.

    Attributes:
        model: name of the model that became current.
        at: when, ISO 8601.
        reason: why, in one line.
        checkpoint: of the model, below the folder of models.
        manifest: SHA-256 of the checkpoint's manifest, which holds those of its files.
        token: of the lease that it was done under.
    """

    model_config = ConfigDict(frozen=True)

    model: str
    at: datetime
    reason: str
    checkpoint: str
    manifest: str
    token: int


class Current(BaseModel):
    """The pointer: all moves, the last one being in force.

    Attributes:
        history: in order.
        checksum: SHA-256 of the history.
    """

    model_config = ConfigDict(frozen=True)

    history: list[Promotion]
    checksum: str

    @property
    def model(self) -> str:
        """Name of the current model."""
        return self.history[-1].model


def read_current(models: Folder) -> Current | None:
    """The pointer; None if no model was promoted yet.

    Raises:
        UserError: it is damaged.
    """
    if not models.exists(CURRENT):
        return None
    try:
        current = Current.model_validate_json(models.read(CURRENT))
    except ValidationError as error:
        raise UserError(
            f"{models.url}/{CURRENT}: is damaged ({error.error_count()} errors)"
        ) from error
    if current.checksum != _checksum(current.history):
        raise UserError(
            f"{models.url}/{CURRENT}: is damaged (checksum differs); restore it from a backup, or "
            "remove it and promote a model again"
        )
    return current


def current_model(models: Folder) -> tuple[str, str]:
    """Name of the current model, and path or URL of its checkpoint.

    Raises:
        UserError: there is none, or it is not what was promoted.
    """
    current = read_current(models)
    if current is None:
        raise UserError(
            f"{models.url}: no current model; `prioritycut models promote RUN --models "
            f"{models.url}` takes the first one from a training run"
        )
    entry = current.history[-1]
    if _manifest_sum(models, entry.checkpoint) != entry.manifest:
        raise UserError(
            f"{models.url}/{entry.checkpoint}: is not the checkpoint that was promoted; roll back "
            "with `prioritycut models rollback`"
        )
    return entry.model, f"{models.url}/{entry.checkpoint}"


def promote(models: Folder, lease: Lease, model: str, reason: str) -> None:
    """Make a model current; once is enough.

    Raises:
        UserError: it has no good checkpoint, or one with weights that are NaN or infinite.
        Superseded: the lease was lost.
    """
    current = read_current(models)
    history = current.history if current else []
    if history and history[-1].model == model:
        return
    directory = find_checkpoint(run_folder(models, model))
    check_weights(directory)
    checkpoint = f"{model}/{RUN}/{directory.name}"
    entry = Promotion(
        model=model,
        at=datetime.now(UTC),
        reason=reason,
        checkpoint=checkpoint,
        manifest=_manifest_sum(models, checkpoint),
        token=lease.token,
    )
    history = [*history, entry]
    lease.check()
    pointer = Current(history=history, checksum=_checksum(history))
    models.write(CURRENT, pointer.model_dump_json(indent=1).encode())


def rollback(models: Folder, lease: Lease) -> tuple[str, str]:
    """Make the model current again that was before this one.

    Returns:
        Names of the former and the new current model.

    Raises:
        UserError: there is none before, or its weights are gone.
    """
    current = read_current(models)
    earlier = former_models(current) if current else []
    if current is None or not earlier:
        raise UserError(f"{models.url}: there is no model before the current one to go back to")
    promote(models, lease, earlier[0], f"rolled back from {current.model}")
    return current.model, earlier[0]


def former_models(current: Current) -> list[str]:
    """Models that were current before this one, the newest first.

    One that was rolled back from does not count: a roll-back takes it off the list.
    """
    stack: list[str] = []
    for entry in current.history:
        if len(stack) > 1 and stack[-2] == entry.model:
            stack.pop()
        else:
            stack.append(entry.model)
    return list(dict.fromkeys(reversed(stack[:-1])))


def adopt(models: Folder, lease: Lease, run: str, model: str) -> None:
    """Take the newest checkpoint of a training run in as a model, with the index of its data.

    Raises:
        UserError: there is a model of that name, no checkpoint, or no data set any more.
    """
    if models.exists(f"{model}/{INDEX_NAME}"):
        raise UserError(
            f"{models.url}/{model}: there is such a model; promote it by that name, or give "
            "the run another --name"
        )
    source = find_checkpoint(run)
    config = read_config(source)
    index = read_index(config.data.url)
    lease.check()
    fork_checkpoint(source, config, run_folder(models, model))
    models.write(f"{model}/{INDEX_NAME}", index.model_dump_json(indent=1).encode())


def run_folder(models: Folder, model: str) -> str:
    """Where a model was trained."""
    return f"{models.url}/{model}/{RUN}"


def names_of(models: Folder) -> list[str]:
    """Models and candidates, in the order of their names."""
    return [name for name in models.names() if models.exists(f"{name}/{INDEX_NAME}")]


def _manifest_sum(models: Folder, checkpoint: str) -> str:
    try:
        content = models.read(f"{checkpoint}/{MANIFEST}")
    except FileNotFoundError:
        raise UserError(f"{models.url}/{checkpoint}: the checkpoint is gone") from None
    return hashlib.sha256(content).hexdigest()


def _checksum(history: list[Promotion]) -> str:
    facts = [entry.model_dump(mode="json") for entry in history]
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
