"""One trial: trained by :mod:`prioritycut_ray.launch` up to each report, and evaluated there.

Between two reports a trial is an ordinary training run. At a report none of its workers is running,
so a scheduler that stops the trial there leaves no worker and no placement group behind.
"""

import hashlib
import json
import logging
import math
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

from pydantic import BaseModel
from ray import tune

from prioritycut_ray.config import VALIDATION, Config
from prioritycut_ray.errors import UserError
from prioritycut_ray.evaluation.evaluate import evaluate_runs
from prioritycut_ray.evaluation.measures import Measures
from prioritycut_ray.launch.driver import launch
from prioritycut_ray.launch.failures import RunFailed
from prioritycut_ray.metrics.aggregate import Estimate
from prioritycut_ray.ray_cluster.tasks import map_tasks
from prioritycut_ray.runs.locate import (
    find_checkpoint,
    has_checkpoint,
    local_copy,
    locate_checkpoint,
    read_progress,
)
from prioritycut_ray.runs.verdicts import read_verdicts
from prioritycut_ray.search.space import Objective, SearchConfig, boundaries, trial_config
from prioritycut_ray.storage.folder import Folder
from prioritycut_ray.training.checkpoint import fork_checkpoint

logger = logging.getLogger(__name__)

OBJECTIVE = "objective"
SAMPLES = "samples"
_FILE = "trial.json"


class TrialContext(NamedTuple):
    """What all trials of a search share.

    Attributes:
        search: the search.
        base: the configuration that trials change, with absolute paths.
        runs: folder of the trials' runs: a path or an fsspec URL.
    """

    search: SearchConfig
    base: Config
    runs: str


class TrialCheckpoint(BaseModel):
    """The content of a trial's Ray Tune checkpoint: a reference to the run's own checkpoint.

    Attributes:
        trial: the trial that reported it.
        run: name of the trial's run.
        parameters: the parameters that it was trained with.
        checkpoint: path or URL of the run's checkpoint.
        samples: number of samples seen.
    """

    trial: str
    run: str
    parameters: dict[str, Any]
    checkpoint: str
    samples: int


def run_trial(parameters: dict[str, Any], *, context: TrialContext) -> None:
    """Train and evaluate one point of the space: the trainable of Ray Tune.

    The trial continues from its last report. Reports that were lost with the driver are repeated
    from what is stored, without training.

    Args:
        parameters: values by dotted key, and the name of the variant.
        context: see :class:`TrialContext`.
    """
    trial = tune.get_context().get_trial_id()
    stored = _stored_checkpoint()
    name = _run_name(trial, parameters, stored)
    config = trial_config(context.base, context.search, parameters, name, context.runs)
    reports = boundaries(config, context.search.reports)
    done = stored.samples if stored else 0
    if stored is not None and stored.run != name:
        fork_checkpoint(local_copy(stored.checkpoint), config, config.run)
    # Repeat the last report if none is left: Ray Tune reads a restarted trial's log from storage,
    # and loses reports that were not uploaded yet.
    for samples in [at for at in reports if at > done] or reports[-1:]:
        until = config.model_copy(
            update={"train": config.train.model_copy(update={"samples": samples})}
        )
        report = _evaluated(until, context.search.objective)
        new = TrialCheckpoint(
            trial=trial,
            run=name,
            parameters=parameters,
            checkpoint=report.checkpoint,
            samples=samples,
        )
        with TemporaryDirectory() as folder:
            Path(folder, _FILE).write_text(new.model_dump_json())
            tune.report(report.metrics(samples), checkpoint=tune.Checkpoint.from_directory(folder))


def _stored_checkpoint() -> TrialCheckpoint | None:
    checkpoint = tune.get_checkpoint()
    if checkpoint is None:
        return None
    with checkpoint.as_directory() as folder:
        return TrialCheckpoint.model_validate_json(Path(folder, _FILE).read_text())


def _run_name(trial: str, parameters: Mapping[str, Any], stored: TrialCheckpoint | None) -> str:
    """Return the name of the run to continue; a new run if the trial clones another's weights."""
    if stored is None:
        return trial
    if stored.trial == trial and stored.parameters == parameters:
        return stored.run
    origin = json.dumps([stored.checkpoint, dict(parameters)], sort_keys=True)
    return f"{trial}-{hashlib.sha256(origin.encode()).hexdigest()[:8]}"


class TrialReport(BaseModel):
    """The evaluation of a trial at one report.

    Attributes:
        objective: key of the metric that the search optimizes.
        checkpoint: path or URL of the checkpoint that was evaluated.
        estimates: mean over clips of each metric.
    """

    objective: str
    checkpoint: str
    estimates: dict[str, Estimate]

    def metrics(self, samples: int) -> dict[str, Any]:
        """Return the metrics that are reported to Ray Tune."""
        own = self.estimates[self.objective]
        values = {key: estimate.value for key, estimate in self.estimates.items()}
        return {
            OBJECTIVE: own.value,
            SAMPLES: samples,
            "low": own.low,
            "high": own.high,
            **{f"metrics/{key}": value for key, value in values.items() if value is not None},
        }


def _is_trained(config: Config) -> bool:
    """Whether the run has a checkpoint with all its samples, and was still learning at its end."""
    if not has_checkpoint(config.run):
        return False
    progress = read_progress(find_checkpoint(config.run))
    return progress.samples >= config.train.samples and not any(progress.skipped_in_a_row.values())


def _evaluated(config: Config, objective: Objective) -> TrialReport:
    """Train up to a report and evaluate, unless that is stored already."""
    folder, name = Folder(config.run), f"reports/{config.train.samples:09d}.json"
    if folder.exists(name):
        return _checked(TrialReport.model_validate_json(folder.read(name)), config, objective)
    if not _is_trained(config):
        try:
            launch(config, lambda metrics: None, partial(logger.warning, "%s: %s", config.name))
        except RunFailed as failed:
            # The search says how to resume, not the trial.
            raise UserError(failed.summary) from failed
    checkpoint = locate_checkpoint(config.run)
    estimates = (
        _validated(folder, checkpoint)
        if objective.metric.startswith(VALIDATION)
        else _measured(config, objective, checkpoint)
    )
    report = _checked(
        TrialReport(objective=objective.metric, checkpoint=checkpoint, estimates=estimates),
        config,
        objective,
    )
    folder.write(name, report.model_dump_json(indent=1).encode())
    return report


def _measured(config: Config, objective: Objective, checkpoint: str) -> dict[str, Estimate]:
    """Evaluate a checkpoint on the split of the objective."""
    evaluation, _ = evaluate_runs(
        [checkpoint],
        config.data.url,
        split=objective.split,
        measures=Measures(objective.lpips, objective.faces, objective.transfer),
        # The workers that have just ended leave this trial their resources.
        mapper=partial(map_tasks, workers=config.train.worker_range[0]),
        on_clip=lambda done, total, key: None,
    )
    return next(model for model in evaluation.models if model.checkpoint).mean_over_clips


def _validated(folder: Folder, checkpoint: str) -> dict[str, Estimate]:
    """Return what the training itself has measured, without intervals.

    Raises:
        UserError: the checkpoint has not been validated.
    """
    step = read_progress(find_checkpoint(checkpoint)).step
    verdict = next((v for v in read_verdicts(folder) if v.step == step), None)
    if verdict is None:
        raise UserError(
            f"{checkpoint}: the last validation failed; see its warnings, or set objective.metric "
            "to a metric that is evaluated after the training"
        )
    return {
        name: Estimate(
            value=value, low=None, high=None, clips=verdict.clips, frames=0, identities=0
        )
        for name, value in verdict.scores.items()
    }


def _checked(report: TrialReport, config: Config, objective: Objective) -> TrialReport:
    """Return the report if its objective is a finite number, which other trials compare with.

    Raises:
        UserError: the objective is undefined, NaN or infinite.
    """
    value = report.estimates[objective.metric].value
    if value is None:
        raise UserError(
            f"{config.run}: {objective.metric} is undefined on every frame of split "
            f"{objective.split!r}; choose another objective.metric"
        )
    if not math.isfinite(value):
        raise UserError(
            f"{config.run}: {objective.metric} is {value} after {config.train.samples} samples: "
            "the training diverged; lower optim.lr or set optim.max_grad_norm"
        )
    return report
