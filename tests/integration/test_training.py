"""The main job on a real Ray instance with two real workers."""

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import fsspec
import pytest
import ray
from PIL import Image
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from prioritycut_ray.commands.quickstart import run_quickstart
from prioritycut_ray.config import Config, load_config
from prioritycut_ray.data.index import clips_of, read_index
from prioritycut_ray.errors import UserError
from prioritycut_ray.launch import driver as launch_module
from prioritycut_ray.launch.driver import launch
from prioritycut_ray.runs.compatibility import check_resumable
from prioritycut_ray.runs.locate import find_checkpoint, read_config
from prioritycut_ray.runs.manifest import verify
from prioritycut_ray.video.decoding import frames_upright
from tests.places import TINY
from tests.runs import assert_same_weights
from tests.s3_server import S3

pytestmark = [pytest.mark.integration, pytest.mark.usefixtures("local_ray")]


def configured(shards: Path, storage: Path, *words: str) -> Config:
    return load_config(str(TINY), [f"data.url={shards}", f"storage={storage}", *words])


def without_waiting(warnings: list[str]) -> list[str]:
    """The warnings, except that on a busy machine a run waits for CPUs of the one before it."""
    return [line for line in warnings if not line.startswith("waiting for workers")]


class Trained:
    """A finished run of eight steps, with its reports and warnings."""

    def __init__(self, shards: Path, storage: Path) -> None:
        self.config = configured(shards, storage)
        self.reports: list[dict[str, float]] = []
        self.warnings: list[str] = []
        self.run = Path(launch(self.config, self.keep, self.warnings.append))

    def keep(self, metrics: Mapping[str, float]) -> None:
        self.reports.append(dict(metrics))


@pytest.fixture(scope="module")
def trained(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    return Trained(shards, tmp_path_factory.mktemp("runs"))


def test_progress_reaches_the_driver(trained: Trained) -> None:
    assert [report["step"] for report in trained.reports] == [2, 4, 6, 8]
    assert [report["samples"] for report in trained.reports] == [8, 16, 24, 32]
    last = trained.reports[-1]
    assert last["generator/perceptual"] > 0
    assert last["discriminator/total"] > 0
    assert last["speed/samples_per_second"] > 0
    assert 0 <= last["speed/share_waiting_for_data"] <= 1
    assert without_waiting(trained.warnings) == []


def test_checkpoints_are_complete_and_hold_the_resolved_config(trained: Trained) -> None:
    names = sorted(path.name for path in trained.run.glob("step_*"))
    assert names == ["step_0000004", "step_0000008"]
    for name in names:
        verify(trained.run / name)
    assert read_config(find_checkpoint(trained.run)) == trained.config


def test_tensorboard_has_scalars_and_pictures(trained: Trained) -> None:
    events = EventAccumulator(str(trained.run / "tensorboard"))
    events.Reload()
    steps = [event.step for event in events.Scalars("generator/perceptual")]
    assert steps == [2, 4, 6, 8]
    assert {"columns", "keypoints", "pixel_judgement"} <= set(events.Tags()["images"])
    assert [event.step for event in events.Images("columns")] == [4, 8]
    assert events.Images("columns")[0].width == 6 * 32 + 5 * 2, "the six columns of the method"


def test_the_same_command_resumes_and_equals_an_uninterrupted_run(
    shards: Path, trained: Trained, tmp_path: Path
) -> None:
    reports: list[dict[str, float]] = []
    for samples in (16, 32):
        config = configured(shards, tmp_path, f"train.samples={samples}")
        launch(config, lambda metrics: reports.append(dict(metrics)), print)
    assert [report["step"] for report in reports] == [2, 4, 6, 8]
    assert_same_weights(trained.run, tmp_path / "tiny")
    assert_logged_once(tmp_path / "tiny", [2, 4, 6, 8])


def test_sigterm_saves_at_once_and_the_same_command_resumes(shards: Path, tmp_path: Path) -> None:
    config = configured(shards, tmp_path, "train.log_every=1", "train.samples=40000")
    warnings: list[str] = []

    def terminate(metrics: Mapping[str, float]) -> None:
        if metrics["step"] == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(
        UserError, match=r"preempted: asked to stop, and saved at step \d"
    ) as caught:
        launch(config, terminate, warnings.append)
    assert caught.value.exit_code == 75
    assert any("SIGTERM" in line for line in warnings)
    saved = find_checkpoint(tmp_path / "tiny").name
    assert f"{saved}; resume with: " in str(caught.value)
    step = int(saved.removeprefix("step_"))
    reports: list[float] = []
    config = configured(shards, tmp_path, "train.log_every=1", f"train.samples={4 * (step + 2)}")
    launch(config, lambda metrics: reports.append(metrics["step"]), print)
    assert reports == [step + 1, step + 2]
    assert_logged_once(tmp_path / "tiny", list(range(1, step + 3)))


def test_a_killed_worker_is_replaced_and_the_weights_are_the_same(
    shards: Path, trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monitors: list[Any] = []

    def start_monitor() -> Any:
        monitors.append(start())
        return monitors[0]

    start = launch_module.start_monitor
    monkeypatch.setattr(launch_module, "start_monitor", start_monitor)
    killed: list[int] = []

    def kill_rank_1(metrics: Mapping[str, float]) -> None:
        if not killed:
            killed.append(monitors[0].heartbeats()[1].heartbeat.pid)
            os.kill(killed[0], signal.SIGKILL)

    warnings: list[str] = []
    config = configured(shards, tmp_path, "train.log_every=1", "train.max_failures=1")
    launch(config, kill_rank_1, warnings.append)
    assert_logged_once(tmp_path / "tiny", list(range(1, 9)))
    saved = [line for line in warnings if line.endswith(" for a lost rank")]
    (death,) = (line for line in without_waiting(warnings) if line not in saved)
    assert f"worker killed: process {killed[0]} got signal 9 (SIGKILL) (rank 1, " in death
    assert_same_weights(trained.run, tmp_path / "tiny")


@pytest.mark.slow
def test_a_run_in_an_object_store(
    shards: Path,
    puppet_videos: Path,
    trained: Trained,
    bucket: str,
    server: S3,
    tmp_path: Path,
) -> None:
    """Trained in two halves, evaluated and animated there, by processes with its credentials."""
    video, picture = puppet_videos / "puppet_0.mp4", tmp_path / "source.png"
    Image.fromarray(next(frames_upright(video))).save(picture)
    script = f"""
from pathlib import Path
from rich.console import Console
from prioritycut_ray.commands.animate import animate
from prioritycut_ray.config import load_config
from prioritycut_ray.launch.driver import launch
from prioritycut_ray.launch.evaluate import evaluate

words = ["data.url={shards}", "storage={bucket}/runs"]
for samples in (16, 32):
    config = load_config({str(TINY)!r}, [*words, f"train.samples={{samples}}"])
    run = launch(config, print, print)
out = Path({str(tmp_path)!r})
evaluate(run, {str(shards)!r}, workers=0, out=out / "evaluation")
source, driving = Path({str(picture)!r}), Path({str(video)!r})
animate(run, source, driving, out / "animation.mp4", console=Console())
"""
    environment = {
        "RAY_ADDRESS": ray.get_runtime_context().gcs_address,
        "RAY_JOB_CONFIG_JSON_ENV_VAR": json.dumps({"runtime_env": {"env_vars": server.variables}}),
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    done = subprocess.run(
        [sys.executable, "-c", script],
        env=os.environ | server.variables | environment,
        timeout=280,
        start_new_session=True,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    fs = fsspec.filesystem("s3")
    fs.get(f"{bucket}/runs/tiny", str(tmp_path / "run"), recursive=True)
    assert_same_weights(trained.run, tmp_path / "run")
    assert_logged_once(tmp_path / "run", [2, 4, 6, 8])
    assert (tmp_path / "evaluation" / "report.html").exists()
    assert (tmp_path / "animation.mp4").exists()


def assert_logged_once(run: Path, expected: list[int]) -> None:
    """Each step is logged once, in TensorBoard and in the rows of scalars."""
    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("generator/perceptual")] == expected
    files = sorted(run.glob("metrics/*"))
    lines = [line for file in files for line in file.read_text().splitlines()]
    assert [json.loads(line)["step"] for line in lines] == expected


def test_another_configuration_does_not_resume(shards: Path, trained: Trained) -> None:
    config = configured(shards, trained.run.parent, "optim.lr=1e-5")
    with pytest.raises(UserError, match=r"optim\.lr.*name="):
        launch(config, lambda metrics: None, print)


def test_other_data_does_not_resume(trained: Trained) -> None:
    with pytest.raises(UserError, match=r"trained on other clips.*data\.url=.*another name="):
        check_resumable(trained.config, "v2-" + "0" * 64)


def test_more_workers_than_cpus_are_an_error(shards: Path, tmp_path: Path) -> None:
    config = configured(shards, tmp_path, "train.workers=4")
    with pytest.raises(UserError, match=r"needs 4 CPUs.*train\.workers|train\.workers=4.*2"):
        launch(config, lambda metrics: None, print)


def test_a_failure_of_a_worker_is_one_line(shards_copy: Path, tmp_path: Path) -> None:
    for shard in shards_copy.glob("*.tar"):
        content = shard.read_bytes()
        shard.write_bytes(b"\0" * len(content))
    with pytest.raises(UserError) as caught:
        launch(configured(shards_copy, tmp_path), lambda metrics: None, print)
    message = str(caught.value)
    assert "\n" not in message
    assert "rank" in message
    assert re.search(r"clips in a row cannot be read \(the last: 'puppet_\d", message)
    assert "bad data" in message
    assert "last checkpoint: none yet; resume with: " in message
    assert caught.value.exit_code == 65


def test_the_quickstart_makes_what_it_lists(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The whole job, with fewer steps."""
    out = tmp_path / "quickstart"
    words = ["train.samples=32", "train.batch_size=8", "train.image_every=4"]
    run_quickstart(out, words, Console(file=sys.stdout, soft_wrap=True, highlight=False))
    printed = capsys.readouterr()
    assert "[5/5]" in printed.out
    assert "tensorboard --logdir" in printed.out
    assert "ETA" in printed.err
    evaluation = json.loads((out / "evaluation" / "evaluation.json").read_text())
    assert evaluation["split"] == "test"
    for model in evaluation["models"]:
        assert 0 < model["mean_over_clips"]["l1"]["value"] < 1
        assert 0 < model["mean_over_clips"]["psnr"]["value"] < 100
    assert (out / "evaluation" / "report.html").exists()
    with Image.open(out / "evaluation" / "columns.png") as columns:
        assert columns.width == 6 * 64 + 5 * 2
    assert len(list(frames_upright(out / "animation.mp4"))) == 32
    index = read_index(str(out / "data"))
    seen = {clip.identity for clip in clips_of(index, "train")}
    unseen = {clip.identity for clip in clips_of(index, "test")}
    assert seen.isdisjoint(unseen)
