"""What Optuna suggests and stores, also after Ray Tune has lost a part of it."""

from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.trial import TrialState

from prioritycut_ray.config import load_config, parse_config
from prioritycut_ray.errors import UserError
from prioritycut_ray.search.space import Domain, load_base, load_search, trial_config
from prioritycut_ray.search.suggestions import Suggestions, check_study
from tests.places import ROOT

SAMPLES = 8
SPACE = {
    "priority_cut.mask": Domain(choice=("priority", "cutmix")),
    "priority_cut.top_k": Domain(uniform=(1, 100), when={"priority_cut.mask": "priority"}),
    "priority_cut.warmup_samples": Domain.model_validate({"int": (0, 4)}),
    "optim.lr": Domain(loguniform=(1e-4, 1e-2)),
}


def suggestions(storage: str | None = None) -> Suggestions:
    return Suggestions(
        SPACE, higher_is_better=False, samples=SAMPLES, seed=0, study="s", storage=storage
    )


def report(step: int, objective: float) -> dict[str, Any]:
    return {"training_iteration": step, "samples": 4 * step, "objective": objective}


def database(folder: Path) -> str:
    return f"sqlite:///{folder}/new/optuna.db"


def opened(
    storage: str, *, exists: bool = False, resume: bool = False, folder: str = "runs/s"
) -> None:
    check_study(storage, "s", folder, higher_is_better=False, exists=exists, resume=resume)


def test_every_suggestion_of_the_shipped_search_is_a_valid_configuration() -> None:
    search = load_search(ROOT / "tune_configs" / "prioritycut.yaml", smoke=False)
    base = load_base(search, [])
    drawn = Suggestions(
        search.space, higher_is_better=False, samples=8, seed=0, study="s", storage=None
    )
    conditional = {"priority_cut.top_k", "priority_cut.background_threshold"}
    kinds = set()
    for number in range(12):
        values = drawn.suggest(str(number))
        kinds.add(values["priority_cut.mask"])
        is_priority = values["priority_cut.mask"] == "priority"
        assert values.keys() == search.space.keys() - (set() if is_priority else conditional)
        config = trial_config(base, search, values, "trial", "runs")
        assert parse_config(config.model_dump(mode="json"), "again") == config
        assert config.priority_cut is not None
        assert config.priority_cut.mask == values["priority_cut.mask"]
        if not is_priority:
            assert config.priority_cut.top_k == load_config("vox256").priority_cut.top_k
    assert kinds == {"priority", "cutmix"}


def test_a_study_shows_trials_that_finished_ended_early_and_failed(tmp_path: Path) -> None:
    storage = database(tmp_path)
    opened(storage)
    drawn = suggestions(storage)
    for name in "abc":
        drawn.suggest(name)
        drawn.on_trial_result(name, report(1, 0.5))
    drawn.on_trial_result("a", report(2, 0.25))
    drawn.on_trial_complete("a", report(2, 0.25))
    drawn.on_trial_complete("b", report(1, 0.5))
    drawn.on_trial_complete("c", error=True)
    study = optuna.load_study(storage=storage, study_name="s")
    assert [trial.user_attrs["trial"] for trial in study.trials] == ["a", "b", "c"]
    states = [TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL]
    assert [trial.state for trial in study.trials] == states
    assert (study.best_value, study.best_trial.intermediate_values) == (0.25, {1: 0.5, 2: 0.25})
    assert study.direction == optuna.study.StudyDirection.MINIMIZE


def test_a_restored_search_repeats_no_trial_of_its_study(tmp_path: Path) -> None:
    storage, state = database(tmp_path), str(tmp_path / "state.pkl")
    opened(storage)
    killed = suggestions(storage)
    killed.suggest("a")
    killed.suggest("b")
    killed.on_trial_result("a", report(1, 0.5))
    killed.save(state)
    # The database learns what the stored state will never know.
    killed.on_trial_result("a", report(2, 0.25))
    killed.on_trial_complete("a", report(2, 0.25))
    lost, ended = killed.suggest("c"), killed.suggest("d")
    killed.on_trial_complete("d", report(2, 0.125))

    opened(storage, exists=True, resume=True)
    resumed = suggestions(storage)
    resumed.restore(state)
    for step, objective in ((1, 0.5), (2, 0.25)):
        resumed.on_trial_result("a", report(step, objective))
    resumed.on_trial_complete("a", report(2, 0.25))
    assert [resumed.suggest("e"), resumed.suggest("f")] == [lost, ended]
    resumed.suggest("g")
    for name in "befg":
        resumed.on_trial_result(name, report(2, 0.5))
        resumed.on_trial_complete(name, report(2, 0.5))
    study = optuna.load_study(storage=storage, study_name="s")
    assert [trial.value for trial in study.trials] == [0.25, 0.5, 0.5, 0.125, 0.5]
    assert all(trial.state == TrialState.COMPLETE for trial in study.trials)


@pytest.mark.parametrize(
    ("storage", "words"),
    [
        ("optuna.db", ["optuna.db", "parse"]),
        ("mysql://me:secret@host/optuna", ["mysql://me:***@host/optuna", "MySQLdb"]),
        ("nosql:///x", ["nosql"]),
        ("sqlite:////proc/optuna/optuna.db", ["sqlite:////proc/optuna/optuna.db"]),
        ("sqlite:///{folder}", ["unable to open database file"]),
        ("sqlite:///{file}", ["file is not a database"]),
    ],
)
def test_a_database_that_cannot_be_opened_is_a_clear_error(
    storage: str, words: list[str], tmp_path: Path
) -> None:
    file = tmp_path / "notes.txt"
    file.write_text("not a database, but long enough for its header " * 20)
    with pytest.raises(UserError, match="cannot be opened or written") as caught:
        opened(storage.format(folder=tmp_path, file=file))
    message = str(caught.value)
    assert message.startswith("searcher.storage=")
    assert "\n" not in message
    assert "secret" not in message
    for word in [*words, "or remove `storage`"]:
        assert word in message


def test_a_study_belongs_to_one_search(tmp_path: Path) -> None:
    storage = database(tmp_path)
    with pytest.raises(UserError, match="has no study 's' of the search runs/s; restore"):
        opened(storage, exists=True, resume=True)
    opened(storage)
    opened(storage, exists=True, resume=True)
    with pytest.raises(UserError, match="already has a study 's', of runs/s; use another name"):
        opened(storage, folder="elsewhere/s", resume=True)
    with pytest.raises(UserError, match=r"but runs/s has no trials; .* --resume"):
        opened(storage)
    opened(storage, resume=True)
    optuna.create_study(storage=storage, study_name="other")
    with pytest.raises(UserError, match="study 'other', of another program"):
        check_study(storage, "other", "runs/s", higher_is_better=False, exists=False, resume=False)
