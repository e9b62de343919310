"""benchmarks/ablation.py: scores of trials, their comparison, and what is left to train."""

import importlib
import math
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from prioritycut_ray.config import load_config
from prioritycut_ray.errors import ExitCode, UserError
from prioritycut_ray.search.space import VARIANT, load_search
from prioritycut_ray.training.checkpoint import save_checkpoint
from prioritycut_ray.training.state import new_state
from tests.clip_sets import clip_member, write_members
from tests.conftest import TINY
from tests.places import ROOT

BRANCHES = ROOT / "tune_configs" / "ablation_puppets_branches.yaml"
ROWS = ("baseline", "unet", "cutmix", "prioritycut")
METRICS = ("disoccluded", "rim", "elsewhere", "l1", "ssim", "proxy_efficientnet_lite0")


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("ablation")


@pytest.fixture
def tables(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("ablation_report")


Error = Callable[[str, int, int], float]
"""Error of a row, a seed and a puppet."""


def scores(tables: Any, error: Error, *, seeds: int = 17, puppets: int = 20) -> pd.DataFrame:
    """A table of scores in which every metric has the same errors."""
    runs = [(row, seed) for row in ROWS for seed in range(seeds)]
    return pd.DataFrame(
        [
            {"row": row, "seed": seed, "puppet": puppet, "task": task, "share": puppet / 100}
            | dict.fromkeys(METRICS, error(row, seed, puppet))
            for row, seed in [*runs, (tables.COPY, 0)]
            for puppet in range(puppets)
            for task in tables.TASKS
        ]
    )


def noisy(effect: float, copied: float = 0.3) -> Error:
    """PriorityCut changes an error of 0.1 by a share; seeds differ by 10 %, and pairs by 1 %."""

    def error(row: str, seed: int, puppet: int) -> float:
        if row == "copied source":
            return copied
        noise = np.random.default_rng([seed, puppet, ROWS.index(row)]).normal()
        shared = np.random.default_rng(seed).normal()
        change = effect if row == "prioritycut" else 0
        return 0.1 * float(1 + 0.1 * shared + 0.01 * noise + change)

    return error


@pytest.mark.parametrize(
    ("effect", "words"),
    [
        (-0.05, "PriorityCut lowers the error"),
        (0.05, "PriorityCut raises the error"),
        (0.0, "an effect of 2.5 % or more is excluded"),
    ],
)
def test_an_effect_is_found_in_pairs_that_vary_less_than_seeds(
    tables: Any, effect: float, words: str
) -> None:
    table = scores(tables, noisy(effect))
    found = tables.compare(table, tables.PRIMARY)
    assert found.effect.mean / found.reference == pytest.approx(effect, abs=0.003)
    assert (found.effect.seeds, found.effect.identities) == (17, 20)
    assert tables.verdict(found) == words


def test_the_report_compares_rows_and_draws_them(tables: Any, tmp_path: Path) -> None:
    family = {tables.BRANCHES: scores(tables, noisy(-0.05), puppets=6)}
    text = tables.report(family)
    assert "**PriorityCut lowers the error.**" in text
    assert text.count("PriorityCut − CutMix | relative, most hidden half") == 2
    assert "partial" not in text
    tables.draw_all(family, tmp_path)
    assert (tmp_path / "seeds.png").read_bytes().startswith(b"\x89PNG")


def test_few_seeds_are_partial_and_a_seed_without_all_rows_is_not_compared(tables: Any) -> None:
    table = scores(tables, noisy(-0.05), seeds=3, puppets=4)
    table = table[(table["row"] != "prioritycut") | (table["seed"] < 2)]
    text = tables.report({tables.BRANCHES: table})
    assert "2 of 17 seeds with the rows to compare: **partial**" in text
    assert "2 of 17 seeds do not decide" in text
    assert tables.complete_seeds(table) == [0, 1]


def test_the_first_rows_of_a_search_are_listed_and_not_compared(tables: Any) -> None:
    table = scores(tables, noisy(-0.05), seeds=1, puppets=4)
    first = table[table["row"].isin(["baseline", "unet", tables.COPY])]
    text = tables.report({tables.BRANCHES: first})
    assert "ablation_puppets_branches: nothing to compare yet" in text
    assert "| + U-Net | 1 |" in text
    assert "1 of 17 seeds do not decide" in tables.report({tables.BRANCHES: table})


def test_a_row_with_fewer_seeds_is_compared_on_those(tables: Any) -> None:
    table = scores(tables, noisy(-0.05), seeds=4, puppets=4)
    table = table[(table["row"] != "baseline") | (table["seed"] < 2)]
    text = tables.report({tables.BRANCHES: table})
    assert "4 of 17 seeds with the rows to compare" in text
    assert row_of_table(text, "| PriorityCut − CutMix | relative | dis").endswith("| 4 |")
    assert row_of_table(text, "| PriorityCut − baseline").endswith("| 2 |")


def test_the_primary_comparison_is_one_of_many_in_other_searches(tables: Any) -> None:
    table = scores(tables, noisy(-0.05), seeds=2, puppets=4)
    text = tables.report({tables.FIRST_ORDER: table})
    assert "Primary comparison" not in text
    assert "| PriorityCut − CutMix | reconstruction | dis-occluded |" in text


def row_of_table(text: str, start: str) -> str:
    """The row of a Markdown table that starts so, without its last cell."""
    line = next(line for line in text.splitlines() if line.startswith(start))
    return line[: line.rstrip("|").rindex("|") + 1]


def test_the_curves_are_compared_with_cutmix_on_their_own_seeds(
    tables: Any, tmp_path: Path
) -> None:
    family = scores(tables, noisy(-0.05), seeds=5, puppets=6)
    curves = scores(tables, noisy(-0.1), seeds=4, puppets=6)
    curves = curves[curves["row"].isin(["prioritycut", tables.COPY])].replace("prioritycut", "k5")
    both = {tables.BRANCHES: family, tables.CURVES: curves}
    text = tables.report(both)
    lines = text[text.index("### Curves") :].splitlines()[4:]
    assert [line.split(" | ")[0] for line in lines] == ["| PriorityCut − CutMix", "| k5 − CutMix"]
    assert all("| 4 |" in line for line in lines)
    found = [float(line.split(" | ")[3].split()[0].replace("−", "-")) for line in lines]
    assert found == [pytest.approx(-5, abs=1.5), pytest.approx(-10, abs=2.5)]
    tables.draw_all(both, tmp_path)
    assert (tmp_path / "curves.png").exists()


def test_additive_mixing_is_compared_with_additive_mixing(tables: Any) -> None:
    family = scores(tables, noisy(-0.05), seeds=2, puppets=4)
    additive = {"cutmix": "cutmix_additive", "prioritycut": "prioritycut_additive"}
    curves = family[family["row"].isin([*additive, tables.COPY])].replace(additive)
    text = tables.report({tables.BRANCHES: family, tables.CURVES: curves})
    lines = text[text.index("Additive mixing:") :].splitlines()[4:]
    assert [line.split(" | ")[2] for line in lines] == ["dis-occluded", "L1", "proxy"]
    assert all(line.startswith("| PriorityCut, additive − CutMix, additive") for line in lines)


def test_an_undecided_comparison_says_so(tables: Any) -> None:
    table = scores(
        tables,
        lambda row, seed, puppet: (
            float(np.random.default_rng([seed, puppet, ROWS.index(row)]).normal()) + 3
            if row in ROWS
            else 9.0
        ),
    )
    assert tables.verdict(tables.compare(table, tables.PRIMARY)) == "undecided"


def test_nothing_is_compared_if_a_row_does_not_beat_the_copied_source(tables: Any) -> None:
    table = scores(tables, noisy(-0.2, copied=0.098))
    text = tables.report({"ablation_puppets": table})
    assert "Not compared: baseline, + U-Net, + CutMix did not beat the copy" in text
    assert "Primary comparison" not in text


def test_the_most_hidden_half_and_puppets_without_hidden_pixels(tables: Any) -> None:
    def error(row: str, seed: int, puppet: int) -> float:
        if puppet == 3:
            return math.nan
        return float(puppet >= 10) if row == "prioritycut" else 2.0

    table = scores(tables, error)
    whole, half = (
        tables.paired_differences(table, tables.PRIMARY._replace(most_hidden=most_hidden))[0]
        for most_hidden in (False, True)
    )
    assert whole.shape == (17, 19)
    assert half.shape == (17, 10)
    assert (half == -1).all()


def test_a_run_that_diverged_is_not_left_out_silently(tables: Any) -> None:
    table = scores(tables, lambda row, seed, puppet: math.inf if seed == 5 else 1.0)
    with pytest.raises(ValueError, match="finite"):
        tables.compare(table, tables.PRIMARY)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A run with random weights."""
    folder = tmp_path_factory.mktemp("runs")
    config = load_config(str(TINY))
    save_checkpoint(new_state(config, torch.device("cpu")), config, folder / "step_0000001")
    return str(folder)


def test_a_trial_is_scored_once_on_the_scenes_of_the_benchmark(
    script: Any, run: str, tmp_path: Path
) -> None:
    puppet = partial(script.held_out_puppets, 1)
    lines = script.score_trial(run, "unet", 3, puppet, [])
    assert [(line["row"], line["seed"], line["task"]) for line in lines] == [
        *(("unet", 3, task) for task in script.TASKS),
        *(("copied source", 0, task) for task in script.TASKS),
    ]
    assert lines[0]["share"] == lines[2]["share"] > 0
    assert lines[2]["l1"] > 0 < lines[0]["l1"] != lines[2]["l1"]
    again = script.score_trial(run, "cutmix", 3, puppet, lines)
    assert [line["row"] for line in again] == ["cutmix"] * 2
    script.write_scores(lines + again, tmp_path / "s.csv")
    read = script.read_scores(tmp_path / "s.csv").to_dict("records")
    assert read[0]["disoccluded"] == pytest.approx(lines[0]["disoccluded"], rel=1e-4)
    with pytest.raises(UserError, match="other values than unet with seed 3"):
        script.score_trial(run, "unet", 4, puppet, [{**lines[0], "setting": "0"}])


def test_clips_are_rebuilt_from_their_first_frames(script: Any, run: str, tmp_path: Path) -> None:
    data = write_members(str(tmp_path), [clip_member(number) for number in (1, 2)], split="test")
    lines = script.score_trial(run, "unet", 0, partial(script.held_out_clips, data), [])
    assert [(line["row"], line["puppet"]) for line in lines] == [
        *(("unet", clip) for clip in (0, 1)),
        *(("copied source", clip) for clip in (0, 1)),
    ]
    assert {line["task"] for line in lines} == {"reconstruction"}
    blue = 3 * 25 / 255  # of frame 3, the only one of these short clips that is scored
    assert [line["l1"] for line in lines[2:]] == [pytest.approx(blue / 3, abs=0.005)] * 2
    assert lines[0]["l1"] != lines[2]["l1"]


def test_rows_are_compared_by_the_metrics_that_clips_have(tables: Any) -> None:
    table = scores(tables, noisy(-0.05), seeds=6, puppets=8)
    table = table[table["task"] == "reconstruction"].drop(
        columns=["disoccluded", "rim", "elsewhere", "share"]
    )
    text = tables.report({tables.CLIPS: table})
    assert "6 of 6 seeds with the rows to compare" in text
    assert "| row | seeds | L1 ↓ | SSIM ↑ | proxy ↓ |" in text
    compared = text[text.rindex("| comparison |") :].splitlines()[2:]
    assert [line.split(" | ")[0].strip("| ") + " " + line.split(" | ")[2] for line in compared] == [
        "CutMix − U-Net L1",
        "CutMix − U-Net SSIM",
        "CutMix − U-Net proxy",
        "PriorityCut − CutMix L1",
        "PriorityCut − CutMix proxy",
    ]


def test_the_setting_is_that_of_the_training_not_of_the_seed_or_the_place(script: Any) -> None:
    base, *others = (
        script.setting_of(load_config(str(TINY), words))
        for words in (
            [],
            ["train.seed=1", "name=b", "data.url=elsewhere", "init=a", "train.cpus_per_worker=2"],
            ["train.samples=8"],
            ["optim.lr=0.1"],
        )
    )
    assert [other == base for other in others] == [True, False, False]


def test_branches_start_from_the_run_of_their_seed(
    script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained = [("baseline", 0, "a/b0"), ("unet", 0, "a/u0"), ("unet", 2, "a/u2")]
    asked = []
    monkeypatch.setattr(
        script, "finished_trials", lambda folder: asked.append(folder.url) or trained
    )
    script.write_scores([{"row": "cutmix", "seed": 2}], tmp_path / f"{BRANCHES.stem}.csv")
    text = script.branched(BRANCHES, ["a", "memory://b"], tmp_path)
    assert asked == [str(Path("a").absolute()), "memory://b"], "init is read by other processes"
    search = load_search(written(text, tmp_path), smoke=False)
    starts = {
        script.row_and_seed({VARIANT: name}): changes["init"]
        for name, changes in search.variants.items()
    }
    assert starts == {
        ("baseline", 0): "a/b0",
        **{(row, 0): "a/u0" for row in ("unet", "cutmix", "prioritycut")},
        **{(row, 2): "a/u2" for row in ("unet", "prioritycut")},
    }
    seeds = {changes["train.seed"] for changes in search.variants.values()}
    assert seeds == {script.BRANCH_SEED, script.BRANCH_SEED + 2}
    for search in (script.THIN_PLATE, script.CLIPS):
        assert {script.trunk_of(row, search) for row in ROWS} == {"no_discriminator"}
    monkeypatch.setattr(script, "finished_trials", lambda folder: trained[:0])
    with pytest.raises(UserError, match="no trial is left"):
        script.branched(BRANCHES, ["a"], tmp_path)


def test_branches_keep_the_values_of_their_row(
    script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    curves = ROOT / "tune_configs" / "ablation_puppets_curves.yaml"
    monkeypatch.setattr(script, "finished_trials", lambda folder: [("unet", 3, "runs/u3")])
    branches = load_search(written(script.branched(curves, ["a"], tmp_path), tmp_path), smoke=False)
    rows = load_search(curves, smoke=False).variants
    own = {"init": "runs/u3", "train.seed": script.BRANCH_SEED + 3}
    assert branches.variants == {
        f"{row}{script.OF_SEED}3": changes | own for row, changes in rows.items()
    }


def written(text: str, folder: Path) -> Path:
    file = folder / "rest.yaml"
    file.write_text(text)
    return file


def test_an_error_is_one_line_and_an_exit_code() -> None:
    file = "tune_configs/no_such_search.yaml"
    command = [sys.executable, "benchmarks/ablation.py", "--branches", file]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == ExitCode.USER_ERROR
    assert done.stderr.startswith("error: ")
    assert file in done.stderr
    assert done.stderr.count("\n") == 1
