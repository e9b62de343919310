"""``prioritycut retrain``: the numbered steps, each told, each done once."""

from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel
from rich.console import Console

from prioritycut_ray.checkpoint import locate_checkpoint
from prioritycut_ray.config import Config, load_section
from prioritycut_ray.data.shards import read_index
from prioritycut_ray.paths import resolved
from prioritycut_ray.report import difference_text, estimate_text, render
from prioritycut_ray.retraining.comparison import Comparison, compare
from prioritycut_ray.retraining.gate import Verdict, judge
from prioritycut_ray.retraining.job import (
    EVALUATION,
    VERDICT,
    Job,
    NothingNew,
    find_job,
    finish,
    superseded,
    train_candidate,
)
from prioritycut_ray.retraining.lease import Lease, leased
from prioritycut_ray.retraining.notices import (
    RetrainReport,
    make_report,
    post,
    run_command,
    write_metrics,
)
from prioritycut_ray.retraining.registry import promote, read_current, run_folder
from prioritycut_ray.retraining.settings import RetrainSettings
from prioritycut_ray.run_storage import RunStorage

Stored = TypeVar("Stored", bound=BaseModel)


def retrain(file: str | Path, overrides: list[str], console: Console) -> RetrainReport | None:
    """Retrain the current model if there are new clips, and promote the result if it is no worse.

    Killed anywhere and run again, it ends with the same result.

    Args:
        file: YAML file of :class:`RetrainSettings`.
        overrides: changes to it.
        console: where the steps are told.

    Returns:
        The report; None if there was nothing new.

    Raises:
        LeaseHeld: another retraining is at work.
        UserError: something does not fit.
    """
    settings = load_section(RetrainSettings, str(file), overrides)
    places = {key: resolved(getattr(settings, key)) for key in ("models", "data")}
    if settings.metrics_file:
        places["metrics_file"] = resolved(settings.metrics_file)
    settings = settings.model_copy(update=places)
    models = RunStorage(settings.models)
    console.print(f"[1/6] lock of {models.url}", markup=False)
    with leased(models, settings.lease_seconds) as lease:
        console.print(f"[2/6] new clips in {settings.data}?", markup=False)
        found = find_job(models, settings, lease)
        if isinstance(found, NothingNew):
            console.print(f"nothing new: {found.reason}", markup=False)
            if settings.metrics_file:
                write_metrics(settings.metrics_file, None)
            return None
        return _make(models, found, lease, console)


def _make(models: RunStorage, job: Job, lease: Lease, console: Console) -> RetrainReport:
    verdict = comparison = None
    if superseded(models, job):
        reason = f"{job.current} is not the current model any more"
    else:
        console.print(
            f"[3/6] training {job.candidate} from {job.current}: {job.new_clips} new clips, "
            f"{job.settings.budget} frame pairs",
            markup=False,
        )
        train_candidate(models, job, lease, _train)
        console.print(f"[4/6] comparing it with {job.current}", markup=False)
        comparison = _stored(models, job, EVALUATION, Comparison) or _compare(models, job, lease)
        console.print("[5/6] deciding", markup=False)
        verdict = _stored(models, job, VERDICT, Verdict) or _judge(models, job, lease, comparison)
        reason = verdict.reason
        if verdict.promote:
            promote(models, lease, job.candidate, reason)
    console.print("[6/6] reporting", markup=False)
    current = read_current(models)
    report = make_report(job, current.model if current else "", reason, verdict, comparison)
    _tell(models, job, lease, report, console)
    removed = finish(models, job, lease)
    if removed:
        console.print(f"weights removed: {', '.join(removed)}", markup=False)
    console.print(f"{report.outcome}: {reason}", markup=False)
    console.print(f"Report: {models.url}/{job.candidate}/report.html", markup=False)
    return report


def _train(config: Config) -> str:
    from prioritycut_ray.commands.train import train  # Ray is not started where nothing is trained

    return train(config)


def _stored(models: RunStorage, job: Job, name: str, kind: type[Stored]) -> Stored | None:
    """What a step has left before this process began; None if it was not done yet."""
    path = f"{job.candidate}/{name}"
    return kind.model_validate_json(models.read(path)) if models.exists(path) else None


def _compare(models: RunStorage, job: Job, lease: Lease) -> Comparison:
    from prioritycut_ray.ray_tasks import map_tasks

    comparison = compare(
        job.checkpoint,
        locate_checkpoint(run_folder(models, job.candidate)),
        job.settings,
        read_index(f"{models.url}/{job.candidate}"),
        read_index(f"{models.url}/{job.current}"),
        lambda function, items: map_tasks(function, items, workers=None),
    )
    _store(models, job, lease, EVALUATION, comparison)
    return comparison


def _judge(models: RunStorage, job: Job, lease: Lease, comparison: Comparison) -> Verdict:
    verdict = judge(comparison.differences, comparison.metrics, job.settings.gate)
    _store(models, job, lease, VERDICT, verdict)
    return verdict


def _store(models: RunStorage, job: Job, lease: Lease, name: str, value: BaseModel) -> None:
    lease.check()
    models.write(f"{job.candidate}/{name}", value.model_dump_json(indent=1).encode())


def _tell(
    models: RunStorage, job: Job, lease: Lease, report: RetrainReport, console: Console
) -> None:
    _store(models, job, lease, "report.json", report)
    page = render(
        "retrain.html.j2",
        report=report,
        difference_text=difference_text,
        estimate_text=lambda metric, estimate: estimate_text(metric, estimate, estimate.frames),
    )
    models.write(f"{job.candidate}/report.html", page.encode())
    settings = job.settings
    if settings.metrics_file:
        write_metrics(settings.metrics_file, report)
    problems = [
        run_command(settings.command, report) if settings.command else "",
        post(settings.webhook, report) if settings.webhook else "",
    ]
    for problem in filter(None, problems):
        console.print(f"warning: {problem}; the result stands", markup=False)
