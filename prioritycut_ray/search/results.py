"""What a search has found: a row a trial, and the best one as a configuration to train."""

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


class Point(NamedTuple):
    """One report of a trial.

    Attributes:
        samples: frame pairs seen.
        value: of the objective.
        low: lower end of its interval; None if there is none.
        high: upper end.
    """

    samples: int
    value: float
    low: float | None
    high: float | None


class Trial(NamedTuple):
    """One point of the space, and what became of it.

    Attributes:
        key: its name.
        parameters: by dotted key, and the variant's name, at the last report.
        status: what it came to.
        reason: of a failure; otherwise empty.
        points: its reports, in order.
        metrics: all metrics at the last report.
    """

    key: str
    parameters: dict[str, Any]
    status: Literal["finished", "stopped early", "failed", "unfinished"]
    reason: str
    points: list[Point]
    metrics: dict[str, float]

    @property
    def last(self) -> Point | None:
        """The last report; None before the first."""
        return self.points[-1] if self.points else None


def collect(storage: Folder, samples: int) -> list[Trial]:
    """Read what Ray Tune has stored: the trials in the order in which they began.

    Args:
        storage: folder of its files.
        samples: of a whole trial.
    """
    folder, filesystem = ray_storage(storage)
    analysis = tune.ExperimentAnalysis(folder, storage_filesystem=filesystem)
    frames = analysis.trial_dataframes
    # After a resumption Ray Tune lists them in another order.
    trials = sorted(analysis.trials, key=_began)
    return [_trial(trial, frames.get(trial.trial_id), samples) for trial in trials]


def _began(trial: Any) -> float:
    """Time of a trial's first start; those that never started come last."""
    start: float | None = trial.run_metadata.start_time
    return math.inf if start is None else start


def _trial(trial: Any, frame: Any, samples: int) -> Trial:
    rows = [] if frame is None else frame.to_dict("records")
    # A report that was made again after a resumption replaces the first.
    reports = {int(row[SAMPLES]): row for row in rows if row.get(OBJECTIVE) is not None}
    points = [_point(reports[seen]) for seen in sorted(reports)]
    last = reports[points[-1].samples] if points else {}
    if trial.status == "ERROR":
        status: Any = "failed"
    elif trial.status != "TERMINATED":
        status = "unfinished"
    else:
        status = "finished" if max(reports, default=0) >= samples else "stopped early"
    return Trial(
        key=trial.trial_id,
        # A population may have given it other values since, which nothing was trained with.
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
    """A value as it was before a table of pandas, which has NaN for None."""
    return None if isinstance(value, float) and math.isnan(value) else value


def _point(row: dict[str, Any]) -> Point:
    low, high = (None if (end := row.get(key)) is None or end != end else end for key in _ENDS)
    return Point(int(row[SAMPLES]), float(row[OBJECTIVE]), low, high)


_METRICS = "metrics/"
_ENDS = ("low", "high")


def reason(trace: str) -> str:
    """The last line of a traceback: what was raised, without where."""
    return _OWN_ERROR.sub("", trace.strip().rsplit("\n", 1)[-1].strip())


_OWN_ERROR = re.compile(r"^prioritycut_ray\.\w+\.\w+: ")
"""Errors that were written for people need no class name before them."""


def best_trial(trials: Sequence[Trial], metric: Metric) -> Trial | None:
    """The best of those that were trained to the end with a finite objective; None if none was."""
    finished = [
        (trial.last.value, trial)
        for trial in trials
        if trial.status == "finished" and trial.last and math.isfinite(trial.last.value)
    ]
    sign = -1 if metric.higher_is_better else 1
    _, best = min(finished, key=lambda pair: sign * pair[0], default=(None, None))
    return best


def best_config(search: SearchConfig, base: Config, trial: Trial) -> str:
    """A trial's configuration as YAML that ``prioritycut train`` takes."""
    name = f"{search.name}-best"
    return dump_config(trial_config(base, search, trial.parameters, name, base.storage))


def table(trials: Sequence[Trial]) -> tuple[list[str], list[list[object]]]:
    """Header and rows, a row a trial."""
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
