"""Population Based Training as Ray Tune has it, without what leaves a population waiting or undone.

Ray's scheduler ends a round when all members have reported, and waits for failed ones as well; and
in the last round it replaces members that have nothing left to train.
"""

import random
from collections.abc import Mapping
from typing import Any

from ray.tune.experiment import Trial
from ray.tune.schedulers import PopulationBasedTraining

from prioritycut_ray.search.space import Domain, Population
from prioritycut_ray.search.trial import SAMPLES

FACTORS = (0.8, 1.2)
"""By which numbers are changed (Jaderberg et al., 2017)."""


class PopulationScheduler(PopulationBasedTraining):  # type: ignore[misc]  # ray is untyped
    """PBT in rounds: one per report, all members together, none after the last report.

    Args:
        options: quantile and probability of drawing a new value.
        domains: the dimensions that are changed, by dotted key.
        samples: of a whole trial.
        seed: of the changes.
    """

    def __init__(
        self, options: Population, domains: Mapping[str, Domain], *, samples: int, seed: int
    ) -> None:
        super().__init__(
            time_attr="training_iteration",
            perturbation_interval=1,
            quantile_fraction=options.quantile,
            custom_explore_fn=Explore(domains, options.resample, random.Random(seed)),
            synch=True,  # the members take turns where there is no room for all at once
        )
        self._samples = samples

    def on_trial_result(self, tune_controller: Any, trial: Trial, result: dict[str, Any]) -> str:
        """Called by Tune at every report."""
        if result[SAMPLES] >= self._samples:
            return str(self.CONTINUE)
        return str(super().on_trial_result(_WithoutFailed(tune_controller), trial, result))

    def choose_trial_to_run(self, tune_controller: Any) -> Trial | None:
        """Called by Tune whenever it has room."""
        chosen = super().choose_trial_to_run(tune_controller)
        members = _WithoutFailed(tune_controller).get_live_trials()
        if chosen is None and members and all(map(self._has_reported, members)):
            # The member that the others waited for has failed: the round ends without it.
            member = min(members, key=lambda trial: str(trial.trial_id))
            self.on_trial_result(
                tune_controller, member, dict(self._trial_state[member].last_result)
            )
            chosen = super().choose_trial_to_run(tune_controller)
        return chosen

    def _has_reported(self, trial: Trial) -> bool:
        """Whether a member waits for the end of this round."""
        last: int = self._trial_state[trial].last_train_time
        return bool(trial.status == Trial.PAUSED and last >= self._next_perturbation_sync)


class _WithoutFailed:
    """A controller of Tune whose live trials have not ended: Ray's keeps those that failed."""

    def __init__(self, controller: Any) -> None:
        self._controller = controller

    def get_live_trials(self) -> list[Trial]:
        """Those that run, wait or will."""
        return [trial for trial in self._controller.get_live_trials() if not trial.is_finished()]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._controller, name)


class Explore:
    """Changes the values that a member takes over: each stays within its domain.

    Args:
        domains: by dotted key; other values are left as they are.
        resample: probability that a value is drawn from its domain instead of changed a little.
        draw: the source of randomness.
    """

    def __init__(self, domains: Mapping[str, Domain], resample: float, draw: random.Random) -> None:
        self._domains, self._resample, self._draw = dict(domains), resample, draw

    def __call__(self, parameters: Mapping[str, Any]) -> dict[str, Any]:
        """The parameters with every value of a domain changed."""
        changed = {key: self._changed(key, parameters[key]) for key in self._domains}
        return {**parameters, **changed}

    def _changed(self, key: str, value: Any) -> Any:
        domain = self._domains[key]
        if self._draw.random() < self._resample:
            return domain.draw(self._draw)
        if domain.choice:
            place = domain.choice.index(value) + self._draw.choice((-1, 1))
            return domain.choice[min(max(place, 0), len(domain.choice) - 1)]
        assert domain.bounds is not None
        low, high = domain.bounds
        factor = self._draw.choice(FACTORS)
        if not domain.whole:
            return min(max(value * factor, low), high)
        step = max(1, round(abs(value * factor - value)))  # small numbers change too
        return min(max(value + (step if factor > 1 else -step), low), high)
