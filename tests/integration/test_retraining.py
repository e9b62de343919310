"""Retraining end to end: new clips, warm start, paired comparison, gate, pointer."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import yaml
from prometheus_client.parser import text_string_to_metric_families

from prioritycut_ray.config import load_config
from prioritycut_ray.data.puppets import render_clip
from prioritycut_ray.packing.pipeline import append_videos, pack_videos
from prioritycut_ray.retraining.job import RetrainingJob, find_job, finish, unfinished_job
from prioritycut_ray.retraining.registry import read_current
from prioritycut_ray.retraining.settings import load_settings
from prioritycut_ray.runs.checkpoints import steps
from prioritycut_ray.storage.folder import Folder
from prioritycut_ray.storage.lease import leased
from prioritycut_ray.training.checkpoint import save_checkpoint
from prioritycut_ray.training.state import new_state
from prioritycut_ray.video.encoding import write_video
from tests.conftest import Result, assert_one_line
from tests.places import ALONE, TINY, TINY_TPS
from tests.s3_server import S3

pytestmark = [pytest.mark.integration, pytest.mark.timeout(600)]
Prioritycut = Callable[..., Result]


class Project(NamedTuple):
    """A data set, and a first model of random weights."""

    folder: Path

    @property
    def data(self) -> str:
        return str(self.folder / "data")

    @property
    def models(self) -> Path:
        return self.folder / "models"

    def settings(self, **changes: Any) -> str:
        file = self.folder / "retrain.yaml"
        values = {
            "models": str(self.models),
            "data": self.data,
            "budget": 16,
            "set": {"train.workers": 1, "optim.lr": 0.005, "optim.ema_decay": 0},
            "gate": {"target": "l1", "tolerances": {"l1": 0.002}},
            "metrics_file": str(self.folder / "retrain.prom"),
        }
        file.write_text(yaml.safe_dump(values | changes))
        return str(file)

    def append(self, kind: str, seeds: range, frames: Callable[[int], Any]) -> None:
        """Add clips: the last one is held out unless it is poison."""
        folder = self.folder / kind
        folder.mkdir()
        lines = ["file,identity,split"]
        for seed in seeds:
            write_video(folder / f"{kind}{seed}.mp4", frames(seed), 12.0)
            held_out = seed == seeds[-1] and kind != "poison"
            lines.append(f"{kind}{seed}.mp4,{kind}{seed},{'val' if held_out else 'train'}")
        (folder / "clips.csv").write_text("\n".join(lines))
        append_videos(self.data, [str(folder / "clips.csv")])

    def current(self) -> list[str]:
        history = json.loads((self.models / "current.json").read_text())["history"]
        return [entry["model"] for entry in history]

    def report(self, candidate: str) -> dict[str, Any]:
        report: dict[str, Any] = json.loads((self.models / candidate / "report.json").read_text())
        return report

    def figures(self) -> dict[str, float]:
        text = (self.folder / "retrain.prom").read_text()
        return {
            " ".join([sample.name, *sample.labels.values()]): sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
        }


def puppet(seed: int) -> Any:
    return render_clip(seed, size=32, frames=8).frames


def white(seed: int) -> Any:
    return [np.full((32, 32, 3), 255, np.uint8)] * 8


def begin(
    folder: Path, puppet_videos: Path, source: Path = TINY, words: tuple[str, ...] = ()
) -> Project:
    project = Project(folder)
    videos = sorted(puppet_videos.glob("*.mp4"))[:5]
    lines = [f"{v},{v.stem},{'val' if i > 2 else 'train'}" for i, v in enumerate(videos)]
    (folder / "clips.csv").write_text("\n".join(["file,identity,split", *lines]))
    pack_videos([str(folder / "clips.csv")], project.data, size=32)
    config = load_config(str(source), [f"data.url={project.data}", *words])
    save_checkpoint(
        new_state(config, torch.device("cpu")), config, folder / "first" / "step_0000000"
    )
    return project


@pytest.fixture
def project(
    tmp_path: Path, puppet_videos: Path, local_ray: None, prioritycut: Prioritycut
) -> Project:
    project = begin(tmp_path, puppet_videos)
    promoted = prioritycut("models", "promote", "first", "--models", str(project.models))
    assert promoted.returncode == 0, promoted.stderr
    return project


def test_without_new_clips_ray_is_not_started(
    project: Project, prioritycut: Prioritycut, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse() -> None:
        raise AssertionError("Ray was started")

    for module in ("launch.driver", "ray_cluster.tasks"):
        monkeypatch.setattr(f"prioritycut_ray.{module}.start_ray", refuse)
    before = sorted(project.models.rglob("*"))
    for _ in range(2):
        done = prioritycut("retrain", project.settings())
        assert done.returncode == 0, done.stderr
        assert "nothing new: first has seen all clips of split 'train'" in done.stdout
    assert [p for p in sorted(project.models.rglob("*")) if "lease" not in p.parts] == [
        p for p in before if "lease" not in p.parts
    ]
    assert project.figures()["prioritycut_retrain_new_clips"] == 0


def test_a_concurrent_retraining_exits_with_its_own_code(
    project: Project, prioritycut: Prioritycut
) -> None:
    with leased(Folder(str(project.models)), 60):
        done = prioritycut("retrain", project.settings())
    assert done.returncode == 78
    assert len(done.stderr.strip().splitlines()) == 1
    assert "another process is working there" in done.stderr
    assert prioritycut("retrain", project.settings()).returncode == 0


def test_without_a_current_model_the_error_says_how_to_promote_one(
    project: Project, prioritycut: Prioritycut, tmp_path: Path
) -> None:
    done = prioritycut("retrain", project.settings(models=str(tmp_path / "none")))
    assert_one_line(done, "no current model", "models promote RUN")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"budgte": 3}, ["unknown key 'budgte'", "budget"]),
        ({"holdout": "train"}, ["holdout=train", "trained on this split"]),
        ({"holdout": "nope"}, ["nope"]),
        ({"set": {"model.num_keypoints": 5}}, ["model.num_keypoints", "changes the networks"]),
        (
            {"set": {"discriminator.kind": "none", "priority_cut": None}},
            ["set: discriminator.kind changes the networks"],
        ),
        ({"set": {"optim.rl": 5}}, ["optim.rl", "the keys of optim are lr,"]),
        ({"gate": {"target": "l2"}}, ["gate", "l2", "l1"]),
    ],
)
def test_invalid_settings_are_rejected_before_training(
    project: Project, prioritycut: Prioritycut, changes: dict[str, Any], words: list[str]
) -> None:
    project.append("new", range(40, 42), puppet)
    assert_one_line(prioritycut("retrain", project.settings(**changes)), *words)
    assert {path.name for path in project.models.iterdir()} == {"current.json", "first", "lease"}


@pytest.mark.slow
def test_an_improvement_is_promoted_once_and_reported(
    project: Project, prioritycut: Prioritycut
) -> None:
    project.append("new", range(40, 43), puppet)
    received = project.folder / "received.json"
    settings = project.settings(command=f'cat > "{received}"')
    done = prioritycut("retrain", settings)
    assert done.returncode == 0, done.stderr
    assert [line[:5] for line in done.stdout.splitlines() if line.startswith("[")] == [
        f"[{n}/6]" for n in range(1, 7)
    ]
    first, candidate = project.current()
    assert first == "first"
    report = project.report(candidate)
    assert report["outcome"] == "promoted"
    assert report["new_clips"] == 2
    assert report["comparison"]["clips"] == {"fixed": 2, "all": 3, "new": 1}
    assert report["comparison"]["differences"]["all"]["l1"]["value"] < 0
    assert json.loads(received.read_text()) == report
    page = (project.models / candidate / "report.html").read_text()
    assert "promoted" in page
    assert not re.search(r'(src|href)="(?!data:)', page)
    figures = project.figures()
    assert figures["prioritycut_retrain_promoted"] == 1
    assert figures["prioritycut_retrain_difference all l1"] < 0
    config = load_config(str(next((project.models / candidate / "run").glob("step_*/config.yaml"))))
    assert config.train.samples == 16
    again = prioritycut("retrain", settings)
    assert again.returncode == 0
    assert f"nothing new: {candidate} has seen all" in again.stdout
    assert project.current() == [first, candidate]


@pytest.mark.slow
def test_a_model_of_the_other_family_without_a_discriminator_is_retrained(
    tmp_path: Path, puppet_videos: Path, local_ray: None, prioritycut: Prioritycut
) -> None:
    project = begin(tmp_path, puppet_videos, TINY_TPS, ("model.background=false", *ALONE))
    prioritycut("models", "promote", "first", "--models", str(project.models))
    project.append("new", range(40, 42), puppet)
    done = prioritycut("retrain", project.settings(budget=8))
    assert done.returncode == 0, done.stderr
    (folder,) = project.models.glob("candidate-*")
    step = max(folder.glob("run/step_*"))
    assert step.name == "step_0000002"
    assert sorted(path.stem for path in step.glob("*.safetensors")) == ["animator", "animator_ema"]
    config = load_config(str(step / "config.yaml"))
    assert (config.model.family, config.discriminator.kind) == ("thin_plate", "none")
    report = project.report(folder.name)
    assert report["comparison"]["clips"]["all"] == 3
    assert report["comparison"]["differences"]["all"]["l1"]["value"] != 0


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_models_in_a_bucket(project: Project, tmp_path: Path, bucket: str, server: S3) -> None:
    """The command starts its own Ray, whose workers need the bucket's credentials."""
    models = f"{bucket}/models"
    settings = project.settings(models=models)
    for words in (
        ["models", "promote", str(project.folder / "first"), "--models", models],
        ["retrain", settings],
    ):
        if words[0] == "retrain":
            project.append("new", range(40, 43), puppet)
        driver = start(words, tmp_path / "said.txt", server.variables)
        try:
            assert driver.wait(600) == 0, (tmp_path / "said.txt").read_text()
        finally:
            end(driver)
    current = read_current(Folder(models))
    assert current is not None
    assert [entry.model for entry in current.history] == ["first", current.model]
    # Step 0 is where it began; it is always kept.
    assert steps(Folder(f"{models}/{current.model}/run")) == [0, 4]


def test_an_abandoned_candidate_is_taken_up_again_once_its_model_is_back(project: Project) -> None:
    project.append("new", range(40, 43), puppet)
    settings, models = load_settings(project.settings(), []), Folder(project.models)
    with leased(models, 60) as lease:
        job = find_job(models, settings, lease)
        assert isinstance(job, RetrainingJob)
        # Meanwhile another model was promoted by hand: the job ended without a verdict.
        finish(models, job, lease)
        again = find_job(models, settings, lease)
        assert isinstance(again, RetrainingJob)
        assert again.candidate == job.candidate
        assert unfinished_job(models) == again


@pytest.mark.slow
def test_a_candidate_of_poisoned_clips_is_refused_and_not_repeated(
    project: Project, prioritycut: Prioritycut
) -> None:
    """All-white clips, enough to ruin the model."""
    project.append("poison", range(3), white)
    received: list[dict[str, Any]] = []
    with webhook(received) as url:
        done = prioritycut("retrain", project.settings(replay=0.0, budget=48, webhook=url))
    assert done.returncode == 0, done.stderr
    assert project.current() == ["first"]
    assert "refused: " in done.stdout
    assert "L1 on the fixed holdout is worse" in done.stdout
    (report,) = received
    assert (report["outcome"], report["current"]) == ("refused", "first")
    assert project.figures()["prioritycut_retrain_promoted"] == 0
    again = prioritycut("retrain", project.settings(replay=0.0, budget=48))
    assert again.returncode == 0
    assert "was trained on these clips before and refused" in again.stdout


@contextmanager
def webhook(received: list[dict[str, Any]]) -> Iterator[str]:
    """Yield the URL of a server that stores posted reports."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            received.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(204)
            self.end_headers()

        def log_message(self, *words: Any) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()
        thread.join()


@pytest.mark.slow
def test_of_two_concurrent_retrainings_one_exits(project: Project, tmp_path: Path) -> None:
    project.append("new", range(40, 43), puppet)
    settings = project.settings()
    both = [start(["retrain", settings], tmp_path / f"said{place}.txt") for place in range(2)]
    try:
        codes = [driver.wait(500) for driver in both]
    finally:
        for driver in both:
            end(driver)
    assert sorted(codes) == [0, 78]
    left = (tmp_path / f"said{codes.index(78)}.txt").read_text().splitlines()
    assert len([line for line in left if line.startswith("error: ")]) == 1
    assert "another process is working there" in left[-1]
    first, candidate = project.current()
    assert first == "first"
    assert {p.name for p in project.models.iterdir()} == {
        "current.json",
        "lease",
        first,
        candidate,
    }


@pytest.mark.slow
@pytest.mark.timeout(2400)
def test_killed_at_every_step_it_gives_the_same_result(project: Project, tmp_path: Path) -> None:
    project.append("new", range(40, 43), puppet)
    calls = tmp_path / "calls.txt"
    settings = project.settings(lease_seconds=3.0, command=f"echo called >> {calls}")
    for step in range(1, 7):
        kill_at(f"[{step}/6]", settings, tmp_path / f"said{step}.txt")
    assert len(project.current()) == 2, "promoted, but nothing was reported yet"
    assert not calls.exists()
    said = tmp_path / "said.txt"
    driver = start(["retrain", settings], said)
    try:
        assert driver.wait(900) == 0, said.read_text()
    finally:
        end(driver)
    first, candidate = project.current()
    assert first == "first"
    assert project.report(candidate)["outcome"] == "promoted"
    assert calls.read_text() == "called\n"
    assert project.figures()
    assert {p.name for p in project.models.iterdir() if p.name.startswith("candidate")} == {
        candidate
    }
    steps = sorted(path.name for path in (project.models / candidate / "run").glob("step_*"))
    assert steps[-1] == "step_0000004", "a budget of 16 frame pairs in batches of 4"


def start(
    words: list[str], said: Path, environment: Mapping[str, str] = MappingProxyType({})
) -> subprocess.Popen[bytes]:
    with said.open("w") as file:
        return subprocess.Popen(
            [sys.executable, "-c", DRIVER, *words],
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env={**os.environ, **environment},
        )


DRIVER = """
import os, signal
from rich.console import Console
from prioritycut_ray.cli import main

line, say = os.environ.get("DIE_AT"), Console.print

def say_and_die(self, *words, **options):
    say(self, *words, **options)
    if line and words and line in str(words[0]):
        os.kill(os.getpid(), signal.SIGKILL)

Console.print = say_and_die
main()
"""
"""The command, which is killed when it prints ``DIE_AT``, independent of the machine's speed."""


def kill_at(line: str, settings: str, said: Path) -> None:
    """Run a retraining that is killed with its processes when it prints a line."""
    driver = start(["retrain", settings], said, {"DIE_AT": line})
    try:
        assert driver.wait(600) == -signal.SIGKILL, said.read_text()
    finally:
        end(driver)


def end(driver: subprocess.Popen[bytes]) -> None:
    with suppress(ProcessLookupError):
        os.killpg(driver.pid, signal.SIGKILL)
    driver.wait(60)
