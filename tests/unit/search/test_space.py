"""Search files, and errors before anything starts."""

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from prioritycut_ray.config import load_config
from prioritycut_ray.errors import UserError
from prioritycut_ray.search.space import (
    Optuna,
    SearchConfig,
    boundaries,
    check_space,
    grid_points,
    load_base,
    load_search,
    max_concurrent_trials,
    trial_config,
)
from prioritycut_ray.training.state import new_state
from prioritycut_ray.training.steps import draw_randomness
from prioritycut_ray.training.worker import Worker
from tests.conftest import TINY
from tests.places import ROOT

SHIPPED = sorted((ROOT / "tune_configs").glob("*.yaml"))
GRID = {"priority_cut.top_k": {"grid": [5, 40]}}


def written(path: Path, **values: Any) -> Path:
    file = path / "search.yaml"
    file.write_text(yaml.safe_dump({"name": "s", "base": str(TINY), "space": GRID} | values))
    return file


def checked(path: Path, **values: Any) -> SearchConfig:
    search = load_search(written(path, **values), smoke=False)
    check_space(search, load_base(search, []))
    return search


@pytest.mark.parametrize("smoke", [False, True])
@pytest.mark.parametrize("file", SHIPPED, ids=lambda path: path.stem)
def test_every_shipped_search_is_valid_at_both_sizes(file: Path, smoke: bool) -> None:
    search = load_search(file, smoke=smoke)
    for config in check_space(search, load_base(search, [])):
        assert len(boundaries(config, search.reports)) == search.reports


def test_the_ablation_has_the_four_rows_of_the_paper_with_three_seeds_each() -> None:
    search = load_search(next(path for path in SHIPPED if path.stem == "ablation"), smoke=False)
    rows = {
        (c.discriminator.kind, c.priority_cut and c.priority_cut.mask, c.train.seed)
        for c in check_space(search, load_base(search, []))
    }
    ways = [("patch", None), ("unet", None), ("unet", "cutmix"), ("unet", "priority")]
    assert rows == {(*way, seed) for way in ways for seed in (0, 1, 2)}


def test_a_grid_runs_in_the_order_of_its_file() -> None:
    space = {
        "train.seed": {"grid": [0, 1]},
        "loss.perceptual.scales": {"grid": [[1.0], [0.5]]},  # Ray Tune crosses lists itself
        "optim.lr": {"grid": [0.1, None]},
    }
    search = SearchConfig.model_validate({"name": "s", "base": str(TINY), "space": space})
    assert [tuple(point.items()) for point in grid_points(search.space)] == [
        (("train.seed", seed), ("optim.lr", lr)) for seed in (0, 1) for lr in (0.1, None)
    ]


ABLATION_OF_PUPPETS = [
    path
    for path in SHIPPED
    if path.stem.startswith("ablation_puppets") and path.stem != "ablation_puppets_tps"
]


@pytest.mark.parametrize("file", ABLATION_OF_PUPPETS, ids=lambda path: path.stem)
def test_the_rows_of_a_seed_differ_in_nothing_but_the_row(file: Path) -> None:
    search = load_search(file, smoke=False)
    rows = [c for c in check_space(search, load_base(search, [])) if c.train.seed == 1]
    assert len(rows) == len(search.variants) > (1 if file.stem == "ablation_puppets" else 3)
    shared = [
        row.model_dump(exclude={"priority_cut": True, "discriminator": {"kind"}}) for row in rows
    ]
    assert all(each == shared[0] for each in shared)
    device, ends = torch.device("cpu"), (rows[0], rows[-1])
    for drawn in (
        [draw_randomness(row, 7, Worker(0, 1, device)) for row in ends],
        [new_state(row, device).animator.state_dict() for row in ends],
    ):
        torch.testing.assert_close(*drawn, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"space": {"optim.rl": {"grid": [1]}}}, ["unknown key 'optim.rl'", "lr"]),
        ({"space": {"optim.lr": {"grid": [1e-4, "much"]}}}, ["optim.lr", "much"]),
        ({"space": {"optim.lr": {"grid": [1e-4, -1]}}}, ["optim.lr=-1"]),
        ({"space": {"optim.lr": {"uniform": [1, 0]}}}, ["lower bound 1 must be less"]),
        ({"space": {"optim.lr": {"loguniform": [0, 1]}}}, ["loguniform must be greater than 0"]),
        ({"space": {"optim.lr": {"grid": [1], "choice": [1]}}}, ["exactly one of grid"]),
        ({"space": {"optim.lr": {"grid": None}}}, ["exactly one of grid"]),
        ({"space": {"optim.lr": {"normal": [0, 1]}}}, ["normal"]),
        ({"space": {"optim.lr": {"uniform": [0, 1]}}}, ["searcher=grid needs a grid"]),
        ({"space": {"train.samples": {"grid": [8]}}}, ["set by the search"]),
        ({"space": {"train.batch_size": {"grid": [4, 5]}}}, ["train.batch_size=5", "divisible"]),
        ({"searcher": "optuna"}, ["does not support grid"]),
        ({"scheduler": {"kind": "asha"}}, ["reports"]),
        ({"scheduler": {"kind": "pbt"}, "reports": 2}, ["scheduler=pbt needs trials"]),
        (
            {
                **{"scheduler": {"kind": "pbt"}, "reports": 2, "trials": 2, "searcher": "random"},
                "space": {"discriminator.kind": {"choice": ["unet", "patch"]}},
            },
            ["scheduler=pbt copies weights", "discriminator.kind changes the networks"],
        ),
        ({"scheduler": {"kind": "hyperband"}}, ["asha", "pbt"]),
        ({"searcher": "bayes"}, ["searcher.kind='bayes'", "'grid', 'random', 'optuna'"]),
        ({"searcher": {"kind": "grid", "storage": "x"}}, ["unknown key 'searcher.storage'"]),
        ({"space": {}}, ["nothing to search"]),
        ({"trails": 3}, ["trails", "trials"]),
        ({"variants": {"patch": {"discriminator.kind": "patch"}}}, ["per-pixel logits"]),
    ],
)
def test_an_invalid_search_is_rejected_with_the_reason(
    values: dict[str, Any], words: list[str], tmp_path: Path
) -> None:
    with pytest.raises(UserError) as caught:
        checked(tmp_path, **values)
    assert "\n" not in str(caught.value)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("key", "domain", "words"),
    [
        ("model.num_keypoints", {"uniform": [5, 15]}, ["an integer", "`int: [5, 15]`"]),
        ("train.seed", {"loguniform": [1, 1000]}, ["an integer", "`int: [1, 1000]`"]),
        ("data.size", {"int": [32, 96]}, ["data.size=33", "multiple of 32", "`choice`"]),
        ("priority_cut.top_k", {"uniform": [50, 101]}, ["priority_cut.top_k=101"]),
    ],
)
def test_a_range_with_invalid_values_is_rejected(
    key: str, domain: dict[str, Any], words: list[str], tmp_path: Path
) -> None:
    with pytest.raises(UserError) as caught:
        checked(tmp_path, searcher="random", space={key: domain})
    for word in words:
        assert word in str(caught.value)


CONDITIONAL = {
    "priority_cut.mask": {"choice": ["priority", "cutmix"]},
    "priority_cut.top_k": {"uniform": [1, 100], "when": {"priority_cut.mask": "priority"}},
}


@pytest.mark.parametrize(
    ("when", "words"),
    [
        ({"priority_cut.maks": "priority"}, ["priority_cut.maks", "mean priority_cut.mask?"]),
        ({"optim.lr": 1}, ["optim.lr is not in the space", "add it, or remove the condition"]),
        ({"priority_cut.top_k": 20}, ["priority_cut.top_k is not a `choice`"]),
        ({"priority_cut.mask": "cut"}, ["is never 'cut'", "'priority', 'cutmix'"]),
        ({"priority_cut.mask": ["priority", "cut"]}, ["is never 'cut'"]),
        ({"priority_cut.mask": []}, ["lists no value of priority_cut.mask"]),
        ("priority", ["must be a mapping"]),
    ],
)
def test_a_condition_that_cannot_hold_is_rejected(
    when: object, words: list[str], tmp_path: Path
) -> None:
    space = CONDITIONAL | {"priority_cut.background_threshold": {"uniform": [0, 1], "when": when}}
    with pytest.raises(UserError) as caught:
        checked(tmp_path, searcher="optuna", space=space)
    assert "\n" not in str(caught.value)
    for word in ["priority_cut.background_threshold.when", *words]:
        assert word in str(caught.value)


def test_conditions_that_depend_on_each_other_are_rejected(tmp_path: Path) -> None:
    space = {
        "priority_cut.mask": {"choice": ["cutmix"], "when": {"data.visit": "clip"}},
        "data.visit": {"choice": ["clip"], "when": {"priority_cut.mask": "cutmix"}},
    }
    with pytest.raises(UserError, match=r"conditions of .*mask.* depend on each other"):
        checked(tmp_path, searcher="optuna", space=space)


@pytest.mark.parametrize(
    "changes",
    [
        {"searcher": "random"},
        {"searcher": "optuna", "scheduler": {"kind": "pbt"}, "trials": 2, "reports": 2},
    ],
)
def test_conditions_need_optuna(changes: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"space.priority_cut.top_k.when needs searcher=optuna"):
        checked(tmp_path, space=CONDITIONAL, **changes)


def test_dimensions_whose_condition_is_false_are_left_out_of_what_is_checked(
    tmp_path: Path,
) -> None:
    space = {
        **CONDITIONAL,
        "priority_cut.background_threshold": {
            **{"choice": [0.25, 0.75]},
            "when": {"priority_cut.mask": "priority", "priority_cut.top_k": [5, 10]},
        },
    }
    space["priority_cut.top_k"] = {
        **{"choice": [5, 10, 20]},
        "when": {"priority_cut.mask": ["priority"]},
    }
    search = checked(tmp_path, searcher="optuna", space=space)
    configs = check_space(search, load_base(search, ["priority_cut.top_k=50"]))
    found = sorted(
        (c.priority_cut.mask, c.priority_cut.top_k, c.priority_cut.background_threshold)
        for c in configs
        if c.priority_cut
    )
    assert found == [
        ("cutmix", 50.0, 0.5),
        *(("priority", k, m) for k in (5.0, 10.0) for m in (0.25, 0.75)),
        ("priority", 20.0, 0.5),
    ]
    space["priority_cut.mask"] = {"choice": ["cutmix", "priority"]}
    space["model.num_keypoints"] = {"uniform": [5, 15], "when": {"priority_cut.top_k": 5}}
    with pytest.raises(UserError, match=r"space\.model.num_keypoints: must be an integer"):
        checked(tmp_path, searcher="optuna", space=space)


def test_the_path_of_a_database_does_not_depend_on_where_a_search_resumes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for given, expected in [
        ("sqlite:///optuna.db", f"sqlite:///{tmp_path}/optuna.db"),
        ("sqlite:////shared/optuna.db", "sqlite:////shared/optuna.db"),
        ("postgresql://host/optuna", "postgresql://host/optuna"),
    ]:
        searcher = checked(
            tmp_path,
            searcher={"kind": "optuna", "storage": given},
            space={"optim.lr": {"uniform": [0, 1]}},
        ).searcher
        assert isinstance(searcher, Optuna)
        assert searcher.storage == expected


def test_valid_ranges_are_accepted(tmp_path: Path) -> None:
    space = {
        "optim.lr": {"loguniform": [1e-5, 1e-3]},
        "priority_cut.top_k": {"uniform": [0, 100]},
        "train.seed": {"int": [0, 10**9]},
        "model.num_keypoints": {"int": [5, 15]},
    }
    assert checked(tmp_path, searcher="random", space=space)


def test_variants_may_have_other_networks(tmp_path: Path) -> None:
    variants = {
        "method": {},
        "alone": {"discriminator.kind": "none", "priority_cut": None},
        "splines": {"model": {"family": "thin_plate", "dense_motion": {"num_blocks": 3}}},
    }
    search = checked(tmp_path, variants=variants, space={"optim.lr": {"grid": [1e-4]}})
    configs = check_space(search, load_base(search, []))
    kinds = {(config.model.family, config.discriminator.kind) for config in configs}
    assert kinds == {("first_order", "unet"), ("first_order", "none"), ("thin_plate", "unet")}


def test_a_file_without_a_smoke_size_says_so(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no section `smoke`"):
        load_search(written(tmp_path), smoke=True)


def test_a_key_in_a_disabled_section_enables_it(tmp_path: Path) -> None:
    search = checked(tmp_path, set={"priority_cut": None})
    config = trial_config(load_base(search, []), search, {"priority_cut.top_k": 5}, "trial", "runs")
    assert config.priority_cut is not None
    assert config.priority_cut.top_k == 5


@pytest.mark.parametrize(
    ("samples", "reports", "expected"),
    [(32, 1, [32]), (32, 2, [16, 32]), (30, 3, [12, 24, 30]), (32, 8, list(range(4, 33, 4)))],
)
def test_reports_are_equally_spaced_at_whole_steps(
    samples: int, reports: int, expected: list[int]
) -> None:
    config = load_config(str(TINY), [f"train.samples={samples}"])
    assert boundaries(config, reports) == expected


def test_more_reports_than_steps_are_rejected() -> None:
    with pytest.raises(UserError, match="8 steps, too few for reports=9"):
        boundaries(load_config(str(TINY)), 9)


@pytest.mark.parametrize(
    ("workers", "cpus", "nodes", "trials"),
    [
        (1, 1, [2], 1),  # no CPU share is left for the second trial's driver
        (1, 1, [3], 2),
        (2, 1, [2], 0),
        (2, 1, [3], 1),
        (2, 1, [2, 2], 1),
        (2, 1, [1, 1, 1], 1),
        (2, 4, [9, 9], 2),
        (2, 4, [7, 7], 1),
        (4, 1, [64], 15),
        (1, 8, [4, 4], 0),
    ],
)
def test_concurrent_trials_fit_on_the_nodes(
    workers: int, cpus: int, nodes: list[float], trials: int
) -> None:
    assert max_concurrent_trials(workers, cpus, nodes) == trials
