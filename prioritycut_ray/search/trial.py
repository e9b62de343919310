"""One trial: trained by :mod:`prioritycut_ray.launch` from report to report, evaluated at each.

Between two reports a trial is a run like any other. At a report nothing of it is running: what Ray
Tune stops or changes there leaves no worker and no placement group behind.
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

from prioritycut_ray.config import Config
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
from prioritycut_ray.search.space import Objective, SearchConfig, boundaries, trial_config
from prioritycut_ray.storage.folder import Folder
from prioritycut_ray.training.checkpoint import fork_checkpoint

logger = logging.getLogger(__name__)

OBJECTIVE = "objective"
SAMPLES = "samples"
_POINTER = "trial.json"


class Plan(NamedTuple):
    """What all trials of a search share.

    Attributes:
        search: the search.
        base: the configuration that trials change, with absolute paths.
        runs: folder of the trials' runs, a path or an fsspec URL.
    """

    search: SearchConfig
    base: Config
    runs: str


class Pointer(BaseModel):
    """What Ray Tune keeps as a trial's checkpoint: where the real one is.

    Attributes:
        trial: that reported it.
        run: name of its run.
        parameters: that it was trained with.
        checkpoint: path or URL of the run's checkpoint.
        samples: that were seen by then.
    """

    trial: str
    run: str
    parameters: dict[str, Any]
    checkpoint: str
    samples: int


def run_trial(parameters: dict[str, Any], *, plan: Plan) -> None:
    """Train and evaluate one point of the space; the trainable of Ray Tune.

    It begins where its last report stands. Reports that were made before, and lost with the driver,
    are made again from what is stored, without training.

    Args:
        parameters: by dotted key, and the variant's name.
        plan: see :class:`Plan`.
    """
    trial = tune.get_context().get_trial_id()
    pointer = _pointer()
    name = _run_name(trial, parameters, pointer)
    config = trial_config(plan.base, plan.search, parameters, name, plan.runs)
    reports = boundaries(config, plan.search.reports)
    done = pointer.samples if pointer else 0
    if pointer is not None and pointer.run != name:
        fork_checkpoint(local_copy(pointer.checkpoint), config, config.run)
    # With none ahead, the last one is made again: where a trial starts again, Ray Tune takes its
    # log from storage, and loses what was not copied there yet.
    for samples in [at for at in reports if at > done] or reports[-1:]:
        until = config.model_copy(
            update={"train": config.train.model_copy(update={"samples": samples})}
        )
        report = _evaluated(until, plan.search.objective)
        new = Pointer(
            trial=trial,
            run=name,
            parameters=parameters,
            checkpoint=report.checkpoint,
            samples=samples,
        )
        with TemporaryDirectory() as folder:
            Path(folder, _POINTER).write_text(new.model_dump_json())
            tune.report(report.metrics(samples), checkpoint=tune.Checkpoint.from_directory(folder))


def _pointer() -> Pointer | None:
    checkpoint = tune.get_checkpoint()
    if checkpoint is None:
        return None
    with checkpoint.as_directory() as folder:
        return Pointer.model_validate_json(Path(folder, _POINTER).read_text())


def _run_name(trial: str, parameters: Mapping[str, Any], pointer: Pointer | None) -> str:
    """Name of the run to go on with; a new one where a trial takes over another's weights."""
    if pointer is None:
        return trial
    if pointer.trial == trial and pointer.parameters == parameters:
        return pointer.run
    origin = json.dumps([pointer.checkpoint, dict(parameters)], sort_keys=True)
    return f"{trial}-{hashlib.sha256(origin.encode()).hexdigest()[:8]}"


class Report(BaseModel):
    """The evaluation of a trial at one report.

    Attributes:
        objective: key of the metric that is the objective.
        checkpoint: path or URL of the one that was evaluated.
        estimates: mean over clips by metric.
    """

    objective: str
    checkpoint: str
    estimates: dict[str, Estimate]

    def metrics(self, samples: int) -> dict[str, Any]:
        """What Ray Tune is told."""
        own = self.estimates[self.objective]
        values = {key: estimate.value for key, estimate in self.estimates.items()}
        return {
            OBJECTIVE: own.value,
            SAMPLES: samples,
            "low": own.low,
            "high": own.high,
            **{f"metrics/{key}": value for key, value in values.items() if value is not None},
        }


def _samples(run: str) -> int:
    """Frame pairs that a run's newest checkpoint has seen; 0 if there is none."""
    return read_progress(find_checkpoint(run)).samples if has_checkpoint(run) else 0


def _evaluated(config: Config, objective: Objective) -> Report:
    """Train up to a report and evaluate; what was done before is not done again."""
    storage, name = Folder(config.run), f"reports/{config.train.samples:09d}.json"
    if storage.exists(name):
        return _checked(Report.model_validate_json(storage.read(name)), config, objective)
    if _samples(config.run) < config.train.samples:
        try:
            launch(config, lambda metrics: None, partial(logger.warning, "%s: %s", config.name))
        except RunFailed as failed:
            # How to resume is for the search to say, not for the trial.
            raise UserError(failed.summary) from failed
    checkpoint = locate_checkpoint(config.run)
    evaluation, _ = evaluate_runs(
        [checkpoint],
        config.data.url,
        split=objective.split,
        measures=Measures(objective.lpips, objective.faces),
        # As many as the workers that have just ended: their room is this trial's.
        mapper=partial(map_tasks, workers=config.train.worker_range[0]),
        on_clip=lambda done, total, key: None,
    )
    scores = next(model for model in evaluation.models if model.checkpoint)
    report = _checked(
        Report(objective=objective.metric, checkpoint=checkpoint, estimates=scores.mean_over_clips),
        config,
        objective,
    )
    storage.write(name, report.model_dump_json(indent=1).encode())
    return report


def _checked(report: Report, config: Config, objective: Objective) -> Report:
    """Let a trial fail whose objective is not a finite number: nothing can be compared with it.

    Raises:
        UserError: it is not.
    """
    value = report.estimates[objective.metric].value
    if value is None:
        raise UserError(
            f"{config.run}: {objective.metric} is defined on no frame of split "
            f"{objective.split!r}; choose another objective.metric"
        )
    if not math.isfinite(value):
        raise UserError(
            f"{config.run}: {objective.metric} is {value} after {config.train.samples} samples: "
            "the training diverged; lower optim.lr or set optim.max_grad_norm"
        )
    return report
