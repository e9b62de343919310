"""The work on one candidate: found, trained, finished.

Everything that a later step depends on is pinned by ``job.json`` and the index beside it. Clips
that arrive in the meantime are left for the next retraining.
"""

import hashlib
import json
from collections.abc import Callable
from datetime import UTC, datetime

from pydantic import BaseModel, ConfigDict

from prioritycut_ray.config import (
    Config,
    apply_overrides,
    as_words,
    parse_config,
)
from prioritycut_ray.data.index import ClipIndex, clips_of, read_index, were_seen
from prioritycut_ray.errors import UserError
from prioritycut_ray.evaluation.measures import Measures, selected_metrics
from prioritycut_ray.retraining.gate import Verdict, check_rules
from prioritycut_ray.retraining.registry import (
    RUN,
    current_model,
    former_models,
    model_names,
    read_current,
    read_record,
    record_data,
    run_folder,
)
from prioritycut_ray.retraining.settings import RetrainSettings
from prioritycut_ray.runs.compatibility import NETWORK_KEYS, changed_keys
from prioritycut_ray.runs.locate import (
    find_checkpoint,
    has_checkpoint,
    read_config,
    read_progress,
)
from prioritycut_ray.storage.folder import Folder
from prioritycut_ray.storage.lease import Lease
from prioritycut_ray.training.checkpoint import fork_checkpoint

JOB = "job.json"
DATA = "data.json"
PROBES = "probes.json"
EVALUATION = "evaluation.json"
VERDICT = "verdict.json"
REPORT = "report.json"
REPORT_PAGE = "report.html"
DONE = "done.json"


class RetrainingJob(BaseModel):
    """What a candidate is made from: the content of ``job.json``.

    Attributes:
        candidate: name of the candidate.
        current: the model that it is trained from and compared with.
        checkpoint: path or URL of that model's checkpoint.
        settings: the settings of the retraining.
        new_clips: number of new clips in the training split.
        samples: number of samples at which the training ends.
        begun: when the job was created, ISO 8601.
    """

    model_config = ConfigDict(frozen=True)

    candidate: str
    current: str
    checkpoint: str
    settings: RetrainSettings
    new_clips: int
    samples: int
    begun: datetime


class NothingNew(BaseModel):
    """The reason why there is nothing to do."""

    reason: str


def find_job(models: Folder, settings: RetrainSettings, lease: Lease) -> RetrainingJob | NothingNew:
    """Return an interrupted job, or a new one if there are new clips (step 2).

    Raises:
        UserError: there is no current model, the data set cannot be read, or the settings are
            invalid.
    """
    interrupted = unfinished_job(models)
    if interrupted is not None:
        return interrupted
    name, checkpoint = current_model(models)
    config = read_config(find_checkpoint(checkpoint))
    index = read_index(settings.data)
    clips_of(index, settings.holdout)
    if config.data.split == settings.holdout:
        raise UserError(
            f"holdout={settings.holdout}: the current model was trained on this split; use another"
        )
    seen = read_index(f"{models.url}/{name}")
    fresh = count_new_clips(index, seen, config.data.split)
    if not fresh:
        return NothingNew(reason=f"{name} has seen all clips of split {config.data.split!r}")
    job = RetrainingJob(
        candidate=_candidate_name(name, index, settings),
        current=name,
        checkpoint=checkpoint,
        settings=settings,
        new_clips=fresh,
        samples=read_progress(find_checkpoint(checkpoint)).samples + settings.budget,
        begun=datetime.now(UTC),
    )
    # Reject invalid settings before anything is written.
    candidate_config(models, job)
    check_rules(
        selected_metrics(Measures(settings.lpips, settings.faces, settings.transfer)), settings.gate
    )
    # Without a verdict it was abandoned, because another model had become the current one.
    if models.exists(f"{job.candidate}/{VERDICT}"):
        verdict = read_record(models, f"{job.candidate}/{VERDICT}", Verdict)
        if not verdict.night:
            return NothingNew(reason=f"these clips were refused before: {verdict.reason}")
        outcome = "rolled back" if verdict.promote else f"refused: {verdict.reason}"
        return NothingNew(
            reason=f"candidate {job.candidate} was trained on these clips before and {outcome}"
        )
    lease.check()
    record_data(models, job.candidate, index, settings.data)
    models.write(f"{job.candidate}/{JOB}", job.model_dump_json(indent=1).encode())
    models.remove(f"{job.candidate}/{DONE}")
    return job


def unfinished_job(models: Folder) -> RetrainingJob | None:
    """Return the interrupted job, or None."""
    for name in model_names(models):
        if models.exists(f"{name}/{JOB}") and not models.exists(f"{name}/{DONE}"):
            return read_job(models, name)
    return None


def read_job(models: Folder, candidate: str) -> RetrainingJob:
    """Return the job of a candidate."""
    return read_record(models, f"{candidate}/{JOB}", RetrainingJob)


def newest_job(models: Folder) -> RetrainingJob | None:
    """Return the job that was begun last, or None."""
    jobs = [read_job(models, n) for n in model_names(models) if models.exists(f"{n}/{JOB}")]
    return max(jobs, key=lambda job: job.begun, default=None)


def count_new_clips(index: ClipIndex, seen: ClipIndex, split: str) -> int:
    """Count the clips of a split whose key and checksum are not in another index."""
    clips = index.clips_of(split)
    return len(clips) - int(were_seen(clips, seen).sum())


def _candidate_name(current: str, index: ClipIndex, settings: RetrainSettings) -> str:
    """Return a name that depends on the current model, the data and the settings only."""
    relevant = settings.model_dump(
        mode="json", include={"holdout", "budget", "replay", "set", "gate", "data_gate"}
    )
    facts = json.dumps([current, index.fingerprint, relevant], sort_keys=True)
    return f"candidate-{hashlib.sha256(facts.encode()).hexdigest()[:10]}"


def candidate_config(models: Folder, job: RetrainingJob) -> Config:
    """Return the candidate's configuration: the current model's, with the changes of the job.

    Raises:
        UserError: the settings change the networks.
    """
    settings, folder = job.settings, f"{models.url}/{job.candidate}"
    before = read_config(find_checkpoint(job.checkpoint)).model_dump(mode="json")
    own = {
        "name": RUN,
        "storage": folder,
        "data.url": settings.data,
        "data.index": folder,
        "data.known": f"{models.url}/{job.current}",
        "data.replay": settings.replay,
        "train.samples": job.samples,
    }
    tree = apply_overrides(before, as_words(settings.set | own))
    config = parse_config(tree, "set")
    networks = [
        key
        for key in changed_keys(before, config.model_dump(mode="json"))
        if key.startswith(NETWORK_KEYS)
    ]
    if networks:
        raise UserError(
            f"set: {', '.join(networks)} changes the networks, which a warm start cannot do; train "
            "a new model with `prioritycut train` and promote it"
        )
    return config


def train_candidate(
    models: Folder, job: RetrainingJob, lease: Lease, train: Callable[[Config], str]
) -> None:
    """Train the candidate from the current model's checkpoint, or resume its training (step 3).

    Args:
        models: the models folder.
        job: the job of the candidate.
        lease: the lease of this process.
        train: starts or resumes a training run.
    """
    config = candidate_config(models, job)
    run = run_folder(models, job.candidate)
    lease.check()
    if not has_checkpoint(run):
        fork_checkpoint(find_checkpoint(job.checkpoint), config, run)
    if read_progress(find_checkpoint(run)).samples < job.samples:
        train(config)


def current_model_changed(models: Folder, job: RetrainingJob) -> bool:
    """Return whether the current model has changed since the job began, for example by hand."""
    current = read_current(models)
    return current is None or current.model not in (job.current, job.candidate)


def finish(models: Folder, job: RetrainingJob, lease: Lease) -> list[str]:
    """Mark the job as done, and remove weights beyond ``settings.keep`` (the end of step 6).

    Returns:
        Names of the models whose weights were removed.
    """
    lease.check()
    models.write(f"{job.candidate}/{DONE}", b"{}")
    current = read_current(models)
    former = former_models(current) if current else []
    jobs = [
        read_job(models, name) for name in model_names(models) if models.exists(f"{name}/{DONE}")
    ]
    anchor = current.anchor.model if current else ""
    in_use = {*former, anchor, current.model if current else ""}
    refused = [
        job.candidate
        for job in sorted(jobs, key=lambda job: job.begun, reverse=True)
        if job.candidate not in in_use
    ]
    keep = job.settings.keep
    expendable = [name for name in former if name != anchor][keep:] + refused[keep:]
    removed = [name for name in expendable if models.exists(f"{name}/{RUN}")]
    for name in removed:
        lease.check()
        models.remove(f"{name}/{RUN}")
    return removed
