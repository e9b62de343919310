"""What a search looks for: the YAML file of ``prioritycut tune``, checked before anything starts.

Imports neither torch nor ray.
"""

import itertools
import math
import random
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

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

VARIANT = "variant"
"""Name of the dimension that chooses among ``variants``."""
_OWNED = ("name", "storage", "train.samples")
"""Keys that the search sets itself."""
_COMBINATIONS = 1000
"""So many points of a space are checked; all of them, if there are no more."""
_WHOLE = 1000
"""Ranges of whole numbers are checked value by value up to this length."""

Pair = tuple[float, float]
Changes = dict[str, Any]


class Domain(Section):
    """The values of one dimension: exactly one kind is given.

    Attributes:
        grid: every one of these values is tried.
        choice: one of these, all equally likely.
        uniform: from a to b.
        loguniform: from a to b, uniform in the logarithm.
        whole: a whole number from a to b, both included; ``int`` in YAML.
    """

    grid: Annotated[tuple[Any, ...], Field(min_length=1)] | None = None
    choice: Annotated[tuple[Any, ...], Field(min_length=1)] | None = None
    uniform: Pair | None = None
    loguniform: Pair | None = None
    whole: tuple[int, int] | None = Field(default=None, alias="int")

    @model_validator(mode="after")
    def _check(self) -> "Domain":
        if len(self.model_fields_set) != 1 or not self.probes:
            raise ValueError("give one of grid, choice, uniform, loguniform, int")
        bounds = self.bounds
        if bounds and not bounds[0] < bounds[1]:
            raise ValueError(f"the range must go up, not from {bounds[0]:g} to {bounds[1]:g}")
        if self.loguniform and self.loguniform[0] <= 0:
            raise ValueError("loguniform begins above 0")
        return self

    @property
    def bounds(self) -> Pair | tuple[int, int] | None:
        """Lowest and highest value of a range; None for a list of values."""
        return self.uniform or self.loguniform or self.whole

    @property
    def probes(self) -> tuple[Any, ...]:
        """Values that stand for all: the whole list or, of a range, both ends and one between."""
        if self.bounds is None:
            return self.grid or self.choice or ()
        low, high = self.bounds
        if self.whole:
            return tuple(range(int(low), int(high) + 1)) if high - low < _WHOLE else (low, high)
        return (low, high, low + (high - low) / math.pi)

    def draw(self, source: random.Random) -> Any:
        """One of the values, by the distribution of the kind."""
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
    """What is made better.

    Attributes:
        metric: one that ``evaluate`` gives, such as l1, psnr, ssim.
        split: of the data set; never the one that results are reported on.
        lpips: as for ``evaluate --lpips``.
        faces: as for ``evaluate --faces``.
    """

    metric: str = "l1"
    split: str = "val"
    lpips: Place = "proxy"
    faces: bool = False


class Halving(Section):
    """ASHA: at each report, trials that are not among the best 1/``reduction`` end."""

    kind: Literal["asha"]
    reduction: Annotated[float, Field(gt=1)] = 3.0
    grace: Count = 1
    """Reports that every trial may make before it can be stopped."""


class Population(Section):
    """PBT: at each report, the worst go on from the best one's checkpoint with changed values."""

    kind: Literal["pbt"]
    quantile: Annotated[float, Field(gt=0, le=0.5)] = 0.25
    resample: Annotated[float, Field(ge=0, le=1)] = 0.25
    """Probability that a value is drawn anew and not nudged."""


class SearchConfig(Section):
    """A search, as its YAML file describes it.

    Attributes:
        name: of the folder below the base's ``storage``.
        base: the configuration that trials change: a YAML file or a shipped name.
        set: changes to the base by dotted key.
        objective: what is made better.
        space: a :class:`Domain` by dotted key.
        variants: named groups of changes that are tried as wholes, such as rows of an ablation.
        searcher: ``grid`` crosses all grids and variants; ``random`` does so for ``trials`` draws
            of the other dimensions; ``optuna`` proposes points from what it has seen.
        scheduler: what ends or changes trials early; None trains all to the end.
        trials: draws (random, optuna), or the size of the population (PBT).
        reports: evaluations of a trial, at equal distances; at each, the scheduler decides.
        retries: of a trial that fails, from its last checkpoint.
        seed: of the searcher.
        smoke: fields of this file that ``--smoke`` replaces.
    """

    name: Name
    base: Place
    set: Changes = Field(default_factory=dict)
    objective: Objective = Objective()
    space: dict[str, Domain] = Field(default_factory=dict)
    variants: dict[str, Changes] = Field(default_factory=dict)
    searcher: Literal["grid", "random", "optuna"] = "grid"
    scheduler: Annotated[Halving | Population, Field(discriminator="kind")] | None = None
    trials: Count = 1
    reports: Count = 1
    retries: Annotated[int, Field(ge=0)] = 1
    seed: int = 0
    smoke: Changes = Field(default_factory=dict)

    @field_validator("space", "variants")
    @classmethod
    def _check_keys(cls, value: dict[str, Any]) -> dict[str, Any]:
        for key in value:
            if key in _OWNED:
                raise ValueError(f"{key} is set by the search itself")
        return value

    @model_validator(mode="after")
    def _check(self) -> "SearchConfig":
        if not self.space and not self.variants:
            raise ValueError("nothing to search: give space or variants")
        listed = [key for key, domain in self.space.items() if domain.grid]
        drawn = [key for key in self.space if key not in listed]
        if self.searcher == "grid" and drawn:
            raise ValueError(f"searcher=grid takes grids alone: {drawn[0]} is none; say random")
        if self.searcher == "optuna" and (listed or self.variants):
            raise ValueError("searcher=optuna takes no grid and no variants; say choice or random")
        if isinstance(self.scheduler, Population) and (self.trials < 2 or not drawn):
            raise ValueError("a population has trials >= 2 and a dimension that is no grid")
        if self.scheduler is not None and self.reports < 2:
            raise ValueError(f"scheduler={self.scheduler.kind} decides at reports: give 2 or more")
        return self


def load_search(path: str | Path, *, smoke: bool) -> SearchConfig:
    """Read a search file.

    Args:
        path: of the YAML file, or an fsspec URL.
        smoke: take the small size that the file names.

    Raises:
        UserError: naming the file, the key and the reason.
    """
    tree = read_mapping(str(path))
    search = parse_section(SearchConfig, tree, str(path))
    if not smoke:
        return search
    if not search.smoke:
        raise UserError(f"{path}: has no section `smoke`; run it without --smoke, or add one")
    tree = tree | search.smoke | {"name": f"{search.name}-smoke"}
    return parse_section(SearchConfig, tree, f"{path} --smoke")


def load_base(search: SearchConfig, overrides: list[str]) -> Config:
    """The configuration that trials change; words of the command line come last."""
    return load_config(search.base, [*as_words(search.set), *overrides])


def trial_config(
    base: Config, search: SearchConfig, parameters: Mapping[str, Any], name: str, storage: str
) -> Config:
    """The configuration of one trial.

    Args:
        base: see :func:`load_base`.
        search: the search.
        parameters: by dotted key, and the variant's name.
        name: of the trial's run.
        storage: folder of runs.

    Raises:
        UserError: the values do not go together.
    """
    values = dict(parameters)
    changes = search.variants.get(values.pop(VARIANT, ""), {})
    words = as_words(changes | values | {"name": name, "storage": storage})
    tree = apply_overrides(base.model_dump(mode="json"), words)
    return parse_config(tree, f"search {search.name}, {describe(parameters)}")


def describe(parameters: Mapping[str, Any]) -> str:
    """Parameters in one line."""
    return ", ".join(
        f"{key}={value:.4g}" if isinstance(value, float) else f"{key}={value}"
        for key, value in parameters.items()
    )


def check_space(search: SearchConfig, base: Config) -> list[Config]:
    """Resolve the points that stand for the space, all of them if they are few.

    Returns:
        Their configurations.

    Raises:
        UserError: naming the key or the combination that does not make a valid configuration.
    """
    _check_ranges(search, base)
    return [trial_config(base, search, point, "trial", base.storage) for point in _corners(search)]


def _check_ranges(search: SearchConfig, base: Config) -> None:
    """Refuse a range whose ends are valid and values between are not: a list is wanted.

    Raises:
        UserError: naming the key, the first such value, and how to write what is meant.
    """
    corner = next(_corners(search))
    for key, domain in search.space.items():
        if domain.bounds is None:
            continue
        problems = {value: _problem(search, base, corner | {key: value}) for value in domain.probes}
        wrong = next((value for value, problem in problems.items() if problem), None)
        if wrong is None or wrong in domain.bounds:
            continue
        place = f"search {search.name}: space.{key}"
        if domain.whole:
            raise UserError(f"{place}: {problems[wrong]}; give a `choice` of values, not a range")
        low, high = (f"{end:.0f}" for end in domain.bounds)
        raise UserError(
            f"{place}: takes whole numbers only; give `int: [{low}, {high}]` or a `choice`"
        )


def _problem(search: SearchConfig, base: Config, point: Mapping[str, Any]) -> str:
    try:
        trial_config(base, search, point, "trial", base.storage)
    except UserError as error:
        return str(error).partition(": ")[2]
    return ""


def _corners(search: SearchConfig) -> Iterator[dict[str, Any]]:
    dimensions = {key: domain.probes for key, domain in search.space.items()}
    if search.variants:
        dimensions[VARIANT] = tuple(search.variants)
    if math.prod(map(len, dimensions.values())) <= _COMBINATIONS:
        for values in itertools.product(*dimensions.values()):
            yield dict(zip(dimensions, values, strict=True))
        return
    draw = random.Random(0)
    # Every value once at least, then any combination.
    for index in range(max(_COMBINATIONS, *map(len, dimensions.values()))):
        known = index < max(map(len, dimensions.values()))
        yield {
            key: values[index % len(values)] if known else draw.choice(values)
            for key, values in dimensions.items()
        }


def boundaries(config: Config, reports: int) -> list[int]:
    """Samples at which a trial is evaluated: whole steps, at equal distances, the last at the end.

    Raises:
        UserError: there are fewer steps than reports.
    """
    steps = math.ceil(config.train.samples / config.train.batch_size)
    if steps < reports:
        raise UserError(
            f"train.samples={config.train.samples} is {steps} steps: too short for "
            f"reports={reports}; raise the one or lower the other"
        )
    ends = [math.ceil(steps * (place + 1) / reports) for place in range(reports)]
    return [*(step * config.train.batch_size for step in ends[:-1]), config.train.samples]


def spread(workers: int, cpus_per_worker: int, nodes: list[float]) -> int:
    """How many trials find room at the same time.

    Beside its workers, each trial has a driver that reserves a hundredth of a CPU on some node. A
    node whose CPUs the workers would fill exactly may so lose the room of one worker.

    Args:
        workers: of a trial.
        cpus_per_worker: CPUs that each takes on one node.
        nodes: CPUs of every node.
    """
    room = sum(int(cpus // cpus_per_worker) for cpus in nodes)
    for trials in range(room // workers, 0, -1):
        tight = sum(cpus % cpus_per_worker < trials * DRIVER_CPUS for cpus in nodes)
        if room - min(trials, tight) >= trials * workers:
            return trials
    return 0


DRIVER_CPUS = 0.01
"""Ray Tune asks every trial for some CPU of its own; the least that it accepts in practice."""
