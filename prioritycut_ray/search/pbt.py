"""Population Based Training that does not wait for failed trials.

Ray's scheduler ends a round when all trials have reported, and waits for failed trials too. In the
last round it replaces trials that have nothing left to train.
"""

import random
from collections.abc import Mapping
from typing import Any

from ray.tune.experiment import Trial
from ray.tune.schedulers import PopulationBasedTraining

from prioritycut_ray.ray_cluster.compat import has_reported, last_result
from prioritycut_ray.search.space import PBT, Domain
from prioritycut_ray.search.trial import SAMPLES

FACTORS = (0.8, 1.2)
"""Perturbation factors (Jaderberg et al., 2017)."""


class PBTScheduler(PopulationBasedTraining):  # type: ignore[misc]  # ray is untyped
    """Synchronous PBT: one round per report, none after the last report.

    A search folder refers to this class, to :class:`Explore` and to ``Domain`` by their names.

    Args:
        options: quantile and resample probability.
        domains: the dimensions to perturb, by dotted key.
        samples: number of samples of a whole trial.
        seed: of the perturbations.
    """

    def __init__(
        self, options: PBT, domains: Mapping[str, Domain], *, samples: int, seed: int
    ) -> None:
        super().__init__(
            time_attr="training_iteration",
            perturbation_interval=1,
            quantile_fraction=options.quantile,
            custom_explore_fn=Explore(domains, options.resample, random.Random(seed)),
            synch=True,  # trials take turns if the cluster cannot run all of them at once
        )
        self._samples = samples

    def on_trial_result(self, tune_controller: Any, trial: Trial, result: dict[str, Any]) -> str:
        """Decide what happens to a trial after a report."""
        if result[SAMPLES] >= self._samples:
            return str(self.CONTINUE)
        return str(super().on_trial_result(_WithoutFailed(tune_controller), trial, result))

    def choose_trial_to_run(self, tune_controller: Any) -> Trial | None:
        """Choose the next trial when resources are free."""
        chosen = super().choose_trial_to_run(tune_controller)
        trials = _WithoutFailed(tune_controller).get_live_trials()
        if chosen is None and trials and all(map(self._has_reported, trials)):
            # The trial that the others waited for has failed: end the round without it.
            trial = min(trials, key=lambda item: str(item.trial_id))
            self.on_trial_result(tune_controller, trial, last_result(self, trial))
            chosen = super().choose_trial_to_run(tune_controller)
        return chosen

    def _has_reported(self, trial: Trial) -> bool:
        """Return whether a trial is waiting for the end of this round."""
        return bool(trial.status == Trial.PAUSED and has_reported(self, trial))


class _WithoutFailed:
    """A Tune controller whose live trials exclude failed ones."""

    def __init__(self, controller: Any) -> None:
        self._controller = controller

    def get_live_trials(self) -> list[Trial]:
        """Return the trials that have not ended."""
        return [trial for trial in self._controller.get_live_trials() if not trial.is_finished()]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._controller, name)


class Explore:
    """Perturb the values that a trial clones; each stays within its domain.

    Args:
        domains: domains by dotted key; other values are left unchanged.
        resample: probability of sampling a value from its domain instead of perturbing it.
        draw: source of randomness.
    """

    def __init__(self, domains: Mapping[str, Domain], resample: float, draw: random.Random) -> None:
        self._domains, self._resample, self._draw = dict(domains), resample, draw

    def __call__(self, parameters: Mapping[str, Any]) -> dict[str, Any]:
        """Return the parameters with the value of every domain perturbed."""
        changed = {key: self._changed(key, parameters[key]) for key in self._domains}
        return {**parameters, **changed}

    def _changed(self, key: str, value: Any) -> Any:
        domain = self._domains[key]
        if self._draw.random() < self._resample:
            return domain.sample(self._draw)
        if domain.choice:
            place = domain.choice.index(value) + self._draw.choice((-1, 1))
            return domain.choice[min(max(place, 0), len(domain.choice) - 1)]
        assert domain.bounds is not None
        low, high = domain.bounds
        factor = self._draw.choice(FACTORS)
        if not domain.whole:
            return min(max(value * factor, low), high)
        step = max(1, round(abs(value * factor - value)))  # small integers change too
        return min(max(value + (step if factor > 1 else -step), low), high)
