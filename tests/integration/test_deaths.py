"""What docs/failures.md says happens, with real processes that are really killed."""

import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

import pytest

from prioritycut_ray.config import load_config
from prioritycut_ray.data.index import read_index
from prioritycut_ray.data.stream import FramePairs
from prioritycut_ray.ray_cluster.compat import node_memory
from prioritycut_ray.runs.locate import find_checkpoint
from tests.conftest import TINY
from tests.runs import BATCH, STEPS, Start, assert_same_weights

pytestmark = [pytest.mark.integration, pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_is_killed(start: Start, undisturbed: Path, rank: int) -> None:
    with start() as training:
        victim = training.at_step(7)[rank]
        os.kill(victim.pid, signal.SIGKILL)
        assert training.end() == 0, training.output()
        words = f"worker killed: process {victim.pid} got signal 9 (SIGKILL) (rank {rank}, node "
        assert words in training.output()
        # The other rank has saved the step that both had completed.
        saved = training.output().partition(f"rank {1 - rank}: saved at step ")[2].split()[0]
        assert int(saved) >= 7
        assert training.starts() == [0, int(saved)]
    assert_same_weights(undisturbed, start.run)


def test_the_driver_is_killed_and_the_same_command_resumes(start: Start, undisturbed: Path) -> None:
    with start() as training:
        training.at_step(12)
        training.process.kill()
        assert training.end() == -signal.SIGKILL
    saved = int(find_checkpoint(start.run).name.removeprefix("step_"))
    assert saved >= 10
    with start() as training:
        assert training.end() == 0, training.output()
        # The workers outlive the driver by seconds, in which fast ones may finish the run.
        assert training.starts() == ([saved] if saved < STEPS else [])
    assert_same_weights(undisturbed, start.run)


def test_a_truncated_checkpoint_is_skipped(start: Start, undisturbed: Path) -> None:
    with start() as training:
        training.at_step(12)
        training.process.kill()
        assert training.end() == -signal.SIGKILL
    newest = find_checkpoint(start.run)
    os.truncate(newest / "optimizers.pt", 1000)
    saved = int(find_checkpoint(start.run).name.removeprefix("step_"))
    with start() as training:
        assert training.end() == 0, training.output()
        assert training.starts() == [saved]
        assert f"{newest}/optimizers.pt: is damaged" in training.output()
    assert_same_weights(undisturbed, start.run)


def test_a_worker_gets_sigterm_and_no_step_is_lost(start: Start, undisturbed: Path) -> None:
    with start() as training:
        os.kill(training.at_step(7)[1].pid, signal.SIGTERM)
        assert training.end() == 0, training.output()
        assert "preempted: asked to stop, and saved at step " in training.output()
        saved = training.output().partition("saved at step ")[2].split()[0]
        assert training.starts() == [0, int(saved)]
    assert_same_weights(undisturbed, start.run)


def test_ctrl_c_reaches_all_processes_and_the_run_saves(start: Start, undisturbed: Path) -> None:
    with start() as training:
        training.at_step(7)
        os.killpg(training.process.pid, signal.SIGINT)
        assert training.end() == 75, training.output()
        assert "SIGINT: saving at this step" in training.output()
        saved = training.output().partition("saved at step ")[2].split()[0]
        assert f"{start.run}/step_{int(saved):07d}; resume with: " in training.output()
    with start() as training:
        assert training.end() == 0, training.output()
        assert training.starts() == [int(saved)]
    assert_same_weights(undisturbed, start.run)


def test_two_sigterms_save_as_one_does(start: Start, undisturbed: Path) -> None:
    """As sent by `kubectl delete rayjob`: the operator's stop, then the head's preStop hook."""
    with start() as training:
        victim = training.at_step(7)[1]
        os.kill(victim.pid, signal.SIGSTOP)  # so that the save has not ended before the second one
        training.process.terminate()
        training.await_output("SIGTERM: saving at this step")
        training.process.terminate()
        time.sleep(2)
        assert training.process.poll() is None, training.output()
        os.kill(victim.pid, signal.SIGCONT)
        assert training.end() == 75, training.output()
        saved = training.output().partition("saved at step ")[2].split()[0]
        assert f"{start.run}/step_{int(saved):07d}; resume with: " in training.output()
    with start() as training:
        assert training.end() == 0, training.output()
        assert training.starts() == [int(saved)]
    assert_same_weights(undisturbed, start.run)


@pytest.mark.parametrize("why", ["a second Ctrl-C", "the grace period is over"])
def test_a_run_that_cannot_save_still_ends(start: Start, why: str) -> None:
    grace = 600 if why == "a second Ctrl-C" else 5
    with start(f"train.grace_seconds={grace}") as training:
        os.kill(training.at_step(7)[1].pid, signal.SIGSTOP)
        training.process.send_signal(signal.SIGINT)
        if why == "a second Ctrl-C":
            training.await_output("a second Ctrl-C stops without saving")
            training.process.send_signal(signal.SIGINT)
        assert training.end() == 75, training.output()
        assert f"stopped without saving ({why})" in training.output()
        assert f"{find_checkpoint(start.run)}; resume with: " in training.output()


def test_a_frozen_rank_is_a_collective_timeout_that_names_it(start: Start) -> None:
    with start("train.collective_timeout_s=10") as training:
        os.kill(training.at_step(7)[1].pid, signal.SIGSTOP)
        assert training.end() == 74, training.output()
        assert "collective timeout: rank 1 hangs at " in training.output()
        assert "its process has been silent for" in training.output()


def test_the_monitor_is_killed_without_effect(start: Start, undisturbed: Path) -> None:
    with start() as training:
        training.at_step(7)
        os.kill(training.actor("monitor"), signal.SIGKILL)
        assert training.end() == 0, training.output()
        assert training.starts() == [0]
    assert_same_weights(undisturbed, start.run)


def test_rays_controller_is_killed_and_the_run_continues(start: Start, undisturbed: Path) -> None:
    with start() as training:
        training.at_step(7)
        os.kill(training.actor("controller"), signal.SIGKILL)
        assert training.end() == 0, training.output()
        assert "worker killed: the process of the run's controller is gone" in training.output()
        assert len(training.starts()) == 2
    assert_same_weights(undisturbed, start.run)


def test_a_loss_that_is_not_finite(start: Start) -> None:
    with start("optim.lr=1e30") as training:
        assert training.end() == 76, training.output()
        assert "loss not finite: " in training.output()
        assert "optim.lr" in training.output()


def test_the_same_error_twice_at_one_step_ends_the_run(start: Start) -> None:
    start.run.mkdir(parents=True)
    (start.run / "tensorboard").write_text("a file where a folder should be")
    with start("train.max_failures=100") as training:
        assert training.end() == 70, training.output()
        assert training.output().count("restarting from the last checkpoint") == 1
        assert "error in a worker: " in training.output()


def test_memory_that_grows_is_ended_by_rays_monitor(start: Start) -> None:
    used, total = node_memory()
    grown = int(min(12e9, (total - used) / 2))
    limits = {
        "GROW_BYTES": str(grown),
        "RAY_memory_usage_threshold": f"{(used + 0.6 * grown) / total:.3f}",
        "RAY_memory_monitor_refresh_ms": "100",
    }
    with start("train.max_failures=0", "train.samples=400000", **limits) as training:
        address = training.at_step(5)[1].address
        assert training.end() == 71, training.output()
        assert "out of memory: Ray's memory monitor killed the worker" in training.output()
        assert f"(rank 1, node {address}, step " in training.output()


def order(folder: Path) -> list[list[int]]:
    """Return the seeds of every step's samples, sorted within the step."""
    files = [path.read_text().splitlines() for path in sorted(folder.glob("rank*.jsonl"))]
    return [sorted(chain(*map(json.loads, lines))) for lines in zip(*files, strict=True)]


@pytest.mark.parametrize("workers", [(2, 1), (1, 2)])
def test_other_numbers_of_workers_see_the_same_samples(
    start: Start, workers: tuple[int, int], tmp_path: Path
) -> None:
    orders = []
    for count, steps in zip(workers, (8, 16), strict=True):
        folder = tmp_path / f"seeds{count}"
        folder.mkdir()
        words = [f"train.workers={count}", f"train.samples={BATCH * steps}"]
        with start(*words, SEEDS_FOLDER=str(folder)) as training:
            assert training.end() == 0, training.output()
        orders += order(folder)
    assert orders == expected_order(start, 16)
    assert find_checkpoint(start.run).name == "step_0000016"


def expected_order(start: Start, steps: int) -> list[list[int]]:
    """Return the order of the stream itself, which does not depend on ranks."""
    config = load_config(str(TINY), start.words)
    index = read_index(config.data.url)
    pairs = FramePairs(
        config.data.url,
        index,
        config.data.split,
        size=config.data.size,
        seed=config.train.seed,
        num_repeats=config.data.num_repeats,
    )
    seeds = [pairs.draw(number).augment_seed for number in range(BATCH * steps)]
    return [sorted(seeds[BATCH * step : BATCH * (step + 1)]) for step in range(steps)]


@pytest.fixture
def small_disk(undisturbed: Path, tmp_path: Path) -> Iterator[Path]:
    """A separate file system with room for two and a half checkpoints."""
    size = sum(path.stat().st_size for path in find_checkpoint(undisturbed).iterdir())
    folder = tmp_path / "runs"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size * 5 // 2}", "none", str(folder)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting file systems requires root")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_a_full_disk_leaves_the_last_good_checkpoint(
    start: Start, undisturbed: Path, small_disk: Path
) -> None:
    with start() as training:
        assert training.end() == 73, training.output()
        assert "disk full: " in training.output()
        assert "free space there" in training.output()
        last = find_checkpoint(start.run)  # which verifies it
        assert f"last checkpoint: {last}; resume with: " in training.output()
    subprocess.run(["mount", "-o", "remount,size=1g", str(small_disk)], check=True)
    with start() as training:
        assert training.end() == 0, training.output()
        assert f"step_{training.starts()[0]:07d}" == last.name
    assert_same_weights(undisturbed, start.run)
