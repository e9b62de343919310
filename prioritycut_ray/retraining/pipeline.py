"""A retraining from its job to the promotion: each finished step is stored and not done again."""

from typing import TypeVar

from pydantic import BaseModel
from rich.console import Console

from prioritycut_ray.config import Config
from prioritycut_ray.data.shards import read_index
from prioritycut_ray.evaluation.tables import difference_text, estimate_text
from prioritycut_ray.retraining.comparison import Comparison, compare
from prioritycut_ray.retraining.gate import Verdict, judge
from prioritycut_ray.retraining.job import (
    EVALUATION,
    VERDICT,
    Job,
    finish,
    superseded,
    train_candidate,
)
from prioritycut_ray.retraining.notices import (
    RetrainReport,
    make_report,
    post,
    run_command,
    write_metrics,
)
from prioritycut_ray.retraining.registry import promote, read_current, run_folder
from prioritycut_ray.runs.locate import locate_checkpoint
from prioritycut_ray.storage.folder import Folder
from prioritycut_ray.storage.lease import Lease
from prioritycut_ray.templates import render

Stored = TypeVar("Stored", bound=BaseModel)


def make_candidate(models: Folder, job: Job, lease: Lease, console: Console) -> RetrainReport:
    """Do what is left of a job: train, compare, judge, promote or refuse, report."""
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
    from prioritycut_ray.launch.train import train

    return train(config)


def _stored(models: Folder, job: Job, name: str, kind: type[Stored]) -> Stored | None:
    """What a step has left before this process began; None if it was not done yet."""
    path = f"{job.candidate}/{name}"
    return kind.model_validate_json(models.read(path)) if models.exists(path) else None


def _compare(models: Folder, job: Job, lease: Lease) -> Comparison:
    from prioritycut_ray.ray_cluster.tasks import map_tasks

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


def _judge(models: Folder, job: Job, lease: Lease, comparison: Comparison) -> Verdict:
    verdict = judge(comparison.differences, comparison.metrics, job.settings.gate)
    _store(models, job, lease, VERDICT, verdict)
    return verdict


def _store(models: Folder, job: Job, lease: Lease, name: str, value: BaseModel) -> None:
    lease.check()
    models.write(f"{job.candidate}/{name}", value.model_dump_json(indent=1).encode())


def _tell(models: Folder, job: Job, lease: Lease, report: RetrainReport, console: Console) -> None:
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
