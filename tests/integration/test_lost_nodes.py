"""Several nodes on this machine that are really started and killed."""

import json
import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from prioritycut_ray.runs.checkpoints import steps
from prioritycut_ray.runs.locate import find_checkpoint
from prioritycut_ray.storage.folder import Folder
from tests.hosts import BIN, Cluster, prioritycut
from tests.runs import ENVIRON, Start, assert_same_weights, await_truth

pytestmark = [pytest.mark.integration, pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    with Cluster(ENVIRON) as cluster:
        yield cluster


def test_a_whole_node_is_killed(cluster: Cluster, start: Start, undisturbed: Path) -> None:
    cluster.add()
    cluster.add()
    with start(RAY_ADDRESS=cluster.address) as training:
        ranks = training.at_step(7)
        victim = max(ranks, key=lambda rank: ranks[rank].address)
        cluster.node(ranks[victim].address).kill()
        # Ray gives a worker a process group of its own; left alive, a fast one ends the run.
        with suppress(ProcessLookupError):
            os.kill(ranks[victim].pid, signal.SIGKILL)
        assert training.end(400) == 0, training.output()
        assert f"(rank {victim}, node {ranks[victim].address}, step " in training.output()
        assert "lost node: " in training.output()
    assert_same_weights(undisturbed, start.run)


def test_a_node_is_drained_and_no_step_is_lost(
    cluster: Cluster, start: Start, undisturbed: Path
) -> None:
    cluster.add()
    cluster.add()
    with start(RAY_ADDRESS=cluster.address) as training:
        ranks = training.at_step(7)
        victim = max(ranks.values(), key=lambda rank: rank.address)
        words = ["--reason=DRAIN_NODE_REASON_PREEMPTION", "--reason-message=test"]
        words += [f"--node-id={victim.node_id}", "--deadline-remaining-seconds=300"]
        command = [str(BIN / "ray"), "drain-node", f"--address={cluster.address}", *words]
        drained = subprocess.run(command, env=ENVIRON, capture_output=True, text=True, timeout=120)
        assert drained.returncode == 0, drained.stdout + drained.stderr
        assert training.end(400) == 0, training.output()
        assert "preempted: asked to stop, and saved at step " in training.output()
        saved = training.output().partition("saved at step ")[2].split()[0]
        assert training.starts() == [0, int(saved)]
    assert_same_weights(undisturbed, start.run)


def test_a_run_grows_and_shrinks_with_the_cluster(cluster: Cluster, start: Start) -> None:
    with start(
        "train.workers=1..2",
        "train.samples=400000",
        "train.max_failures=3",
        RAY_ADDRESS=cluster.address,
    ) as training:
        training.at_step(7, workers=1)
        added = cluster.add()
        at = training.at_step(6, workers=2)[0].started_from
        assert at >= 5
        training.at_step(at + 7, workers=2)
        added.kill()
        await_truth(lambda: "lost node: " in training.output(), "the loss is reported")
        await_truth(lambda: training.starts()[-1] > at, "a start with the remaining node")
        training.at_step(at + 7, workers=1)
        training.process.terminate()
        assert training.end() == 75, training.output()
    saved = json.loads((find_checkpoint(start.run) / "progress.json").read_text())
    assert saved["samples"] == 4 * saved["step"]


@pytest.mark.parametrize("hidden", ["storage", "data"])
def test_a_place_that_one_node_does_not_see_is_rejected(
    cluster: Cluster, start: Start, shards: Path, hidden: str
) -> None:
    start.run.parent.mkdir(parents=True)
    place = start.run.parent if hidden == "storage" else shards
    own = ["unshare", "--mount", "bash", "-c", f'mount -t tmpfs none {place} && exec "$@"', "node"]
    if subprocess.run([*own, "true"], capture_output=True).returncode:
        pytest.skip("mounting file systems requires root")
    cluster.add(own)

    def rejection() -> str:
        with start(RAY_ADDRESS=cluster.address) as training:
            assert training.end() == 1, training.output()
            return "" if "the cluster has 1: " in training.output() else training.output()

    message = await_truth(rejection, "the node joins").strip().splitlines()[-1]
    assert f"node 127.0.0.3: {place if hidden == 'data' else f'storage={place}'}" in message
    assert ("all nodes share" if hidden == "storage" else "there is no index") in message
    assert steps(Folder(str(start.run))) == []


def findings(cluster: Cluster, cwd: Path, *words: str) -> dict[str, set[str]]:
    """Return the names of doctor's findings, by place; asserts that it did not crash."""
    command = ["doctor", "--address", cluster.address, "--json", *words]
    result = prioritycut(*command, cwd=cwd, environ=ENVIRON)
    assert result.stdout.startswith("["), result.stdout + result.stderr
    found: dict[str, set[str]] = {}
    for check in json.loads(result.stdout):
        found.setdefault(check["place"], set())
        if not check["ok"]:
            assert check["fix"]
            found[check["place"]].add(check["name"])
    assert result.returncode == (1 if any(found.values()) else 0), result.stderr
    return found


def test_doctor_names_the_node_that_differs(cluster: Cluster, tmp_path: Path) -> None:
    storage, other = tmp_path / "runs", tmp_path / "packages"
    storage.mkdir()
    metadata = other / "safetensors-0.0.1.dist-info" / "METADATA"
    metadata.parent.mkdir(parents=True)
    metadata.write_text("Metadata-Version: 2.1\nName: safetensors\nVersion: 0.0.1\n")
    mounts = f"mount -t tmpfs -o size=160m none /dev/shm && mount -t tmpfs none {storage} && "
    own = ["unshare", "--mount", "bash", "-c", mounts + 'exec "$@"', "node"]
    if subprocess.run([*own, "true"], capture_output=True).returncode:
        pytest.skip("mounting file systems requires root")
    added = cluster.add(own, PYTHONPATH=f"{other}:{ENVIRON['PYTHONPATH']}")
    same: dict[str, Any] = {}

    def both() -> bool:
        same.update(findings(cluster, tmp_path, "--storage", str(storage)))
        return "node 127.0.0.3" in same

    await_truth(both, "the node joins")
    assert {"/dev/shm", "storage", "versions"} <= same["node 127.0.0.3"]
    for place in ("driver", "node 127.0.0.2"):
        assert not {"storage", "versions", "torch", "decoder", "clock"} & same[place]
    added.kill()
    found = findings(cluster, tmp_path)
    assert found.get("node 127.0.0.3", {"checks"}) == {"checks"}, "gone, or a finding"


def test_doctor_on_a_cluster_that_requires_a_token(cluster: Cluster, tmp_path: Path) -> None:
    environ = {**ENVIRON, "RAY_AUTH_TOKEN": "f" * 32}
    result = prioritycut("doctor", "--address", cluster.address, cwd=tmp_path, environ=environ)
    assert result.returncode == 1
    assert "RAY_AUTH_TOKEN to what `ray get-auth-token` prints" in result.stderr.splitlines()[-1]
    assert "Traceback" not in result.stderr
