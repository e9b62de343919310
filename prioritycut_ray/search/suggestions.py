"""What Optuna suggests to the trials of a search, and the database that it is stored in."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import optuna
from optuna.storages import RDBStorage
from optuna.trial import FrozenTrial
from ray.tune.result import TRAINING_ITERATION
from ray.tune.search.optuna import OptunaSearch
from sqlalchemy.exc import SQLAlchemyError

from prioritycut_ray.errors import UserError, reason_of
from prioritycut_ray.ray_cluster.compat import optuna_study, optuna_trials, suggest_again
from prioritycut_ray.search.space import SQLITE, Domain
from prioritycut_ray.search.trial import OBJECTIVE, SAMPLES

_FOLDER = "folder"
"""Attribute of a study: the folder of its search."""
_TRIAL = "trial"
"""Attribute of a trial in the study: Ray Tune's name of it, which is that of its run too."""


class Space:
    """Chooses the values of a trial by Optuna's define-by-run interface."""

    def __init__(self, domains: Mapping[str, Domain]) -> None:
        self._domains = dict(domains)

    def __call__(self, trial: Any) -> dict[str, Any]:
        """Return the values of the dimensions that apply, by dotted key.

        Args:
            trial: an ``optuna.Trial``.
        """
        values: dict[str, Any] = {}
        for key, domain in self._domains.items():
            if domain.applies(values):
                values[key] = _suggested(trial, key, domain)
        return values


def _suggested(trial: Any, key: str, domain: Domain) -> Any:
    if domain.choice:
        return trial.suggest_categorical(key, domain.choice)
    if domain.whole:
        return trial.suggest_int(key, *domain.whole)
    if domain.uniform:
        return trial.suggest_float(key, *domain.uniform)
    assert domain.loguniform is not None
    return trial.suggest_float(key, *domain.loguniform, log=True)


class Suggestions(OptunaSearch):  # type: ignore[misc]  # ray is untyped
    """Optuna's suggestions, each of which belongs to exactly one trial of the search.

    A database knows more than what Ray Tune has stored when the driver was killed. After a resume,
    results that are in the database already are not stored again, and points that Ray Tune has
    forgotten are suggested again.

    Trials that ended early are stored as pruned: Optuna does not compare their last objective
    with that of finished trials, but still learns from it.

    Args:
        domains: the dimensions, by dotted key.
        higher_is_better: whether the objective is maximized.
        samples: number of samples of a whole trial.
        seed: of the sampler.
        study: name of the study.
        storage: database, as an SQLAlchemy URL; in memory by default.
    """

    def __init__(
        self,
        domains: Mapping[str, Domain],
        *,
        higher_is_better: bool,
        samples: int,
        seed: int,
        study: str,
        storage: str | None,
    ) -> None:
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        super().__init__(
            Space(domains),
            metric=OBJECTIVE,
            mode="max" if higher_is_better else "min",
            study_name=study,
            storage=RDBStorage(storage) if storage else None,
            seed=seed,
        )
        self._samples = samples

    def suggest(self, trial_id: str) -> dict[str, Any]:
        """Return the values of a new trial."""
        number = self._forgotten()
        if number is not None:
            suggest_again(self, trial_id, number)
        values: dict[str, Any] = super().suggest(trial_id)
        if not self._stored(trial_id).state.is_finished():
            optuna_trials(self)[trial_id].set_user_attr(_TRIAL, trial_id)
        return values

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        """Store a report."""
        stored = self._stored(trial_id)
        is_known = result[TRAINING_ITERATION] in stored.intermediate_values
        if not is_known and not stored.state.is_finished():
            super().on_trial_result(trial_id, result)

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        """Store how a trial ended."""
        if self._stored(trial_id).state.is_finished():
            return
        if result is not None:
            self.on_trial_result(trial_id, result)  # Ray Tune passes the last report here alone
        ended_early = result is not None and result[SAMPLES] < self._samples
        super().on_trial_complete(trial_id, None if ended_early else result, error)

    def _forgotten(self) -> int | None:
        """Return the number of a trial that is in the study but not in the search."""
        known = {trial.number for trial in optuna_trials(self).values()}
        for stored in optuna_study(self).get_trials(deepcopy=False):
            if _TRIAL in stored.user_attrs and stored.number not in known:
                return int(stored.number)
        return None

    def _stored(self, trial_id: str) -> FrozenTrial:
        number = optuna_trials(self)[trial_id].number
        trial: FrozenTrial = optuna_study(self).get_trials(deepcopy=False)[number]
        return trial


def check_study(
    storage: str, name: str, folder: str, *, higher_is_better: bool, exists: bool, resume: bool
) -> None:
    """Create the study of a new search in a database, or check that it is that of the search.

    Args:
        storage: database, as an SQLAlchemy URL. The folder of an SQLite file is created.
        name: of the study.
        folder: folder of the search.
        higher_is_better: whether the objective is maximized.
        exists: whether the search exists.
        resume: whether it may be resumed.

    Raises:
        UserError: the database cannot be opened or written, its study of this name belongs to
            another search, or it has no study of a search that exists.
    """
    place = f"searcher.storage={_without_password(storage)}"
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        study = _opened(storage, name)
        if study is None and not exists:
            directions = optuna.study.StudyDirection
            study = optuna.create_study(
                storage=storage,
                study_name=name,
                direction=directions.MAXIMIZE if higher_is_better else directions.MINIMIZE,
            )
            study.set_user_attr(_FOLDER, folder)
            return
    except _NOT_OPENED as error:
        raise UserError(
            f"{place}: cannot be opened or written ({_reason(error)}); give the SQLAlchemy URL of "
            "a database, such as sqlite:////shared/optuna.db, or remove `storage`"
        ) from error
    if study is None:
        raise UserError(
            f"{place}: has no study {name!r} of the search {folder}; restore the database to "
            "resume it, or use another name"
        )
    owner = study.user_attrs.get(_FOLDER, "another program")
    if owner != folder:
        raise UserError(
            f"{place}: already has a study {name!r}, of {owner}; use another name or database"
        )
    if not exists and not resume:
        raise UserError(
            f"{place}: has a study {name!r} of this search, but {folder} has no trials; repeat "
            "those of the study with --resume, or use another name or database"
        )


_NOT_OPENED = (
    SQLAlchemyError,
    optuna.exceptions.OptunaError,
    ImportError,  # of the database's driver
    OSError,
    RuntimeError,  # of a database that another version of Optuna wrote
    ValueError,
)


def _opened(storage: str, name: str) -> optuna.Study | None:
    """Return the study of a database, or None if it has none of this name."""
    if storage.startswith(SQLITE):
        Path(storage.removeprefix(SQLITE)).parent.mkdir(parents=True, exist_ok=True)
    try:
        return optuna.load_study(storage=storage, study_name=name)
    except KeyError:
        return None


def _without_password(url: str) -> str:
    return re.sub(r"(://[^:/@]*):[^@]*@", r"\1:***@", url)


def _reason(error: Exception) -> str:
    """Return what the database's driver says."""
    return reason_of(getattr(error, "orig", None) or error.__cause__ or error)
