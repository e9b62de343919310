"""The results of a search: one row per trial, and the configuration of the best trial."""

import math
import re
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

from ray import tune

from prioritycut_ray.config import Config, dump_config
from prioritycut_ray.metrics.aggregate import Metric
from prioritycut_ray.ray_cluster.filesystem import ray_storage
from prioritycut_ray.search.space import SearchConfig, trial_config
from prioritycut_ray.search.trial import OBJECTIVE, SAMPLES
from prioritycut_ray.storage.folder import Folder


class ReportedObjective(NamedTuple):
    """The objective at one report of a trial.

    Attributes:
        samples: frame pairs seen by then.
        value: value of the objective.
        low: lower end of its 95 % interval; None without an interval.
        high: upper end.
    """

    samples: int
    value: float
    low: float | None
    high: float | None


class TrialResult(NamedTuple):
    """The outcome of a trial.

    Attributes:
        key: Ray Tune's name of the trial.
        parameters: values by dotted key, and the name of the variant, at the last report.
        status: how the trial ended.
        reason: why it failed; empty if it did not.
        points: the reports, in order.
        metrics: all metrics at the last report.
    """

    key: str
    parameters: dict[str, Any]
    status: Literal["finished", "stopped early", "failed", "unfinished"]
    reason: str
    points: list[ReportedObjective]
    metrics: dict[str, float]

    @property
    def last(self) -> ReportedObjective | None:
        """The last report, or None before the first."""
        return self.points[-1] if self.points else None


def collect(folder: Folder, samples: int) -> list[TrialResult]:
    """Read the trials that Ray Tune has stored, in the order in which they started.

    Args:
        folder: the folder of Ray Tune's files.
        samples: number of samples of a whole trial.
    """
    path, filesystem = ray_storage(folder)
    analysis = tune.ExperimentAnalysis(path, storage_filesystem=filesystem)
    frames = analysis.trial_dataframes
    # Ray Tune lists the trials in another order after a restore.
    trials = sorted(analysis.trials, key=_start_time)
    return [_trial(trial, frames.get(trial.trial_id), samples) for trial in trials]


def _start_time(trial: Any) -> float:
    """Return when a trial first started; infinity if it never did."""
    start: float | None = trial.run_metadata.start_time
    return math.inf if start is None else start


def _trial(trial: Any, frame: Any, samples: int) -> TrialResult:
    rows = [] if frame is None else frame.to_dict("records")
    # A report that was repeated after a restore replaces the first one.
    reports = {int(row[SAMPLES]): row for row in rows if row.get(OBJECTIVE) is not None}
    points = [_point(reports[seen]) for seen in sorted(reports)]
    last = reports[points[-1].samples] if points else {}
    if trial.status == "ERROR":
        status: Any = "failed"
    elif trial.status != "TERMINATED":
        status = "unfinished"
    else:
        status = "finished" if max(reports, default=0) >= samples else "stopped early"
    return TrialResult(
        key=trial.trial_id,
        # PBT may have assigned new values since the last report; none was trained with them yet.
        parameters={
            key: _or_none(last.get(f"config/{key}", value)) for key, value in trial.config.items()
        },
        status=status,
        reason=reason(trial.get_error() or "") if status == "failed" else "",
        points=points,
        metrics={
            key.removeprefix(_METRICS): float(value)
            for key, value in last.items()
            if key.startswith(_METRICS)
        },
    )


def _or_none(value: Any) -> Any:
    """Undo pandas' replacement of None by NaN."""
    return None if isinstance(value, float) and math.isnan(value) else value


def _point(row: dict[str, Any]) -> ReportedObjective:
    low, high = (None if (end := row.get(key)) is None or end != end else end for key in _ENDS)
    return ReportedObjective(int(row[SAMPLES]), float(row[OBJECTIVE]), low, high)


_METRICS = "metrics/"
_ENDS = ("low", "high")


def reason(trace: str) -> str:
    """Return the last line of a traceback: the exception, without its location."""
    return _OWN_ERROR.sub("", trace.strip().rsplit("\n", 1)[-1].strip())


_OWN_ERROR = re.compile(r"^prioritycut_ray(?:\.\w+)+: ")
"""The package's own errors are readable without the class name."""


def best_trial(trials: Sequence[TrialResult], metric: Metric) -> TrialResult | None:
    """Return the best trial that finished with a finite objective, or None."""
    finished = [
        (trial.last.value, trial)
        for trial in trials
        if trial.status == "finished" and trial.last and math.isfinite(trial.last.value)
    ]
    sign = -1 if metric.higher_is_better else 1
    _, best = min(finished, key=lambda pair: sign * pair[0], default=(None, None))
    return best


def best_config(search: SearchConfig, base: Config, trial: TrialResult) -> str:
    """Return a trial's configuration as YAML for ``prioritycut train``."""
    name = f"{search.name}-best"
    return dump_config(trial_config(base, search, trial.parameters, name, base.storage))


def table(trials: Sequence[TrialResult]) -> tuple[list[str], list[list[object]]]:
    """Return the header and one row per trial."""
    keys = list(dict.fromkeys(key for trial in trials for key in trial.parameters))
    metrics = list(dict.fromkeys(key for trial in trials for key in trial.metrics))
    header = ["trial", "status", *keys, "objective", "low", "high", "samples", *metrics, "reason"]
    rows: list[list[object]] = []
    for trial in trials:
        last = trial.last
        ends: list[object] = [None] * 4
        if last:
            ends = [last.value, last.low, last.high, last.samples]
        rows.append(
            [
                *(trial.key, trial.status),
                *(trial.parameters.get(key) for key in keys),
                *ends,
                *(trial.metrics.get(key) for key in metrics),
                trial.reason,
            ]
        )
    return header, rows
