"""The six steps of a retraining; each leaves a file in the candidate's folder and runs once."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from pydantic import BaseModel

from prioritycut_ray.config import Config
from prioritycut_ray.data.index import clips_of, read_index
from prioritycut_ray.data.shards import read_clip
from prioritycut_ray.evaluation.tables import difference_text, estimate_text
from prioritycut_ray.retraining.comparison import Comparison, Models, compare
from prioritycut_ray.retraining.data_check import (
    DataCheck,
    Probes,
    check_data,
    probe_clips,
    rejected_files,
    sort_clips,
)
from prioritycut_ray.retraining.gate import GateCheck, Verdict, judge, verdict
from prioritycut_ray.retraining.job import (
    DATA,
    EVALUATION,
    PROBES,
    REPORT,
    REPORT_PAGE,
    VERDICT,
    NothingNew,
    RetrainingJob,
    candidate_config,
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
    decision = comparison = data = None
    if current_model_changed(models, job):
        reason = f"{job.current} is no longer the current model"
    elif (data := _data_of(models, job, lease, say)).problems:
        decision = _stored(models, job, VERDICT, Verdict) or _refuse_data(models, job, lease, data)
        reason = decision.reason
    else:
        decision, comparison = _train_and_decide(models, job, lease, data, say)
        reason = decision.reason

    say("[6/6] reporting")
    current = read_current(models)
    report = make_report(job, current.model if current else "", reason, decision, comparison, data)
    _write_report(models, job, lease, report)
    for problem in _notify(job.settings, report):
        say(f"warning: {problem}; the result is not affected")
    removed = finish(models, job, lease)
    if removed:
        say(f"weights removed: {', '.join(removed)}")
    say(f"{report.outcome}: {reason}")
    say(f"Report: {models.url}/{job.candidate}/{REPORT_PAGE}")
    return report


def _train_and_decide(
    models: Folder, job: RetrainingJob, lease: Lease, data: DataCheck, say: Print
) -> tuple[Verdict, Comparison]:
    """Run steps 3 to 5."""
    say(
        f"[3/6] training {job.candidate} from {job.current}: {job.new_clips} new clips, "
        f"{job.settings.budget} frame pairs"
    )
    train_candidate(models, job, lease, _train)

    say(f"[4/6] comparing it with {job.current}")
    comparison = _stored(models, job, EVALUATION, Comparison)
    # The anchor may have been pinned after an earlier process had compared.
    if comparison is None or comparison.anchor != anchor_checkpoint(models):
        comparison = _compare(models, job, lease, data)

    say("[5/6] deciding")
    decision = _stored(models, job, VERDICT, Verdict) or _judge(models, job, lease, comparison)
    if decision.promote:
        promote(models, lease, job.candidate, decision.reason)
        _keep_probes(models, job)
    return decision, comparison


# Ray is imported late: on most nights there is nothing to do with it.


def _train(config: Config) -> str:
    from prioritycut_ray.launch.train import train

    return train(config)


def _map(function: Callable[[Any], Any], items: Sequence[Any]) -> Iterable[Any]:
    from prioritycut_ray.ray_cluster.tasks import map_tasks

    return map_tasks(function, items, workers=None)


def _data_of(models: Folder, job: RetrainingJob, lease: Lease, say: Print) -> DataCheck:
    """Check the data of the night, and say what was found."""
    data = _stored(models, job, DATA, DataCheck) or _check_data(models, job, lease)
    for figure in data.figures:
        say(figure.text)
    for key, reason in data.leaks.items():
        say(f"warning: {key} is left out of the holdout: it {reason}")
    return data


def _check_data(models: Folder, job: RetrainingJob, lease: Lease) -> DataCheck:
    settings, split = job.settings, candidate_config(models, job).data.split
    index = read_index(f"{models.url}/{job.candidate}")
    seen = read_index(f"{models.url}/{job.current}")
    trained, held_out = clips_of(index, split), clips_of(index, settings.holdout)
    night = sort_clips(trained, held_out, seen)
    cache = f"{job.current}/{PROBES}"
    known = read_record(models, cache, Probes) if models.exists(cache) else Probes({})
    probes = probe_clips(settings.data, night.clips, settings.faces, known, _map)
    lease.check()
    models.write(cache, probes.model_dump_json().encode())
    now, before = (rejected_files(f"{models.url}/{name}") for name in (job.candidate, job.current))
    if before is not None:
        night = night._replace(rejected=len({*(now or ())} - {*before}))
    check = check_data(night, probes, settings.data_gate)
    _store(models, job, lease, DATA, check)
    return check


def _refuse_data(models: Folder, job: RetrainingJob, lease: Lease, data: DataCheck) -> Verdict:
    """Refuse the night before anything is trained."""
    result = Verdict(
        promote=False,
        reason=f"data_gate: {'; '.join(data.problems)}",
        night=0,
        checks=[GateCheck(passed=figure.passed, text=figure.text) for figure in data.figures],
    )
    _store(models, job, lease, VERDICT, result)
    return result


def _keep_probes(models: Folder, job: RetrainingJob) -> None:
    """Move what was seen of the clips from the former to the new current model."""
    if models.exists(f"{job.current}/{PROBES}"):
        models.write(f"{job.candidate}/{PROBES}", models.read(f"{job.current}/{PROBES}"))
        models.remove(f"{job.current}/{PROBES}")


def _compare(models: Folder, job: RetrainingJob, lease: Lease, data: DataCheck) -> Comparison:
    candidate = locate_checkpoint(run_folder(models, job.candidate))
    comparison = compare(
        Models(job.checkpoint, candidate, anchor_checkpoint(models)),
        job.settings,
        read_index(f"{models.url}/{job.candidate}"),
        read_index(f"{models.url}/{job.current}"),
        data.leaks,
        _map,
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
