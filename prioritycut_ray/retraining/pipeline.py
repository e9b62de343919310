"""The six steps of a retraining; each leaves a file in the candidate's folder and runs once."""

from collections.abc import Callable

from pydantic import BaseModel

from prioritycut_ray.config import Config
from prioritycut_ray.data.index import clips_of, read_index
from prioritycut_ray.data.shards import read_clip
from prioritycut_ray.evaluation.tables import difference_text, estimate_text
from prioritycut_ray.retraining.comparison import Comparison, Models, compare
from prioritycut_ray.retraining.gate import GateCheck, Verdict, judge, verdict
from prioritycut_ray.retraining.job import (
    EVALUATION,
    REPORT,
    REPORT_PAGE,
    VERDICT,
    NothingNew,
    RetrainingJob,
    current_model_changed,
    find_job,
    finish,
    train_candidate,
)
from prioritycut_ray.retraining.notifications import (
    RetrainReport,
    make_report,
    post,
    run_command,
    write_metrics,
)
from prioritycut_ray.retraining.registry import (
    Record,
    anchor_checkpoint,
    count_comparison,
    promote,
    read_current,
    read_record,
    run_folder,
)
from prioritycut_ray.retraining.rehearsal import rehearse
from prioritycut_ray.retraining.settings import RetrainSettings
from prioritycut_ray.runs.locate import find_checkpoint, locate_checkpoint, read_config
from prioritycut_ray.storage.folder import Folder
from prioritycut_ray.storage.lease import Lease, leased
from prioritycut_ray.templates import render
from prioritycut_ray.video.random_access import read_all

Print = Callable[[str], None]


def retrain(settings: RetrainSettings, say: Print) -> RetrainReport | None:
    """Retrain the current model on new clips, and promote the result if it passes the gate.

    If the process is killed at any point, running it again gives the same result.

    Args:
        settings: the settings, with absolute paths.
        say: called with a line for each step.

    Returns:
        The report, or None if there are no new clips.

    Raises:
        LeaseHeld: another retraining is running.
        Superseded: the lease was lost.
        UserError: the settings, the data set or the current model is invalid.
    """
    models = Folder(settings.models)
    say(f"[1/6] acquiring the lease of {models.url}")
    with leased(models, settings.lease_seconds) as lease:
        say(f"[2/6] looking for new clips in {settings.data}")
        job = find_job(models, settings, lease)
        if isinstance(job, NothingNew):
            say(f"nothing new: {job.reason}")
            if settings.metrics_file:
                write_metrics(settings.metrics_file, None)
            return None
        return _finish_job(models, job, lease, say)


def _finish_job(models: Folder, job: RetrainingJob, lease: Lease, say: Print) -> RetrainReport:
    """Run the steps of a job that have not been run yet."""
    decision = comparison = None
    if current_model_changed(models, job):
        reason = f"{job.current} is no longer the current model"
    else:
        say(
            f"[3/6] training {job.candidate} from {job.current}: {job.new_clips} new clips, "
            f"{job.settings.budget} frame pairs"
        )
        train_candidate(models, job, lease, _train)

        say(f"[4/6] comparing it with {job.current}")
        comparison = _stored(models, job, EVALUATION, Comparison)
        # The anchor may have been pinned after an earlier process had compared.
        if comparison is None or comparison.anchor != anchor_checkpoint(models):
            comparison = _compare(models, job, lease)

        say("[5/6] deciding")
        decision = _stored(models, job, VERDICT, Verdict) or _judge(models, job, lease, comparison)
        reason = decision.reason
        if decision.promote:
            promote(models, lease, job.candidate, reason)

    say("[6/6] reporting")
    current = read_current(models)
    report = make_report(job, current.model if current else "", reason, decision, comparison)
    _write_report(models, job, lease, report)
    for problem in _notify(job.settings, report):
        say(f"warning: {problem}; the result is not affected")
    removed = finish(models, job, lease)
    if removed:
        say(f"weights removed: {', '.join(removed)}")
    say(f"{report.outcome}: {reason}")
    say(f"Report: {models.url}/{job.candidate}/{REPORT_PAGE}")
    return report


# Ray is imported late: on most nights there is nothing to do with it.


def _train(config: Config) -> str:
    from prioritycut_ray.launch.train import train

    return train(config)


def _compare(models: Folder, job: RetrainingJob, lease: Lease) -> Comparison:
    from prioritycut_ray.ray_cluster.tasks import map_tasks

    candidate = locate_checkpoint(run_folder(models, job.candidate))
    comparison = compare(
        Models(job.checkpoint, candidate, anchor_checkpoint(models)),
        job.settings,
        read_index(f"{models.url}/{job.candidate}"),
        read_index(f"{models.url}/{job.current}"),
        lambda function, items: map_tasks(function, items, workers=None),
    )
    _store(models, job, lease, EVALUATION, comparison)
    return comparison


def _judge(models: Folder, job: RetrainingJob, lease: Lease, comparison: Comparison) -> Verdict:
    night = count_comparison(models, lease, job.candidate)
    result = judge(comparison.changes, comparison.metrics, job.settings.gate, night)
    if result.promote:
        # A refused candidate need not show that it would run.
        result = verdict(night, [*_rehearse(models, job, comparison), *result.checks])
    _store(models, job, lease, VERDICT, result)
    return result


def _rehearse(models: Folder, job: RetrainingJob, comparison: Comparison) -> list[GateCheck]:
    """Animate the first held-out clip as in production."""
    candidate = locate_checkpoint(run_folder(models, job.candidate))
    key = comparison.changes[0].key
    clips = clips_of(read_index(f"{models.url}/{job.candidate}"), job.settings.holdout)
    clip = next(clip for clip in clips if clip.key == key)
    size = read_config(find_checkpoint(candidate)).data.size
    frames = read_all(read_clip(job.settings.data, clip), size)
    return rehearse(candidate, job.checkpoint, frames, job.settings.gate)


def _write_report(models: Folder, job: RetrainingJob, lease: Lease, report: RetrainReport) -> None:
    _store(models, job, lease, REPORT, report)
    page = render(
        "retrain.html.j2",
        report=report,
        difference_text=difference_text,
        estimate_text=lambda metric, estimate: estimate_text(metric, estimate, estimate.frames),
    )
    models.write(f"{job.candidate}/{REPORT_PAGE}", page.encode())


def _notify(settings: RetrainSettings, report: RetrainReport) -> list[str]:
    """Send the report to everyone in the settings; return what went wrong."""
    if settings.metrics_file:
        write_metrics(settings.metrics_file, report)
    problems = [
        run_command(settings.command, report) if settings.command else "",
        post(settings.webhook, report) if settings.webhook else "",
    ]
    return [problem for problem in problems if problem]


# The files of the steps.


def _stored(models: Folder, job: RetrainingJob, name: str, kind: type[Record]) -> Record | None:
    """Return the result of a step that an earlier process has completed, or None."""
    path = f"{job.candidate}/{name}"
    return read_record(models, path, kind) if models.exists(path) else None


def _store(models: Folder, job: RetrainingJob, lease: Lease, name: str, value: BaseModel) -> None:
    lease.check()
    models.write(f"{job.candidate}/{name}", value.model_dump_json(indent=1).encode())
