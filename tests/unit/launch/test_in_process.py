"""Training in this process, without Ray (train.workers=0)."""

import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from prioritycut_ray.config import Config, load_config
from prioritycut_ray.data.index import read_index
from prioritycut_ray.errors import ExitCode, NotFiniteError, Preempted, UserError
from prioritycut_ray.launch.in_process import train_in_process
from prioritycut_ray.runs.compatibility import check_resumable
from prioritycut_ray.runs.locate import find_checkpoint
from prioritycut_ray.runs.manifest import verify
from tests.clip_sets import write_set
from tests.places import ALONE, TINY, TINY_TPS
from tests.runs import assert_same_weights


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_set(str(tmp_path_factory.mktemp("data")))


def configured(data: str, storage: Path, *words: str) -> Config:
    places = [f"data.url={data}", f"storage={storage}"]
    return load_config(str(TINY), [*places, "train.workers=0", *words])


def ignore(metrics: Mapping[str, float]) -> None:
    pass


@pytest.fixture(scope="module")
def whole(data: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of eight steps."""
    return Path(train_in_process(configured(data, tmp_path_factory.mktemp("runs")), ignore, print))


SCRIPT = """
import sys
from prioritycut_ray import load_config, train

run = train(load_config(sys.argv[1], sys.argv[2:]))
print(run)
assert "ray" not in sys.modules
"""


def test_the_public_function_trains_without_importing_ray(
    data: str, whole: Path, tmp_path: Path
) -> None:
    words = [f"data.url={data}", f"storage={tmp_path}", "train.workers=0"]
    answer = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(TINY), *words], capture_output=True, text=True
    )
    assert answer.returncode == 0, answer.stderr
    assert answer.stdout.splitlines()[-1] == str(tmp_path / "tiny")
    assert "training: 100%" in answer.stdout + answer.stderr
    assert_same_weights(whole, tmp_path / "tiny")


def test_the_folder_is_that_of_a_run(whole: Path) -> None:
    assert sorted(path.name for path in whole.glob("step_*")) == ["step_0000004", "step_0000008"]
    verify(find_checkpoint(whole))
    events = EventAccumulator(str(whole / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("generator/perceptual")] == [2, 4, 6, 8]


def test_the_same_call_resumes_and_equals_an_uninterrupted_run(
    data: str, whole: Path, tmp_path: Path
) -> None:
    steps: list[float] = []
    for samples in (16, 32):
        config = configured(data, tmp_path, f"train.samples={samples}")
        train_in_process(config, lambda metrics: steps.append(metrics["step"]), print)
    assert steps == [2, 4, 6, 8]
    assert_same_weights(whole, tmp_path / "tiny")


@pytest.mark.parametrize(
    ("source", "words"),
    [
        (TINY, ALONE),
        pytest.param(TINY_TPS, ("train.accumulate=2",), marks=pytest.mark.slow),
    ],
    ids=["without a discriminator", "thin plate"],
)
def test_schedules_go_on_where_a_resumed_run_left_them(
    data: str, tmp_path: Path, source: Path, words: tuple[str, ...]
) -> None:
    """A milestone, and in thin-plate motion the start of the background, lie in the second part."""
    rates: dict[str, list[float]] = {"whole": [], "resumed": []}
    for name, samples in (("whole", 16), ("resumed", 8), ("resumed", 16)):
        places = [f"name={name}", f"data.url={data}", f"storage={tmp_path}", "train.workers=0"]
        length = [f"train.samples={samples}", "train.checkpoint_every=100", "train.log_every=1"]
        config = load_config(
            str(source), [*words, *places, *length, "optim.milestones=[12]", "optim.gamma=0.5"]
        )
        train_in_process(config, lambda m, to=rates[name]: to.append(m["lr/generator"]), print)
    assert rates["whole"] == rates["resumed"] == pytest.approx([2e-4, 2e-4, 2e-4, 1e-4])
    assert_same_weights(tmp_path / "whole", tmp_path / "resumed")


def test_a_run_is_not_resumed_as_one_of_another_kind(data: str, whole: Path) -> None:
    storage = whole.parent
    for source, words, key in ((TINY_TPS, (), "model.family"), (TINY, ALONE, "discriminator.kind")):
        words = (*words, f"data.url={data}", f"storage={storage}", "train.workers=0")
        with pytest.raises(UserError, match=rf"started with different values of .*{key}"):
            train_in_process(load_config(str(source), words), ignore, print)


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_a_signal_saves_at_that_step(data: str, tmp_path: Path, name: str) -> None:
    config = configured(data, tmp_path, "train.log_every=1")
    warnings: list[str] = []

    def interrupt(metrics: Mapping[str, float]) -> None:
        if metrics["step"] == 1:
            os.kill(os.getpid(), signal.Signals[name])

    with pytest.raises(Preempted, match=r"run 'tiny' ended: .*step 2") as caught:
        train_in_process(config, interrupt, warnings.append)
    assert caught.value.exit_code is ExitCode.PREEMPTED
    assert warnings == [f"{name}: saving at this step; a second Ctrl-C stops without saving"]
    assert find_checkpoint(tmp_path / "tiny").name == "step_0000002"


def test_a_second_ctrl_c_stops_at_once(data: str, tmp_path: Path) -> None:
    def interrupt(metrics: Mapping[str, float]) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(Preempted, match="step 1: stopped without saving"):
        train_in_process(configured(data, tmp_path, "train.log_every=1"), interrupt, print)
    assert not list((tmp_path / "tiny").glob("step_*"))


def test_other_clips_and_another_order_of_samples_do_not_resume(data: str, whole: Path) -> None:
    config = configured(data, whole.parent, f"name={whole.name}")
    check_resumable(config, read_index(data).fingerprint)
    with pytest.raises(UserError, match=r"trained on other clips.*data\.url=.*another name="):
        check_resumable(config, "v2-" + "0" * 64)
    with pytest.raises(UserError, match=r"older version.*resume it with that.*another name="):
        check_resumable(config, "v3-" + "0" * 64)


def test_an_error_reaches_the_caller_as_it_is(data: str, tmp_path: Path) -> None:
    def fail(metrics: Mapping[str, float]) -> None:
        raise ZeroDivisionError("of a notebook")

    threads, handler = torch.get_num_threads(), signal.getsignal(signal.SIGINT)
    with pytest.raises(ZeroDivisionError, match="of a notebook"):
        train_in_process(configured(data, tmp_path), fail, print)
    assert torch.get_num_threads() == threads
    assert signal.getsignal(signal.SIGINT) is handler


def test_a_run_that_diverges_says_so(data: str, tmp_path: Path) -> None:
    words = ["optim.lr=1e30", "optim.detector_lr=1e30", "optim.max_skipped_in_a_row=1"]
    with pytest.raises(NotFiniteError, match=r"run 'tiny' ended: .*lower optim\.lr"):
        train_in_process(configured(data, tmp_path, *words), ignore, print)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_gpu_that_is_not_there_is_a_user_error(data: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"train\.use_gpu=yes.*no GPU on this machine"):
        train_in_process(configured(data, tmp_path, "train.use_gpu=yes"), ignore, print)
