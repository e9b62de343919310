"""The models folder: the models and candidates, and which model is current.

::

    current.json            the pointer: current model, history of promotions, anchor, checksum
    lease/                  which process may write
    NAME/                   a model or a candidate
      index.arrow           the data set that it was trained on, with its holdout
      rejected.csv          the videos that packing had rejected until then
      job.json              what the candidate was made from
      run/                  its training run, with checkpoints
      data.json evaluation.json verdict.json report.html report.json    see ``job``

The pointer is replaced atomically: a reader sees the old or the new one.
"""

import hashlib
import importlib.metadata
import json
from datetime import UTC, datetime
from typing import TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from prioritycut_ray.data.index import ClipIndex, has_index, read_index, write_index
from prioritycut_ray.errors import UserError
from prioritycut_ray.packing.workspace import REJECTED_NAME
from prioritycut_ray.runs.locate import find_checkpoint, read_config
from prioritycut_ray.runs.manifest import MANIFEST
from prioritycut_ray.storage.folder import Folder
from prioritycut_ray.storage.lease import Lease
from prioritycut_ray.training.checkpoint import check_weights, fork_checkpoint
from prioritycut_ray.validation import describe_problems

CURRENT = "current.json"
RUN = "run"

Record = TypeVar("Record", bound=BaseModel)


class Promotion(BaseModel):
    """One entry in the history of the pointer.

    Attributes:
        model: name of the promoted model.
        at: time of the promotion, ISO 8601.
        reason: the reason, in one line.
        checkpoint: path of the model's checkpoint, relative to the models folder.
        manifest: SHA-256 of the checkpoint's manifest, which has the checksums of its files.
        token: fencing token of the lease that was held.
    """

    model_config = ConfigDict(frozen=True)

    model: str
    at: datetime
    reason: str
    checkpoint: str
    manifest: str
    token: int


class Anchor(BaseModel):
    """The pinned model: every candidate is compared with it too, so that losses do not add up.

    Attributes:
        model: name of the pinned model.
        at: when it was pinned, ISO 8601.
        checkpoint: path of the model's checkpoint, relative to the models folder.
        manifest: SHA-256 of the checkpoint's manifest.
        compared: the candidates that were compared with it, in order: each spends a part of the
            gate's error rate.
    """

    model_config = ConfigDict(frozen=True)

    model: str
    at: datetime
    checkpoint: str
    manifest: str
    compared: list[str] = []


class Current(BaseModel):
    """The pointer: the history of promotions, of which the last one is in force, and the anchor.

    Attributes:
        history: promotions and rollbacks, in order.
        anchor: see :class:`Anchor`; the first promoted model until another is pinned.
        checksum: SHA-256 of the history and the anchor.
    """

    model_config = ConfigDict(frozen=True)

    history: list[Promotion]
    anchor: Anchor
    checksum: str

    @property
    def model(self) -> str:
        """Name of the current model."""
        return self.history[-1].model


def read_current(models: Folder) -> Current | None:
    """Return the pointer, or None if no model has been promoted.

    Raises:
        UserError: the pointer is damaged.
    """
    if not models.exists(CURRENT):
        return None
    try:
        current = Current.model_validate_json(models.read(CURRENT))
    except ValidationError as error:
        raise _damaged(models, describe_problems(error, Current)) from error
    if current.checksum != _checksum(current.history, current.anchor):
        raise _damaged(models, "the checksum does not match")
    return current


def _damaged(models: Folder, reason: str) -> UserError:
    return UserError(
        f"{models.url}/{CURRENT}: is damaged ({reason}); restore it from a backup, or remove it "
        "and promote a model again"
    )


def current_model(models: Folder) -> tuple[str, str]:
    """Return the name of the current model, and the path or URL of its checkpoint.

    Raises:
        UserError: there is no current model, or its checkpoint is not the promoted one.
    """
    entry = _pointer(models).history[-1]
    if _manifest_sum(models, entry.checkpoint) != entry.manifest:
        raise UserError(
            f"{models.url}/{entry.checkpoint}: has changed since it was promoted; roll back with "
            "`prioritycut models rollback`"
        )
    return entry.model, f"{models.url}/{entry.checkpoint}"


def anchor_checkpoint(models: Folder) -> str:
    """Return the path or URL of the anchor's checkpoint.

    Raises:
        UserError: there is no current model, or the checkpoint is not the pinned one.
    """
    anchor = _pointer(models).anchor
    if _manifest_sum(models, anchor.checkpoint) != anchor.manifest:
        raise UserError(
            f"{models.url}/{anchor.checkpoint}: has changed since it was pinned; pin another model "
            "with `prioritycut models pin`"
        )
    return f"{models.url}/{anchor.checkpoint}"


def _pointer(models: Folder) -> Current:
    current = read_current(models)
    if current is None:
        raise UserError(
            f"{models.url}: there is no current model; promote the first one from a training run "
            f"with `prioritycut models promote RUN --models {models.url}`"
        )
    return current


def promote(models: Folder, lease: Lease, model: str, reason: str) -> None:
    """Make a model current; the first one becomes the anchor too. Idempotent.

    Raises:
        UserError: the model has no complete checkpoint, or its weights are NaN or infinite.
        Superseded: the lease was lost.
    """
    current = read_current(models)
    if current and current.model == model:
        return
    entry = _promotion(models, lease, model, reason)
    if current:
        _write_pointer(models, lease, [*current.history, entry], current.anchor)
    else:
        _write_pointer(models, lease, [entry], _anchor_at(entry))


def pin(models: Folder, lease: Lease, model: str | None = None) -> str:
    """Make a model the anchor; from then on, the gate's error rate is spent anew.

    Args:
        models: the models folder.
        lease: the lease of this process.
        model: its name; the current model by default.

    Returns:
        Its name.

    Raises:
        UserError: there is no current model, or the model has no complete checkpoint.
    """
    current = _pointer(models)
    entry = _promotion(models, lease, model or current.model, "pinned")
    _write_pointer(models, lease, current.history, _anchor_at(entry))
    return entry.model


def count_comparison(models: Folder, lease: Lease, candidate: str) -> int:
    """Record that a candidate is compared with the anchor. Idempotent.

    Returns:
        The number of the comparison since the anchor was pinned, from 1.
    """
    current = _pointer(models)
    anchor = current.anchor
    if candidate not in anchor.compared:
        anchor = anchor.model_copy(update={"compared": [*anchor.compared, candidate]})
        _write_pointer(models, lease, current.history, anchor)
    return anchor.compared.index(candidate) + 1


def rollback(models: Folder, lease: Lease) -> tuple[str, str]:
    """Roll back to the previously promoted model, and pin it.

    Returns:
        Names of the former and the new current model.

    Raises:
        UserError: there is no earlier model, or its weights were removed.
    """
    current = read_current(models)
    earlier = former_models(current) if current else []
    if current is None or not earlier:
        raise UserError(
            f"{models.url}: there is no earlier model to roll back to; `prioritycut models list` "
            "shows the history"
        )
    entry = _promotion(models, lease, earlier[0], f"rolled back from {current.model}")
    _write_pointer(models, lease, [*current.history, entry], _anchor_at(entry))
    return current.model, entry.model


def _promotion(models: Folder, lease: Lease, model: str, reason: str) -> Promotion:
    """Check a model's newest checkpoint, and return its entry for the history."""
    directory = find_checkpoint(run_folder(models, model))
    check_weights(directory)
    checkpoint = f"{model}/{RUN}/{directory.name}"
    return Promotion(
        model=model,
        at=datetime.now(UTC),
        reason=reason,
        checkpoint=checkpoint,
        manifest=_manifest_sum(models, checkpoint),
        token=lease.token,
    )


def _anchor_at(entry: Promotion) -> Anchor:
    return Anchor(**entry.model_dump(include={"model", "at", "checkpoint", "manifest"}))


def _write_pointer(models: Folder, lease: Lease, history: list[Promotion], anchor: Anchor) -> None:
    pointer = Current(history=history, anchor=anchor, checksum=_checksum(history, anchor))
    lease.check()
    models.write(CURRENT, pointer.model_dump_json(indent=1).encode())


def former_models(current: Current) -> list[str]:
    """Return the models that were current before this one, newest first.

    A rollback removes the model that was rolled back from.
    """
    stack: list[str] = []
    for entry in current.history:
        if len(stack) > 1 and stack[-2] == entry.model:
            stack.pop()
        else:
            stack.append(entry.model)
    return list(dict.fromkeys(reversed(stack[:-1])))


def adopt(models: Folder, lease: Lease, run: str, model: str) -> None:
    """Add a checkpoint of a training run as a model, with the index of its data set.

    Args:
        models: the models folder.
        lease: the lease of this process.
        run: the run, for its newest checkpoint, or ``RUN/best``.
        model: name of the model.

    Raises:
        UserError: a model of this name exists, or the run has no checkpoint or no data set.
    """
    if has_index(models.names(model)):
        raise UserError(
            f"{models.url}/{model}: this model already exists; promote it by this name, or choose "
            "another with --name"
        )
    source = find_checkpoint(run)
    config = read_config(source)
    index = read_index(config.data.url)
    lease.check()
    fork_checkpoint(source, config, run_folder(models, model))
    record_data(models, model, index, config.data.url)


def record_data(models: Folder, model: str, index: ClipIndex, data: str) -> None:
    """Write the index of a model's data set, and the list of videos that packing rejected.

    Args:
        models: the models folder.
        model: name of the model or candidate.
        index: of the data set.
        data: folder of the data set.
    """
    folder = Folder(data)
    rejected = folder.read(REJECTED_NAME) if folder.exists(REJECTED_NAME) else b"file,reason\n"
    models.write(f"{model}/{REJECTED_NAME}", rejected)
    write_index(index, f"{models.url}/{model}")


def run_folder(models: Folder, model: str) -> str:
    """Return the path or URL of a model's training run."""
    return f"{models.url}/{model}/{RUN}"


def read_record(models: Folder, path: str, kind: type[Record]) -> Record:
    """Read one of the JSON files of a candidate.

    Raises:
        UserError: the file is damaged, or was written by an incompatible version.
    """
    try:
        return kind.model_validate_json(models.read(path))
    except ValidationError as error:
        version = importlib.metadata.version("prioritycut_ray")
        raise UserError(
            f"{models.url}/{path}: cannot be read by prioritycut_ray {version} "
            f"({describe_problems(error, kind)}); use the version that wrote it, or remove the "
            "candidate's folder"
        ) from error


def model_names(models: Folder) -> list[str]:
    """Return the names of all models and candidates, sorted."""
    return [name for name in models.names() if has_index(models.names(name))]


def _manifest_sum(models: Folder, checkpoint: str) -> str:
    try:
        content = models.read(f"{checkpoint}/{MANIFEST}")
    except FileNotFoundError:
        raise UserError(
            f"{models.url}/{checkpoint}: the checkpoint does not exist; restore it from a backup, "
            "or roll back with `prioritycut models rollback`"
        ) from None
    return hashlib.sha256(content).hexdigest()


def _checksum(history: list[Promotion], anchor: Anchor) -> str:
    facts = [*(entry.model_dump(mode="json") for entry in history), anchor.model_dump(mode="json")]
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
