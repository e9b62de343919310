"""Run all trials of a search with Ray Tune."""

import importlib.metadata
import json
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray
from ray import tune
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler
from ray.tune.search.basic_variant import BasicVariantGenerator
from rich.console import Console

from prioritycut_ray.config import VALIDATION, Config
from prioritycut_ray.data.index import clips_of, read_index
from prioritycut_ray.errors import Preempted, UserError
from prioritycut_ray.evaluation.measures import Measures, selected_metrics
from prioritycut_ray.metrics.aggregate import Metric
from prioritycut_ray.ray_cluster.compat import TUNE_SNAPSHOT, set_tune_environment
from prioritycut_ray.ray_cluster.filesystem import ray_storage
from prioritycut_ray.ray_cluster.resources import has_autoscaler, uses_gpu
from prioritycut_ray.ray_cluster.session import start_ray
from prioritycut_ray.runs.compatibility import MAY_CHANGE, changed_keys
from prioritycut_ray.search.pbt import PBTScheduler
from prioritycut_ray.search.results import TrialResult, collect, reason
from prioritycut_ray.search.space import (
    ASHA,
    DRIVER_CPUS,
    PBT,
    VARIANT,
    Domain,
    Grid,
    Optuna,
    SearchConfig,
    boundaries,
    check_space,
    describe,
    grid_points,
    max_concurrent_trials,
)
from prioritycut_ray.search.suggestions import Suggestions, check_study
from prioritycut_ray.search.trial import OBJECTIVE, SAMPLES, TrialContext, run_trial
from prioritycut_ray.storage.folder import Folder

_TUNE = "tune"
"""Folder of Ray Tune's own files in the folder of a search."""
_VALUES = "search.json"
"""The values that the search was started with."""
_COMPARED = ("train.samples", "train.validate_clips", "data.validation_split")
"""A resumed run may change these, but trials with different values cannot be compared."""
_CONCURRENT_WITH_AUTOSCALER = 8
"""How far a cluster can grow is unknown, and the driver of a waiting trial takes 0.5 GB."""


def run_search(
    search: SearchConfig, base: Config, folder: Folder, *, resume: bool
) -> tuple[list[TrialResult], Metric]:
    """Run a search to its end, or resume it.

    Args:
        search: the search.
        base: the configuration that trials change, with absolute paths.
        folder: the folder of the search.
        resume: resume the search of this name if it exists.

    Returns:
        The trials in the order in which they started, and the metric that the search optimizes.

    Raises:
        UserError: the space, the data or the objective is invalid, the cluster is too small, or
            the search was started with different values.
        Preempted: the search was asked to stop; it can be resumed.
    """
    configs = check_space(search, base)
    metric = check_objective(search, configs)
    start_ray()
    concurrent = concurrency(search, configs)
    exists = any(map(TUNE_SNAPSHOT.fullmatch, folder.names(_TUNE)))
    if exists:
        _check_resumable(search, base, folder, resume=resume)
    if isinstance(search.searcher, Optuna) and search.searcher.storage:
        check_study(
            search.searcher.storage,
            search.name,
            folder.url,
            higher_is_better=metric.higher_is_better,
            exists=exists,
            resume=resume,
        )
    if not exists:
        folder.write(_VALUES, json.dumps(_values(search, base), indent=1).encode())
    tuner = _tuner(search, base, folder, metric, concurrent, resume=exists)
    _say(f"{folder.url}: running up to {concurrent} trials at a time")
    with _sigterm_as_interrupt():
        tuner.fit()
    trials = collect(Folder(f"{folder.url}/{_TUNE}"), base.train.samples)
    unfinished = [trial for trial in trials if trial.status == "unfinished"]
    if unfinished:
        raise Preempted(
            f"{folder.url}: stopped with {len(unfinished)} of {len(trials)} trials unfinished; "
            "run the same command with --resume to continue"
        )
    return trials, metric


def _values(search: SearchConfig, base: Config) -> dict[str, Any]:
    """Return the values that all trials of a search share."""
    return {
        **base.model_dump(mode="json", exclude={"name"}),
        **search.model_dump(mode="json", exclude={"name", "base", "set", "smoke"}),
        "fingerprint of data.url": read_index(base.data.url).fingerprint,
    }


def _check_resumable(search: SearchConfig, base: Config, folder: Folder, *, resume: bool) -> None:
    """Make sure that all trials of a search are comparable, including those before a resume.

    Raises:
        UserError: ``resume`` is false, or the values or clips of the search are different.
    """
    if not resume:
        raise UserError(
            f"{folder.url}: this search already exists; resume it with --resume, or start a new "
            "one with another name in the file or another storage=..."
        )
    changed = [
        key
        for key in changed_keys(json.loads(folder.read(_VALUES)), _values(search, base))
        if key in _COMPARED or not key.startswith(MAY_CHANGE)
    ]
    if changed:
        raise UserError(
            f"{folder.url}: this search was started with different values of "
            f"{', '.join(changed)}; restore them to resume it, or use another name"
        )


def check_objective(search: SearchConfig, configs: list[Config]) -> Metric:
    """Return the metric to optimize, if every trial can be trained and evaluated on its data.

    Raises:
        UserError: the metric, the data or the split does not exist.
    """
    objective = search.objective
    is_validated = objective.metric.startswith(VALIDATION)
    chosen = Measures(objective.lpips, objective.faces, objective.transfer)
    measures = Measures() if is_validated else chosen
    metrics = {metric.key: metric for metric in selected_metrics(measures)}
    key = objective.metric.removeprefix(VALIDATION)
    if key not in metrics:
        raise UserError(
            f"objective.metric={objective.metric}: is not a metric of this evaluation; use one of "
            f"{', '.join(metrics)}"
        )
    if is_validated and not all(config.train.validate_every for config in configs):
        raise UserError(
            f"objective.metric={objective.metric}: requires train.validate_every; set it in `set`"
        )
    for config in configs:
        boundaries(config, search.reports)
    for data in {config.data.url: config.data for config in configs}.values():
        url, index = data.url, read_index(data.url)
        for name in (data.split, data.validation_split if is_validated else objective.split):
            try:
                clips_of(index, name)
            except UserError as error:
                raise UserError(
                    f"{url}: {error}; set splits in the manifest of `prioritycut shard`, or change "
                    f"{'data.validation_split' if is_validated else 'objective.split'}"
                ) from error
    if not is_validated:
        return metrics[key]
    return metrics[key].model_copy(update={"label": f"{metrics[key].label} (validation)"})


def concurrency(search: SearchConfig, configs: list[Config]) -> int:
    """Return how many trials can run at the same time on this cluster.

    With an autoscaler, at least ``_CONCURRENT_WITH_AUTOSCALER``: it adds nodes for waiting trials.

    Raises:
        UserError: a trial does not fit on the cluster.
    """
    if any(config.train.workers == 0 for config in configs):
        raise UserError(
            f"search {search.name}: train.workers=0 trains in the process of the command, but "
            "trials run on Ray: set train.workers=1 or more"
        )
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    cpus = [float(resources.get("CPU", 0)) for resources in nodes]
    largest = max(configs, key=lambda c: c.train.worker_range[1] * c.train.cpus_per_worker)
    workers = largest.train.worker_range[1]
    fitting = max_concurrent_trials(workers, largest.train.cpus_per_worker, cpus)
    if uses_gpu(largest):
        gpus = sum(int(resources.get("GPU", 0)) for resources in nodes)
        fitting = min(fitting, gpus // workers)
    if has_autoscaler():
        return max(fitting, _CONCURRENT_WITH_AUTOSCALER)
    if fitting == 0:
        raise UserError(
            f"search {search.name}: a trial needs train.workers={workers} × train.cpus_per_worker="
            f"{largest.train.cpus_per_worker} CPUs, plus {DRIVER_CPUS} for its driver, but the "
            f"cluster has {sum(cpus):g} CPUs; decrease one of them, or join a larger cluster with "
            "RAY_ADDRESS"
        )
    return fitting


def _tuner(
    search: SearchConfig,
    base: Config,
    folder: Folder,
    metric: Metric,
    concurrent: int,
    *,
    resume: bool,
) -> tune.Tuner:
    set_tune_environment()
    context = TrialContext(search, _for_trials(search, base), f"{folder.url}/runs")
    trainable = tune.with_resources(
        tune.with_parameters(run_trial, context=context), {"CPU": DRIVER_CPUS}
    )
    path, filesystem = ray_storage(folder)
    if resume:
        with _explained(folder):
            return tune.Tuner.restore(
                f"{path}/{_TUNE}",
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
            num_samples=len(_presets(search)) or search.trials,
            search_alg=_searcher(search, base, metric, concurrent),
            scheduler=_scheduler(search, base),
            # Importing torch takes longer than a short trial.
            reuse_actors=True,
            trial_dirname_creator=_trial_name,
        ),
        run_config=tune.RunConfig(
            name=_TUNE,
            storage_path=path,
            storage_filesystem=filesystem,
            failure_config=tune.FailureConfig(max_failures=search.retries),
            callbacks=[_Narrator(), _Hyperparameters()],
            verbose=0,
        ),
    )


@contextmanager
def _explained(folder: Folder) -> Iterator[None]:
    """Explain that a search folder refers to classes of another version of this package."""
    try:
        yield
    except (AttributeError, ImportError) as error:
        version = importlib.metadata.version("prioritycut_ray")
        raise UserError(
            f"{folder.url}/{_TUNE}: cannot be resumed with this version of prioritycut_ray "
            f"({version}: {error}); resume it with the version that started it, or use another name"
        ) from error


# Ray Tune stores references to _trial_name, _Narrator and _Hyperparameters with the search:
# renaming or moving them breaks --resume of older searches.


def _trial_name(trial: Any) -> str:
    return str(trial.trial_id)


def _for_trials(search: SearchConfig, base: Config) -> Config:
    """Keep the checkpoint of every report for PBT, which may clone any of them."""
    if not isinstance(search.scheduler, PBT):
        return base
    train = base.train.model_copy(
        update={
            "checkpoint_every": base.train.samples,
            "keep_checkpoints": search.reports + 1,
        }
    )
    return base.model_copy(update={"train": train})


def _searcher(search: SearchConfig, base: Config, metric: Metric, concurrent: int) -> Any:
    if isinstance(search.searcher, Optuna):
        suggestions = Suggestions(
            search.space,
            higher_is_better=metric.higher_is_better,
            samples=base.train.samples,
            seed=search.seed,
            study=search.name,
            storage=search.searcher.storage,
        )
        return tune.search.ConcurrencyLimiter(suggestions, max_concurrent=concurrent)
    # PBT needs all its trials: those that wait hold no resources.
    limit = 0 if isinstance(search.scheduler, PBT) else concurrent
    return BasicVariantGenerator(
        points_to_evaluate=_presets(search), max_concurrent=limit, random_state=search.seed
    )


def _presets(search: SearchConfig) -> list[dict[str, Any]]:
    """Return the points of a grid in their order, each of which Ray Tune crosses with the variants.

    Ray Tune alone would vary the dimensions in alphabetical order, and so train all seeds of one
    variant before the next variant: a search that is stopped early could not compare them. The
    presets cannot have lists or mappings; Ray Tune crosses those too.
    """
    if not isinstance(search.searcher, Grid):
        return []
    return grid_points(search.space) * search.trials


def _scheduler(search: SearchConfig, base: Config) -> Any:
    options = search.scheduler
    if isinstance(options, ASHA):
        reports = boundaries(base, search.reports)
        return ASHAScheduler(
            time_attr=SAMPLES,
            max_t=base.train.samples,
            grace_period=reports[min(options.grace, len(reports)) - 1],
            reduction_factor=options.reduction,
        )
    if isinstance(options, PBT):
        drawn = {key: domain for key, domain in search.space.items() if not domain.grid}
        return PBTScheduler(options, drawn, samples=base.train.samples, seed=search.seed)
    return FIFOScheduler()


def _space(search: SearchConfig) -> dict[str, Any]:
    if isinstance(search.searcher, Optuna):
        return {}  # Suggestions has it
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
    """Print the progress of the trials. Stateless, because Tune stores it with the search."""

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Print a trial's parameters."""
        _say(f"trial {trial.trial_id}: {describe(trial.config)}")

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        """Print a trial's objective."""
        _say(
            f"trial {trial.trial_id}: {result[SAMPLES]} samples, objective {result[OBJECTIVE]:.5g}"
        )

    def on_trial_recover(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Print why a trial is retried."""
        _say(f"trial {trial.trial_id}: failed, retrying from its last report: {_why(trial)}")

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Print why a trial has failed."""
        _say(f"trial {trial.trial_id}: failed, not retrying: {_why(trial)}")


class _Hyperparameters(tune.Callback):  # type: ignore[misc]  # ray is untyped
    """Give TensorBoard all parameters of a trial: Ray Tune leaves out those of :func:`_presets`."""

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Complete the parameters that are logged when the trial ends."""
        trial.evaluated_params = dict(trial.config)


def _why(trial: Any) -> str:
    # The copy in storage may be older.
    return reason(Path(trial.error_file).read_text())


@contextmanager
def _sigterm_as_interrupt() -> Iterator[None]:
    """Turn SIGTERM into one Ctrl-C: Tune aborts on a second, and Kubernetes sends two SIGTERMs."""

    def interrupt_once(*_: object) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        os.kill(os.getpid(), signal.SIGINT)

    former = signal.signal(signal.SIGTERM, interrupt_once)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, former)
