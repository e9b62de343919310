"""The YAML file of ``prioritycut tune``, checked before anything starts.

Imports neither torch nor ray.
"""

import difflib
import itertools
import math
import os
import random
from collections.abc import Iterator, Mapping
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, field_validator, model_validator

from prioritycut_ray.config import (
    Config,
    Count,
    Name,
    Place,
    Section,
    apply_overrides,
    as_words,
    load_config,
    parse_config,
    parse_section,
    read_mapping,
)
from prioritycut_ray.errors import UserError
from prioritycut_ray.runs.compatibility import NETWORK_KEYS

VARIANT = "variant"
"""The dimension that selects one of ``variants``."""
_OWNED = ("name", "storage", "train.samples")
"""Keys that the search sets."""
SQLITE = "sqlite:///"
"""Beginning of the URL of an SQLite file, before its path."""
_COMBINATIONS = 1000
"""Number of points that are checked; a smaller space is checked completely."""
_WHOLE = 1000
"""Integer ranges up to this length are checked value by value."""

Pair = tuple[float, float]
Changes = dict[str, Any]


class Domain(Section):
    """The values of one dimension. Exactly one of the first five is set.

    Attributes:
        grid: values that are all tried.
        choice: values that are sampled with equal probability.
        uniform: lower and upper bound of a uniform distribution.
        loguniform: lower and upper bound of a log-uniform distribution.
        whole: lower and upper bound of integers, both inclusive; ``int`` in YAML.
        when: a value, or a list of values, for each of some other dimensions. Trials in which one
            of those has another value leave this dimension out.
    """

    grid: Annotated[tuple[Any, ...], Field(min_length=1)] | None = None
    choice: Annotated[tuple[Any, ...], Field(min_length=1)] | None = None
    uniform: Pair | None = None
    loguniform: Pair | None = None
    whole: tuple[int, int] | None = Field(default=None, alias="int")
    when: dict[str, Any] = Field(default_factory=dict)

    @field_validator("when")
    @classmethod
    def _as_lists(cls, value: dict[str, Any]) -> dict[str, Any]:
        return {key: want if isinstance(want, list) else [want] for key, want in value.items()}

    @model_validator(mode="after")
    def _check(self) -> "Domain":
        if len(self.model_fields_set - {"when"}) != 1 or not self.probes:
            raise ValueError("needs exactly one of grid, choice, uniform, loguniform, int")
        bounds = self.bounds
        if bounds and not bounds[0] < bounds[1]:
            raise ValueError(
                f"the lower bound {bounds[0]:g} must be less than the upper bound {bounds[1]:g}"
            )
        if self.loguniform and self.loguniform[0] <= 0:
            raise ValueError("the lower bound of loguniform must be greater than 0")
        return self

    @property
    def bounds(self) -> Pair | tuple[int, int] | None:
        """The lower and upper bound of a range, or None for a list of values."""
        return self.uniform or self.loguniform or self.whole

    @property
    def probes(self) -> tuple[Any, ...]:
        """Values to check: all of a list; both bounds and one value between them of a range."""
        if self.bounds is None:
            return self.grid or self.choice or ()
        low, high = self.bounds
        if self.whole:
            return tuple(range(int(low), int(high) + 1)) if high - low < _WHOLE else (low, high)
        return (low, high, low + (high - low) / math.pi)

    def applies(self, values: Mapping[str, Any]) -> bool:
        """Return whether a trial with these values of the dimensions before has this dimension."""
        return all(key in values and values[key] in want for key, want in self.when.items())

    def sample(self, source: random.Random) -> Any:
        """Sample a value."""
        if self.grid or self.choice:
            return source.choice(self.grid or self.choice or ())
        if self.whole:
            return source.randint(*self.whole)
        if self.uniform:
            return source.uniform(*self.uniform)
        assert self.loguniform is not None
        low, high = self.loguniform
        return min(max(math.exp(source.uniform(math.log(low), math.log(high))), low), high)


class Objective(Section):
    """What the search optimizes.

    Attributes:
        metric: a metric of ``prioritycut evaluate``, such as l1, psnr or ssim; or ``val/l1`` and
            the like, which the training itself has measured (``train.validate_every``).
        split: the split to evaluate on; never the one that results are reported on.
        lpips: as in ``evaluate --lpips``.
        faces: as in ``evaluate --faces``.
        transfer: as in ``evaluate --transfer``.
    """

    metric: str = "l1"
    split: str = "val"
    lpips: Place = "proxy"
    faces: bool = False
    transfer: bool = False


class ASHA(Section):
    """Asynchronous successive halving: each report stops all but the best 1/``reduction``."""

    kind: Literal["asha"]
    reduction: Annotated[float, Field(gt=1)] = 3.0
    grace: Count = 1
    """Number of reports before a trial can be stopped."""


class PBT(Section):
    """Population Based Training: at each report, the worst trials clone and perturb the best."""

    kind: Literal["pbt"]
    quantile: Annotated[float, Field(gt=0, le=0.5)] = 0.25
    resample: Annotated[float, Field(ge=0, le=1)] = 0.25
    """Probability of sampling a new value instead of perturbing the cloned one."""


class Grid(Section):
    """Cross all grids and variants."""

    kind: Literal["grid"]


class Random(Section):
    """Cross all grids and variants, for each of ``trials`` samples of the other dimensions."""

    kind: Literal["random"]


def _absolute_database(url: str) -> str:
    """Make the path in the URL of an SQLite file absolute: a search may resume from elsewhere."""
    path = url.removeprefix(SQLITE)
    return url if path in (url, "") else f"{SQLITE}{os.path.abspath(path)}"


class Optuna(Section):
    """Suggest points from earlier results.

    Attributes:
        storage: database to store the trials in, as an SQLAlchemy URL such as
            ``sqlite:///optuna.db``; null keeps them with the search alone.
    """

    kind: Literal["optuna"]
    storage: Annotated[str, AfterValidator(_absolute_database)] | None = None


class SearchConfig(Section):
    """A search, as described by its YAML file.

    Attributes:
        name: folder of the search below ``storage``.
        base: the configuration that trials change: a YAML file or a shipped configuration.
        set: changes to ``base`` by dotted key.
        objective: what the search optimizes.
        space: a :class:`Domain` for each dotted key.
        variants: named groups of changes that are tried together, such as the rows of an ablation.
        searcher: :class:`Grid`, :class:`Random` or :class:`Optuna`; its kind alone, such as
            ``grid``, stands for all defaults.
        scheduler: stops or perturbs trials early; None trains every trial to the end.
        trials: number of samples (random, optuna) or population size (PBT).
        reports: number of evaluations of a trial, equally spaced; the scheduler acts at each.
        retries: how often a failed trial is retried from its last checkpoint.
        seed: of the searcher.
        smoke: fields that ``--smoke`` replaces.
    """

    name: Name
    base: Place
    set: Changes = Field(default_factory=dict)
    objective: Objective = Objective()
    space: dict[str, Domain] = Field(default_factory=dict)
    variants: dict[str, Changes] = Field(default_factory=dict)
    searcher: Annotated[Grid | Random | Optuna, Field(discriminator="kind")] = Grid(kind="grid")
    scheduler: Annotated[ASHA | PBT, Field(discriminator="kind")] | None = None
    trials: Count = 1
    reports: Count = 1
    retries: Annotated[int, Field(ge=0)] = 1
    seed: int = 0
    smoke: Changes = Field(default_factory=dict)

    @field_validator("searcher", mode="before")
    @classmethod
    def _as_section(cls, value: Any) -> Any:
        return {"kind": value} if isinstance(value, str) else value

    @field_validator("space", "variants")
    @classmethod
    def _check_keys(cls, value: dict[str, Any]) -> dict[str, Any]:
        for key in value:
            if key in _OWNED:
                raise ValueError(f"{key} is set by the search: remove it")
        return value

    @field_validator("space")
    @classmethod
    def _check_conditions(cls, value: dict[str, Domain]) -> dict[str, Domain]:
        return _in_order(value)

    @model_validator(mode="after")
    def _check(self) -> "SearchConfig":
        if not self.space and not self.variants:
            raise ValueError("nothing to search: set space or variants")
        listed = [key for key, domain in self.space.items() if domain.grid]
        drawn = [key for key in self.space if key not in listed]
        searcher = self.searcher.kind
        if searcher == "grid" and drawn:
            raise ValueError(f"searcher=grid needs a grid for {drawn[0]}: use one, or random")
        if searcher == "optuna" and (listed or self.variants):
            raise ValueError(
                "searcher=optuna does not support grid and variants: use choice, or random"
            )
        if isinstance(self.scheduler, PBT) and (self.trials < 2 or not drawn):
            raise ValueError(
                "scheduler=pbt needs trials of at least 2, and a dimension other than a grid"
            )
        depends = next((key for key, domain in self.space.items() if domain.when), None)
        if depends and (searcher != "optuna" or isinstance(self.scheduler, PBT)):
            raise ValueError(
                f"space.{depends}.when needs searcher=optuna, and a scheduler other than pbt"
            )
        networks = [key for key in drawn if key.startswith(NETWORK_KEYS)]
        if isinstance(self.scheduler, PBT) and networks:
            raise ValueError(
                f"scheduler=pbt copies weights from trial to trial, and {networks[0]} changes the "
                "networks: use a grid or variants for it, or another scheduler"
            )
        if self.scheduler is not None and self.reports < 2:
            raise ValueError(
                f"scheduler={self.scheduler.kind} acts at reports: set reports to 2 or more"
            )
        return self


def _in_order(space: Mapping[str, Domain]) -> dict[str, Domain]:
    """Put dimensions after those that their conditions name.

    Raises:
        ValueError: a condition names an unknown dimension, or can never hold.
    """
    for key, domain in space.items():
        for other, wanted in domain.when.items():
            _check_condition(f"{key}.when", other, wanted, space)
    try:
        order = TopologicalSorter({key: domain.when for key, domain in space.items()})
        return {key: space[key] for key in order.static_order()}
    except CycleError as error:
        raise ValueError(
            f"the conditions of {' and '.join(dict.fromkeys(error.args[1]))} depend on each other: "
            "remove one"
        ) from error


def _check_condition(
    place: str, other: str, wanted: list[Any], space: Mapping[str, Domain]
) -> None:
    if other not in space:
        near = difflib.get_close_matches(other, space, n=1)
        raise ValueError(
            f"{place}: {other} is not in the space"
            + (f"; did you mean {near[0]}?" if near else "; add it, or remove the condition")
        )
    choice = space[other].choice
    if choice is None:
        raise ValueError(f"{place}: {other} is not a `choice`: make it one")
    if not wanted:
        raise ValueError(f"{place}: lists no value of {other}")
    for value in wanted:
        if value not in choice:
            raise ValueError(
                f"{place}: {other} is never {value!r}; its values are "
                f"{', '.join(map(repr, choice))}"
            )


def load_search(path: str | Path, *, smoke: bool) -> SearchConfig:
    """Read a search file.

    Args:
        path: path or fsspec URL of the YAML file.
        smoke: apply the file's ``smoke`` section.

    Raises:
        UserError: the file is invalid; the message names the file, the key and the reason.
    """
    tree = read_mapping(str(path))
    search = parse_section(SearchConfig, tree, str(path))
    if not smoke:
        return search
    if not search.smoke:
        raise UserError(f"{path}: there is no section `smoke`; add one, or run without --smoke")
    tree = tree | search.smoke | {"name": f"{search.name}-smoke"}
    return parse_section(SearchConfig, tree, f"{path} --smoke")


def load_base(search: SearchConfig, overrides: list[str]) -> Config:
    """Return the configuration that trials change; the command line's overrides come last."""
    return load_config(search.base, [*as_words(search.set), *overrides])


def trial_config(
    base: Config, search: SearchConfig, parameters: Mapping[str, Any], name: str, storage: str
) -> Config:
    """Return the configuration of a trial.

    Args:
        base: see :func:`load_base`.
        search: the search.
        parameters: values by dotted key, and the name of the variant.
        name: name of the trial's run.
        storage: folder of the runs.

    Raises:
        UserError: the values do not make a valid configuration.
    """
    values = dict(parameters)
    changes = search.variants.get(values.pop(VARIANT, ""), {})
    words = as_words(changes | values | {"name": name, "storage": storage})
    tree = apply_overrides(base.model_dump(mode="json"), words)
    return parse_config(tree, f"search {search.name}, {describe(parameters)}")


def describe(parameters: Mapping[str, Any]) -> str:
    """Format parameters as one line."""
    return ", ".join(
        f"{key}={value:.4g}" if isinstance(value, float) else f"{key}={value}"
        for key, value in parameters.items()
    )


def check_space(search: SearchConfig, base: Config) -> list[Config]:
    """Return the configurations of representative points of the space; of all, if they are few.

    Raises:
        UserError: a value or a combination of values does not make a valid configuration.
    """
    _check_ranges(search, base)
    return [trial_config(base, search, point, "trial", base.storage) for point in _corners(search)]


def _check_ranges(search: SearchConfig, base: Config) -> None:
    """Reject ranges with valid bounds and invalid values between them.

    Raises:
        UserError: naming the key, the first invalid value, and what to write instead.
    """
    corner = next(_corners(search))
    for key, domain in search.space.items():
        if domain.bounds is None:
            continue
        point = corner | _enabling(search.space, key)
        problems = {value: _problem(search, base, point | {key: value}) for value in domain.probes}
        wrong = next((value for value, problem in problems.items() if problem), None)
        if wrong is None or wrong in domain.bounds:
            continue
        place = f"search {search.name}: space.{key}"
        if domain.whole:
            raise UserError(f"{place}: {problems[wrong]}; use `choice` instead of a range")
        low, high = (f"{end:.0f}" for end in domain.bounds)
        raise UserError(f"{place}: must be an integer; use `int: [{low}, {high}]` or `choice`")


def _problem(search: SearchConfig, base: Config, point: Mapping[str, Any]) -> str:
    try:
        trial_config(base, search, active(search.space, point), "trial", base.storage)
    except UserError as error:
        return str(error).partition(": ")[2]
    return ""


def active(space: Mapping[str, Domain], point: Mapping[str, Any]) -> dict[str, Any]:
    """Return a point without the values of dimensions that do not apply to it."""
    values = {key: value for key, value in point.items() if key not in space}
    for key, domain in space.items():
        if key in point and domain.applies(values):
            values[key] = point[key]
    return values


def _enabling(space: Mapping[str, Domain], key: str) -> dict[str, Any]:
    """Return values of other dimensions for which a dimension applies."""
    values: dict[str, Any] = {}
    for other, wanted in space[key].when.items():
        values |= {other: wanted[0]} | _enabling(space, other)
    return values


def grid_points(space: Mapping[str, Domain]) -> list[dict[str, Any]]:
    """Return the points of a grid in the order of its file; the last dimension varies fastest.

    Dimensions whose values are lists or mappings are left out.
    """
    plain = {
        key: domain.grid
        for key, domain in space.items()
        if domain.grid and not any(isinstance(value, list | dict) for value in domain.grid)
    }
    return [dict(zip(plain, point, strict=True)) for point in itertools.product(*plain.values())]


def _corners(search: SearchConfig) -> Iterator[dict[str, Any]]:
    dimensions = {key: domain.probes for key, domain in search.space.items()}
    if search.variants:
        dimensions[VARIANT] = tuple(search.variants)
    seen = set()
    for point in _combinations(dimensions):
        point = active(search.space, point)
        if (known := repr(point)) not in seen:
            seen.add(known)
            yield point


def _combinations(dimensions: Mapping[str, tuple[Any, ...]]) -> Iterator[dict[str, Any]]:
    """Yield all combinations of values; if they are too many, a sample with every value."""
    if math.prod(map(len, dimensions.values())) <= _COMBINATIONS:
        for values in itertools.product(*dimensions.values()):
            yield dict(zip(dimensions, values, strict=True))
        return
    draw = random.Random(0)
    # Every value at least once, then random combinations.
    for index in range(max(_COMBINATIONS, *map(len, dimensions.values()))):
        known = index < max(map(len, dimensions.values()))
        yield {
            key: values[index % len(values)] if known else draw.choice(values)
            for key, values in dimensions.items()
        }


def boundaries(config: Config, reports: int) -> list[int]:
    """Return the numbers of samples after which a trial reports.

    They are whole steps, equally spaced; the last is the end of the training.

    Raises:
        UserError: there are fewer steps than reports.
    """
    steps = math.ceil(config.train.samples / config.train.batch_size)
    if steps < reports:
        raise UserError(
            f"train.samples={config.train.samples} is {steps} steps, too few for "
            f"reports={reports}; increase train.samples or decrease reports"
        )
    ends = [math.ceil(steps * (place + 1) / reports) for place in range(reports)]
    return [*(step * config.train.batch_size for step in ends[:-1]), config.train.samples]


def max_concurrent_trials(workers: int, cpus_per_worker: int, nodes: list[float]) -> int:
    """Return how many trials fit on the nodes at the same time.

    Besides its workers, each trial has a driver that reserves ``DRIVER_CPUS`` on some node. On a
    node that the workers would fill exactly, the driver takes the place of one worker.

    Args:
        workers: number of workers of a trial.
        cpus_per_worker: CPUs that each worker reserves on one node.
        nodes: number of CPUs of each node.
    """
    room = sum(int(cpus // cpus_per_worker) for cpus in nodes)
    for trials in range(room // workers, 0, -1):
        tight = sum(cpus % cpus_per_worker < trials * DRIVER_CPUS for cpus in nodes)
        if room - min(trials, tight) >= trials * workers:
            return trials
    return 0


DRIVER_CPUS = 0.01
"""CPUs that each trial's driver reserves: the least that Ray Tune accepts in practice."""
