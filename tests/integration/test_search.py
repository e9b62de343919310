"""Searches on a real Ray with real training: small networks, a few steps per trial."""

import csv
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from itertools import zip_longest
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import fsspec
import optuna
import pytest
import ray
import yaml
from optuna.trial import FrozenTrial, TrialState
from PIL import Image
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from prioritycut_ray import train
from prioritycut_ray.commands.tune import tune
from prioritycut_ray.config import load_config
from prioritycut_ray.errors import UserError
from prioritycut_ray.runs.locate import find_checkpoint, read_progress
from tests.places import ROOT, TINY, TINY_TPS
from tests.s3_server import S3

pytestmark = pytest.mark.integration
QUIET = Console(quiet=True)
SHIPPED = sorted((ROOT / "tune_configs").glob("*.yaml"))
ASHA_SEARCH: dict[str, Any] = {
    "name": "asha",
    "base": str(TINY),
    "set": {"train.samples": 8, "train.workers": 1, "optim.ema_decay": 0},
    "objective": {"split": "test"},
    # The second is far behind at the first report.
    "space": {"optim.lr": {"grid": [0.005, 0.5]}},
    "scheduler": {"kind": "asha", "reduction": 2},
    "reports": 2,
    "retries": 0,
}


class Search(NamedTuple):
    file: Path
    words: list[str]
    folder: Path

    def rows(self) -> list[dict[str, str]]:
        return list(csv.DictReader((self.folder / "trials.csv").read_text().splitlines()))


def prepare(folder: Path, shards: Path, search: dict[str, Any]) -> Search:
    file = folder / "search.yaml"
    file.write_text(yaml.safe_dump(search))
    storage = folder / "runs"
    return Search(file, [f"data.url={shards}", f"storage={storage}"], storage / search["name"])


def used_by_workers() -> float:
    """Return the CPUs in use, without the shares of drivers and queues."""
    return round(ray.cluster_resources()["CPU"] - ray.available_resources().get("CPU", 0))


def wait_until(holds: Callable[[], bool], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, "timed out"
        time.sleep(0.2)


@pytest.fixture(scope="module")
def asha(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Search:
    search = prepare(tmp_path_factory.mktemp("search"), shards, ASHA_SEARCH)
    tune(search.file, search.words, smoke=False, resume=False, console=QUIET)
    return search


@pytest.mark.timeout(600)
def test_a_bad_trial_is_stopped_early_and_the_table_says_so(asha: Search) -> None:
    first, second = asha.rows()
    assert (first["optim.lr"], first["status"], first["samples"]) == ("0.005", "finished", "8")
    assert (second["optim.lr"], second["status"], second["samples"]) == (
        "0.5",
        "stopped early",
        "4",
    )
    assert float(first["objective"]) == float(first["l1"])
    assert 0 < float(first["ssim"]) < 1


def test_no_placement_group_and_no_cpu_is_left_behind(asha: Search) -> None:
    def all_removed() -> bool:
        groups = ray.util.placement_group_table().values()
        return all(group["state"] == "REMOVED" for group in groups)

    assert len(ray.util.placement_group_table()) >= 3, "one for each piece of training"
    wait_until(all_removed, 60)
    wait_until(lambda: used_by_workers() == 0, 60)


def test_the_best_configuration_can_be_trained(asha: Search) -> None:
    config = load_config(str(asha.folder / "best.yaml"))
    assert config.optim.lr == 0.005
    assert config.name == "asha-best"
    assert config.train.samples == 8


def test_plots_and_one_self_contained_page(asha: Search) -> None:
    names = {path.name for path in asha.folder.glob("*.png")}
    assert names == {"l1_against_optim.lr.png", "parallel_coordinates.png", "learning_curves.png"}
    for name in names:
        with Image.open(asha.folder / name) as image:
            assert min(image.size) >= 400
    page = (asha.folder / "search.html").read_text()
    assert page.count("data:image/png;base64,") == len(names)
    assert "stopped early" in page
    assert not re.search(r'(src|href)="(?!data:)', page)


def test_tensorboard_has_a_run_for_each_trial_and_the_hyperparameters(asha: Search) -> None:
    for row in asha.rows():
        events = EventAccumulator(str(asha.folder / "tune" / row["trial"]))
        events.Reload()
        assert "ray/tune/objective" in events.Tags()["scalars"]
        assert events.PluginTagToContent("hparams")


def test_an_existing_search_is_not_started_again(asha: Search) -> None:
    with pytest.raises(UserError, match="--resume"):
        tune(asha.file, asha.words, smoke=False, resume=False, console=QUIET)


def test_a_search_resumes_only_with_the_values_it_was_started_with(asha: Search) -> None:
    for changes, key in [
        ({"seed": 1}, "seed"),
        ({"set": ASHA_SEARCH["set"] | {"optim.ema_decay": 0.5}}, "optim.ema_decay"),
        ({"set": ASHA_SEARCH["set"] | {"train.samples": 16}}, "train.samples"),
        ({"space": {"optim.lr": {"grid": [0.005, 0.1]}}}, "space.optim.lr.grid"),
    ]:
        other = asha.file.with_name("other.yaml")
        other.write_text(yaml.safe_dump(ASHA_SEARCH | changes))
        with pytest.raises(UserError, match=re.escape(f"different values of {key};")):
            tune(other, asha.words, smoke=False, resume=True, console=QUIET)


def test_a_search_of_an_incompatible_version_is_named(asha: Search, tmp_path: Path) -> None:
    shutil.copytree(asha.folder, tmp_path / "runs" / "asha")
    # The pickle of a class that does not exist.
    (tmp_path / "runs" / "asha" / "tune" / "tuner.pkl").write_bytes(b"cprioritycut_ray\nGone\n.")
    words = [asha.words[0], f"storage={tmp_path / 'runs'}"]
    with pytest.raises(UserError, match=r"cannot be resumed with this version.*\(0\..*Gone"):
        tune(asha.file, words, smoke=False, resume=True, console=QUIET)


@pytest.mark.timeout(600)
def test_resuming_a_search_that_has_ended_trains_nothing(asha: Search) -> None:
    before = {path: path.stat().st_mtime_ns for path in (asha.folder / "runs").rglob("*")}
    rows = asha.rows()
    tune(asha.file, asha.words, smoke=False, resume=True, console=QUIET)
    assert {p: p.stat().st_mtime_ns for p in (asha.folder / "runs").rglob("*")} == before
    assert asha.rows() == rows


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_variants_may_have_other_networks(shards: Path, tmp_path: Path) -> None:
    splines = load_config(str(TINY_TPS)).model.model_dump(mode="json")
    variants = {
        "method": {},
        "patch": {"discriminator.kind": "patch", "discriminator.patch_num_blocks": 2},
        "alone": {"discriminator.kind": "none"},
        "splines": {"model": splines | {"background": False}},
    }
    for name in ("patch", "alone"):
        variants[name]["priority_cut"] = None
    changes = {"train.samples": 4, "train.workers": 1, "optim.ema_decay": 0}
    search = prepare(
        tmp_path,
        shards,
        {
            **{"name": "kinds", "base": str(TINY), "set": changes, "retries": 0},
            **{"objective": {"split": "test"}, "variants": variants},
        },
    )
    tune(search.file, search.words, smoke=False, resume=False, console=QUIET)
    rows = search.rows()
    assert {row["variant"]: row["status"] for row in rows} == dict.fromkeys(variants, "finished")
    assert len({row["objective"] for row in rows}) == len(variants)
    best = min(rows, key=lambda row: float(row["objective"]))
    config = load_config(str(search.folder / "best.yaml"))
    assert (config.model.family == "thin_plate") == (best["variant"] == "splines")
    assert (config.discriminator.kind == "none") == (best["variant"] == "alone")


def test_an_invalid_search_is_rejected_before_anything_starts(shards: Path, tmp_path: Path) -> None:
    for changes, words in [
        ({"objective": {"metric": "l2", "split": "test"}}, "use one of l1, psnr"),
        ({"objective": {"split": "val"}}, "objective.split"),
        ({"objective": {"metric": "val/l1"}}, "requires train.validate_every"),
        ({"set": {"train.workers": 2}}, "CPUs"),
        ({"set": {"train.workers": 0}}, "train.workers=0"),
    ]:
        search = prepare(tmp_path, shards, ASHA_SEARCH | changes)
        with pytest.raises(UserError, match=words):
            tune(search.file, search.words, smoke=False, resume=False, console=QUIET)
        assert not search.folder.exists()


@pytest.fixture(scope="module")
def held_out(
    puppet_videos: Path, tmp_path_factory: pytest.TempPathFactory, local_ray: None
) -> Path:
    """The puppet clips with two of them held out, in the splits ``val`` and ``test``."""
    from prioritycut_ray.packing.pipeline import pack_videos

    folder = tmp_path_factory.mktemp("held_out")
    videos = sorted(puppet_videos.glob("*.mp4"))
    lines = [
        f"{video},{video.stem},{split}"
        for video, split in zip_longest(videos, ("val", "test"), fillvalue="train")
    ]
    manifest = folder / "clips.csv"
    manifest.write_text("\n".join(["file,identity,split", *lines]))
    pack_videos([str(manifest)], str(folder / "data"), size=32)
    return folder / "data"


@pytest.mark.slow
def test_a_search_optimizes_what_its_trials_have_validated(held_out: Path, tmp_path: Path) -> None:
    changes = {
        "name": "validated",
        "set": {**ASHA_SEARCH["set"], "train.validate_every": 100},
        "objective": {"metric": "val/l1"},
    }
    search = prepare(tmp_path, held_out, ASHA_SEARCH | changes)
    tune(search.file, search.words, smoke=False, resume=False, console=QUIET)
    for row in search.rows():
        assert float(row["objective"]) == float(row["val/l1"]) > 0
        assert float(row["val/copy_source/l1"]) > 0
    assert load_config(str(search.folder / "best.yaml")).optim.lr == 0.005


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("file", SHIPPED, ids=lambda path: path.stem)
def test_the_smoke_size_of_every_shipped_search_runs(
    file: Path, held_out: Path, tmp_path: Path
) -> None:
    words = [f"data.url={held_out}", f"storage={tmp_path}"]
    folder = Path(tune(file, words, smoke=True, resume=False, console=QUIET))
    rows = Search(file, words, folder).rows()
    trials = {
        **{"ablation": 4, "ablation_tps": 5, "top_k": 2, "loss_weights": 3},
        **{"prioritycut": 3, "pbt": 2, "ablation_puppets": 4},
        **{"ablation_puppets_branches": 4, "ablation_puppets_curves": 8},
        **{"ablation_puppets_tps": 1, "ablation_puppets_tps_branches": 5},
        **{"ablation_clips": 1, "ablation_clips_branches": 4},
    }
    assert len(rows) == trials[file.stem]
    assert {row["status"] for row in rows} <= {"finished", "stopped early"}
    assert load_config(str(folder / "best.yaml")).data.url == str(held_out)
    assert "data:image/png;base64," in (folder / "search.html").read_text()
    if file.stem == "ablation_puppets":  # all rows of a seed finish before the next seed begins
        assert [(row["train.seed"], row["variant"]) for row in rows] == [
            (str(seed), variant) for seed in (0, 1) for variant in ("baseline", "unet")
        ]
    if file.stem == "pbt":
        assert_weights_were_taken_over(folder)


def assert_weights_were_taken_over(folder: Path) -> None:
    """Some run began from another one's checkpoint, with other values."""
    originals = {path.name for path in (folder / "tune").iterdir() if path.is_dir()}
    taken = [run for run in (folder / "runs").iterdir() if run.name not in originals]
    assert taken
    for run in taken:
        first = min(run.glob("step_*"))
        weights = (first / "animator.safetensors").read_bytes()
        origins = [
            other
            for other in (folder / "runs").glob(f"*/{first.name}")
            if other != first and (other / "animator.safetensors").read_bytes() == weights
        ]
        assert origins
        assert len(list(run.glob("step_*"))) > 1, "it has trained on"


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_failing_trial_is_retried_then_failed_and_the_search_continues(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changes = {
        # Two steps: too few to be given up before the end.
        "set": {"train.samples": 8, "train.workers": 1},
        "space": {"optim.lr": {"grid": [1.0e30, 0.005]}},
        "scheduler": None,
        "reports": 1,
        "retries": 1,
    }
    search = prepare(tmp_path, shards, ASHA_SEARCH | changes)
    tune(search.file, search.words, smoke=False, resume=False, console=QUIET)
    failed, finished = search.rows()
    assert (failed["status"], finished["status"]) == ("failed", "finished")
    assert "not finite" in failed["reason"]
    assert load_config(str(search.folder / "best.yaml")).optim.lr == 0.005
    said = capsys.readouterr().err
    cause, _, _ = failed["reason"].partition(" (rank ")  # where it was met may differ
    for what in ("failed, retrying from its last report", "failed, not retrying"):
        assert said.count(f"trial {failed['trial']}: {what}: {cause}") == 1
    assert "Traceback" not in said


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_killed_trial_continues_from_its_last_report(
    shards: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TUNE_GLOBAL_CHECKPOINT_S", "1")  # or the trial ends before it is killed
    changes = {"space": {"optim.lr": {"grid": [0.005]}}, "scheduler": None, "retries": 1}
    search = prepare(tmp_path, shards, ASHA_SEARCH | changes)
    first: dict[Path, int] = {}

    def kill_it_after_its_first_report() -> None:
        wait_until(lambda: any(search.folder.glob("tune/*/result.json")), 600)
        (results,) = search.folder.glob("tune/*/result.json")
        wait_until(lambda: "\n" in results.read_text(), 60)
        first.update({p: p.stat().st_mtime_ns for p in search.folder.glob("runs/*/step_0000001/*")})
        os.kill(json.loads(results.read_text().splitlines()[0])["pid"], signal.SIGKILL)

    killer = threading.Thread(target=kill_it_after_its_first_report)
    killer.start()
    tune(search.file, search.words, smoke=False, resume=False, console=QUIET)
    killer.join()
    (row,) = search.rows()
    assert (row["status"], row["samples"]) == ("finished", "8")
    assert "failed, retrying from its last report" in capsys.readouterr().err
    assert first
    for path, changed in first.items():
        assert path.stat().st_mtime_ns == changed, "nothing is trained twice"


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_after_kill_9_of_the_driver_resume_loses_no_result_and_repeats_none(
    shards: Path, tmp_path: Path
) -> None:
    changes = {
        "set": {"train.samples": 8, "train.workers": 1},
        "space": {"optim.lr": {"grid": [0.005, 0.001, 0.0001]}},
        "scheduler": None,
        "reports": 1,
    }
    search = prepare(tmp_path, shards, ASHA_SEARCH | changes)
    said = tmp_path / "said.txt"
    with said.open("w") as file:
        driver = start_driver(search, file)
    try:
        # One has ended, the next one trains.
        wait_until(lambda: said.read_text().count("optim.lr=") == 2, 600)
        wait_until(lambda: len(list(search.folder.glob("runs/*/tensorboard"))) == 2, 300)
        os.kill(driver.pid, signal.SIGKILL)
    finally:
        driver.wait(60)
        with suppress(ProcessLookupError):
            os.killpg(driver.pid, signal.SIGKILL)
    (stored,) = search.folder.glob("runs/*/reports/*.json")
    ended = stored.parents[1]
    before = {path: path.stat().st_mtime_ns for path in ended.rglob("*")}
    with (tmp_path / "resumed.txt").open("w") as file:
        driver = start_driver(search, file, "--resume")
    try:
        assert driver.wait(600) == 0, (tmp_path / "resumed.txt").read_text()
    finally:
        driver.kill()
        driver.wait(60)
    assert {path: path.stat().st_mtime_ns for path in ended.rglob("*")} == before
    rows = search.rows()
    assert [row["status"] for row in rows] == ["finished"] * 3
    assert [row["optim.lr"] for row in rows] == ["0.005", "0.001", "0.0001"]
    assert json.loads(stored.read_text())["estimates"]["l1"]["value"] == float(rows[0]["l1"])


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_study_in_a_database_survives_kill_9_and_its_best_configuration_is_trained(
    shards: Path, tmp_path: Path
) -> None:
    storage = f"sqlite:///{tmp_path}/optuna.db"
    changes = {
        "name": "study",
        "searcher": {"kind": "optuna", "storage": storage},
        "space": {
            "priority_cut.mask": {"choice": ["priority", "cutmix"]},
            "priority_cut.top_k": {
                **{"uniform": [1, 100]},
                "when": {"priority_cut.mask": "priority"},
            },
            "priority_cut.warmup_samples": {"choice": [0, 4]},
            "loss.adversarial": {"loguniform": [0.1, 10]},
        },
        "trials": 5,
    }
    search = prepare(tmp_path, shards, ASHA_SEARCH | changes)
    said = tmp_path / "said.txt"
    with said.open("w") as file:
        driver = start_driver(search, file)
    try:
        # Two have ended, the next one trains.
        wait_until(lambda: said.read_text().count("priority_cut.mask=") == 3, 600)
        wait_until(lambda: len(list(search.folder.glob("runs/*/tensorboard"))) == 3, 300)
        os.kill(driver.pid, signal.SIGKILL)
    finally:
        driver.wait(60)
        with suppress(ProcessLookupError):
            os.killpg(driver.pid, signal.SIGKILL)
    known = {trial.number: trial.params for trial in stored_trials(storage)}
    assert len(known) >= 3
    tune(search.file, search.words, smoke=False, resume=True, console=QUIET)

    trials, rows = stored_trials(storage), {row["trial"]: row for row in search.rows()}
    assert {trial.user_attrs["trial"] for trial in trials} == rows.keys()
    assert len(trials) == len(rows) == changes["trials"], "no trial is repeated or lost"
    assert known == {number: trials[number].params for number in known}
    for trial in trials:
        row = rows[trial.user_attrs["trial"]]
        states = {"finished": TrialState.COMPLETE, "stopped early": TrialState.PRUNED}
        assert trial.state == states[row["status"]]
        assert trial.intermediate_values[max(trial.intermediate_values)] == float(row["objective"])
        is_priority = row["priority_cut.mask"] == "priority"
        assert (
            ("priority_cut.top_k" in trial.params) == is_priority == bool(row["priority_cut.top_k"])
        )

    config = load_config(str(search.folder / "best.yaml"))
    best = min(
        (row for row in rows.values() if row["status"] == "finished"),
        key=lambda row: float(row["objective"]),
    )
    assert config.priority_cut is not None
    assert config.priority_cut.mask == best["priority_cut.mask"]
    assert config.loss.adversarial == pytest.approx(float(best["loss.adversarial"]))
    assert train(config) == config.run
    assert read_progress(find_checkpoint(config.run)).samples == 8


def stored_trials(storage: str) -> list[FrozenTrial]:
    return optuna.load_study(storage=storage, study_name="study").trials


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_two_sigterms_stop_the_search_cleanly(shards: Path, tmp_path: Path) -> None:
    search = prepare(tmp_path, shards, ASHA_SEARCH)
    said = tmp_path / "said.txt"
    with said.open("w") as file:
        driver = start_driver(search, file)
    try:
        wait_until(lambda: "optim.lr=" in said.read_text(), 600)
        driver.terminate()
        driver.terminate()  # as the operator's stop and the head's preStop hook do
        assert driver.wait(300) == 75, said.read_text()
    finally:
        with suppress(ProcessLookupError):
            os.killpg(driver.pid, signal.SIGKILL)
        driver.wait(60)
    assert "--resume to continue" in said.read_text().splitlines()[-1]


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_search_in_a_bucket_resumes_after_kill_9(
    shards: Path, tmp_path: Path, bucket: str, server: S3
) -> None:
    changes = {
        "set": {"train.samples": 8, "train.workers": 1},
        "space": {"optim.lr": {"grid": [0.005, 0.0]}},
        "scheduler": None,
    }
    search = prepare(tmp_path, shards, ASHA_SEARCH | changes)
    words = [f"data.url={shards}", f"storage={bucket}/runs"]
    search = search._replace(words=words, folder=tmp_path / "fetched")
    environ = {
        **server.variables,
        "RAY_ADDRESS": ray.get_runtime_context().gcs_address,
        # So that workers know the keys too.
        "RAY_JOB_CONFIG_JSON_ENV_VAR": json.dumps({"runtime_env": {"env_vars": server.variables}}),
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    said = tmp_path / "said.txt"
    with said.open("w") as file:
        driver = start_driver(search, file, environ=environ)
    try:
        # One has ended, the other one trains.
        wait_until(lambda: said.read_text().count("optim.lr=") == 2, 600)
    finally:
        driver.kill()
        driver.wait(60)
    fs, folder = fsspec.filesystem("s3"), f"{bucket}/runs/asha"
    fs.invalidate_cache()
    reports = fs.glob(f"{folder}/runs/*/reports/*.json")
    assert len(reports) == 2, "of the one that has ended"
    ended = reports[0].rpartition("/reports/")[0]
    before = fs.find(ended, detail=True)

    with (tmp_path / "refused.txt").open("w") as file:
        driver = start_driver(search, file, environ=environ)
    assert driver.wait(300) == 1
    assert "resume it with --resume" in (tmp_path / "refused.txt").read_text()
    with said.open("w") as file:
        driver = start_driver(search, file, "--resume", environ=environ)
    try:
        assert driver.wait(600) == 0, said.read_text()
    finally:
        driver.kill()
        driver.wait(60)
    fs.invalidate_cache()
    assert fs.find(ended, detail=True) == before, "nothing is repeated"
    fs.get(folder, str(search.folder), recursive=True)
    rows = search.rows()
    assert [(row["optim.lr"], row["status"], row["samples"]) for row in rows] == [
        ("0.005", "finished", "8"),
        ("0.0", "finished", "8"),
    ]
    for row in rows:
        assert list((search.folder / "tune" / row["trial"]).glob("events.out.tfevents*"))
    assert "data:image/png;base64," in (search.folder / "search.html").read_text()
    assert (search.folder / "learning_curves.png").exists()
    best = load_config(f"{folder}/best.yaml")
    leader = min(rows, key=lambda row: float(row["objective"]))
    assert (best.optim.lr, best.run) == (float(leader["optim.lr"]), f"{bucket}/runs/asha-best")


def start_driver(
    search: Search,
    output: Any,
    *options: str,
    environ: Mapping[str, str] = MappingProxyType({}),
) -> subprocess.Popen[bytes]:
    code = "from prioritycut_ray.cli import main; main()"
    words = ["tune", str(search.file), *search.words, *options]
    return subprocess.Popen(
        [sys.executable, "-c", code, *words],
        stdout=output,
        stderr=subprocess.STDOUT,
        start_new_session=True,
        env={**os.environ, **environ},
    )
