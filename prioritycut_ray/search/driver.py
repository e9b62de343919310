"""All trials of a search: Ray Tune decides which run, and when."""

import json
import os
import re
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray
from ray import tune
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler
from ray.tune.search.basic_variant import BasicVariantGenerator
from ray.tune.search.optuna import OptunaSearch
from rich.console import Console

from prioritycut_ray.config import Config, changed_keys
from prioritycut_ray.data.shards import clips_of, read_index
from prioritycut_ray.errors import Preempted, UserError
from prioritycut_ray.evaluation.measures import Measures, selected_metrics
from prioritycut_ray.metrics.aggregate import Metric
from prioritycut_ray.ray_cluster.filesystem import ray_storage
from prioritycut_ray.ray_cluster.resources import has_autoscaler, uses_gpu
from prioritycut_ray.ray_cluster.session import start_ray
from prioritycut_ray.runs.compatibility import MAY_CHANGE
from prioritycut_ray.search.population import PopulationScheduler
from prioritycut_ray.search.results import Trial, collect, reason
from prioritycut_ray.search.space import (
    DRIVER_CPUS,
    VARIANT,
    Domain,
    Halving,
    Population,
    SearchConfig,
    boundaries,
    check_space,
    describe,
    spread,
)
from prioritycut_ray.search.trial import OBJECTIVE, SAMPLES, Plan, run_trial
from prioritycut_ray.storage.folder import Folder

_TUNE = "tune"
"""Folder of Ray Tune's own files below a search's."""
_SNAPSHOT = re.compile(r"experiment_state-.*\.json")
"""What Ray Tune resumes from: without one, a search has not begun."""
_BEGUN = "search.json"
"""What the search began with."""
_TRIALS_WHERE_NODES_ARE_ADDED = 8
"""How far a cluster can grow is not known; a trial that waits costs its driver's half gigabyte."""


def run_search(
    search: SearchConfig, base: Config, storage: Folder, *, resume: bool
) -> tuple[list[Trial], Metric]:
    """Run a search to its end, or go on with one.

    Args:
        search: what to search.
        base: the configuration that trials change, with absolute paths.
        storage: folder of the search.
        resume: go on with the search of this name if there is one.

    Returns:
        The trials in the order in which they began, and the metric that is the objective.

    Raises:
        UserError: the space, the data or the objective does not fit, the cluster is too small, or
            the search began with other values.
        Preempted: the search was asked to stop; it can be resumed.
    """
    configs = check_space(search, base)
    metric = check_objective(search, configs)
    start_ray()
    concurrent = concurrency(search, configs)
    begun = _begin(search, base, storage, resume=resume)
    tuner = _tuner(search, base, storage, metric, concurrent, resume=begun)
    _say(f"{storage.url}: up to {concurrent} trials at the same time")
    with _sigterm_as_interrupt():
        tuner.fit()
    trials = collect(Folder(f"{storage.url}/{_TUNE}"), base.train.samples)
    unfinished = [trial for trial in trials if trial.status == "unfinished"]
    if unfinished:
        raise Preempted(
            f"{storage.url}: stopped with {len(unfinished)} of {len(trials)} trials unfinished; "
            "the same command with --resume goes on"
        )
    return trials, metric


def _begin(search: SearchConfig, base: Config, storage: Folder, *, resume: bool) -> bool:
    """Make sure that all trials of a search, before and after a resumption, can be compared.

    Returns:
        Whether the search has begun before.

    Raises:
        UserError: it has, and is not to be resumed, or its values or clips were others.
    """
    now = {
        **base.model_dump(mode="json", exclude={"name"}),
        **search.model_dump(mode="json", exclude={"name", "base", "set", "smoke"}),
        "fingerprint of data.url": read_index(base.data.url).fingerprint,
    }
    if not any(map(_SNAPSHOT.fullmatch, storage.names(_TUNE))):
        storage.write(_BEGUN, json.dumps(now, indent=1).encode())
        return False
    if not resume:
        raise UserError(
            f"{storage.url}: this search exists; --resume goes on with it, another name in the "
            "file or another storage=... starts afresh"
        )
    changed = [
        key
        for key in changed_keys(json.loads(storage.read(_BEGUN)), now)
        # A search compares trials of one length.
        if key == "train.samples" or not key.startswith(MAY_CHANGE)
    ]
    if changed:
        raise UserError(
            f"{storage.url}: this search began with other values of {', '.join(changed)}; give "
            "those back to resume it, or another name to search afresh"
        )
    return True


def check_objective(search: SearchConfig, configs: list[Config]) -> Metric:
    """Make sure that every trial can be trained and evaluated on its data.

    Raises:
        UserError: no such metric, data, or split.
    """
    objective = search.objective
    metrics = {m.key: m for m in selected_metrics(Measures(objective.lpips, objective.faces))}
    if objective.metric not in metrics:
        raise UserError(
            f"objective.metric={objective.metric}: is not measured; choose one of "
            f"{', '.join(metrics)}"
        )
    for config in configs:
        boundaries(config, search.reports)
    for url, split in {(config.data.url, config.data.split) for config in configs}:
        index = read_index(url)
        for name in (split, objective.split):
            try:
                clips_of(index, name)
            except UserError as error:
                raise UserError(
                    f"{url}: {error}; the splits are given in the manifest of `prioritycut shard`, "
                    "or change objective.split"
                ) from error
    return metrics[objective.metric]


def concurrency(search: SearchConfig, configs: list[Config]) -> int:
    """How many trials can run at the same time on this cluster.

    Where an autoscaler adds nodes, trials that wait for room are what it adds them for.

    Raises:
        UserError: not even one.
    """
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    cpus = [float(resources.get("CPU", 0)) for resources in nodes]
    largest = max(configs, key=lambda c: c.train.worker_range[1] * c.train.cpus_per_worker)
    workers = largest.train.worker_range[1]
    room = spread(workers, largest.train.cpus_per_worker, cpus)
    if uses_gpu(largest):
        gpus = sum(int(resources.get("GPU", 0)) for resources in nodes)
        room = min(room, gpus // workers)
    if has_autoscaler():
        return max(room, _TRIALS_WHERE_NODES_ARE_ADDED)
    if room == 0:
        raise UserError(
            f"search {search.name}: a trial takes train.workers={workers} × train.cpus_per_worker="
            f"{largest.train.cpus_per_worker} CPUs and {DRIVER_CPUS} for its driver, more than the "
            f"cluster's {sum(cpus):g} CPUs leave; lower one of them, or join a larger cluster with "
            "RAY_ADDRESS"
        )
    return room


def _tuner(
    search: SearchConfig,
    base: Config,
    storage: Folder,
    metric: Metric,
    concurrent: int,
    *,
    resume: bool,
) -> tune.Tuner:
    os.environ["RAY_AIR_NEW_OUTPUT"] = "0"  # the only way to a quiet Tune
    # _Narrator says why; Ray's own traceback is in the trial's error.txt.
    os.environ["TUNE_PRINT_ALL_TRIAL_ERRORS"] = "0"
    plan = Plan(search, _for_trials(search, base), f"{storage.url}/runs")
    trainable = tune.with_resources(
        tune.with_parameters(run_trial, plan=plan), {"CPU": DRIVER_CPUS}
    )
    folder, filesystem = ray_storage(storage)
    if resume:
        return tune.Tuner.restore(
            f"{folder}/{_TUNE}",
            trainable,
            param_space=_space(search),
            storage_filesystem=filesystem,
        )
    mode = "max" if metric.higher_is_better else "min"
    return tune.Tuner(
        trainable,
        param_space=_space(search),
        tune_config=tune.TuneConfig(
            metric=OBJECTIVE,
            mode=mode,
            num_samples=search.trials,
            search_alg=_searcher(search, concurrent),
            scheduler=_scheduler(search, base),
            # Importing torch takes longer than many a short trial.
            reuse_actors=True,
            trial_dirname_creator=_trial_name,
        ),
        run_config=tune.RunConfig(
            name=_TUNE,
            storage_path=folder,
            storage_filesystem=filesystem,
            failure_config=tune.FailureConfig(max_failures=search.retries),
            callbacks=[_Narrator()],
            verbose=0,
        ),
    )


def _trial_name(trial: Any) -> str:
    return str(trial.trial_id)


def _for_trials(search: SearchConfig, base: Config) -> Config:
    """A population takes over checkpoints of reports long past: these are kept, and no others."""
    if not isinstance(search.scheduler, Population):
        return base
    train = base.train.model_copy(
        update={
            "checkpoint_every": base.train.samples,
            "keep_checkpoints": search.reports + 1,
        }
    )
    return base.model_copy(update={"train": train})


def _searcher(search: SearchConfig, concurrent: int) -> Any:
    if search.searcher == "optuna":
        return tune.search.ConcurrencyLimiter(
            OptunaSearch(seed=search.seed), max_concurrent=concurrent
        )
    # A population lives as a whole: who waits for room holds none.
    limit = 0 if isinstance(search.scheduler, Population) else concurrent
    return BasicVariantGenerator(max_concurrent=limit, random_state=search.seed)


def _scheduler(search: SearchConfig, base: Config) -> Any:
    options = search.scheduler
    if isinstance(options, Halving):
        reports = boundaries(base, search.reports)
        return ASHAScheduler(
            time_attr=SAMPLES,
            max_t=base.train.samples,
            grace_period=reports[min(options.grace, len(reports)) - 1],
            reduction_factor=options.reduction,
        )
    if isinstance(options, Population):
        drawn = {key: domain for key, domain in search.space.items() if not domain.grid}
        return PopulationScheduler(options, drawn, samples=base.train.samples, seed=search.seed)
    return FIFOScheduler()


def _space(search: SearchConfig) -> dict[str, Any]:
    space = {key: _domain(domain) for key, domain in search.space.items()}
    if search.variants:
        space[VARIANT] = tune.grid_search(list(search.variants))
    return space


def _domain(domain: Domain) -> Any:
    if domain.grid:
        return tune.grid_search(list(domain.grid))
    if domain.choice:
        return tune.choice(list(domain.choice))
    if domain.uniform:
        return tune.uniform(*domain.uniform)
    if domain.loguniform:
        return tune.loguniform(*domain.loguniform)
    assert domain.whole is not None
    low, high = domain.whole
    return tune.randint(low, high + 1)


def _say(line: str) -> None:
    Console(stderr=True, highlight=False, soft_wrap=True).print(line, markup=False)


class _Narrator(tune.Callback):  # type: ignore[misc]  # ray is untyped
    """Says what becomes of the trials; stateless, since Tune stores it with the search."""

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Called by Tune."""
        _say(f"trial {trial.trial_id}: {describe(trial.config)}")

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        """Called by Tune."""
        _say(
            f"trial {trial.trial_id}: {result[SAMPLES]} samples, objective {result[OBJECTIVE]:.5g}"
        )

    def on_trial_recover(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Called by Tune."""
        _say(f"trial {trial.trial_id}: failed, tried again from its last report: {_why(trial)}")

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Called by Tune."""
        _say(f"trial {trial.trial_id}: failed for good: {_why(trial)}")


def _why(trial: Any) -> str:
    # Its copy in storage may be older.
    return reason(Path(trial.error_file).read_text())


@contextmanager
def _sigterm_as_interrupt() -> Iterator[None]:
    """Tune ends in order on Ctrl-C, and at once on a second; Kubernetes may send two SIGTERMs."""

    def interrupt_once(*_: object) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        os.kill(os.getpid(), signal.SIGINT)

    former = signal.signal(signal.SIGTERM, interrupt_once)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, former)
