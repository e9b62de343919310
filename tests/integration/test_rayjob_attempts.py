"""`submit --kubernetes` on a real Ray head, with real jobs, logs and signals but no API server.

kubectl is a stand-in (:mod:`tests.fake_kubectl`), and a thread does what KubeRay's operator does
with a RayJob in K8sJobMode: it mounts the ConfigMaps, runs `ray job submit` with the manifest's
entrypoint and runtime environment, follows the job's status, and retries.
"""

import base64
import json
import os
import re
import shlex
import signal
import subprocess
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from prioritycut_ray.ray_cluster.jobs import Cluster, NoSuchJob
from tests.conftest import TINY
from tests.fake_kubectl import ApiServer
from tests.hosts import BIN, TOKEN, environment, head, prioritycut

pytestmark = [pytest.mark.integration, pytest.mark.slow]

ENVIRON = environment()
FIRST_ATTEMPT_FAILS = """
import os
import sys

if any(word.endswith("bin/prioritycut") for word in sys.orig_argv):
    print("code of the working directory", flush=True)
    if not os.path.exists(os.environ["MARK"]):
        open(os.environ["MARK"], "w").close()
        os._exit(75)
"""


class Operator(threading.Thread):
    """Does what the operator does with RayJobs, on an existing head."""

    def __init__(self, server: ApiServer, address: str, folder: Path) -> None:
        super().__init__(daemon=True)
        self._server, self._address, self._folder = server, address, folder
        self._cluster = Cluster(address, TOKEN)
        self.ended = threading.Event()

    def run(self) -> None:
        while not self.ended.wait(0.5):
            for job in self._server.all("rayjob"):
                status = job.get("status") or {}
                match status.get("jobDeploymentStatus", "Retrying"):
                    case "Retrying":
                        self._begin(job, status)
                    case "Initializing":
                        self._submit(job, status)
                    case "Running":
                        self._look(job, status)

    def _set(self, job: dict[str, Any], **status: Any) -> None:
        self._server.put({**job, "status": status})

    def _begin(self, job: dict[str, Any], status: dict[str, Any]) -> None:
        name, suffix = job["metadata"]["name"], uuid.uuid4().hex[:5]
        cluster = f"{name}-{suffix}"
        metadata = {"name": cluster, "namespace": job["metadata"]["namespace"]}
        token = base64.b64encode(TOKEN.encode()).decode()
        workers = {"availableWorkerReplicas": 0, "desiredWorkerReplicas": 1}
        self._server.put({"kind": "Secret", "metadata": metadata, "data": {"auth_token": token}})
        self._server.put({"kind": "RayCluster", "metadata": metadata, "status": workers})
        self._set(
            job,
            jobDeploymentStatus="Initializing",
            rayClusterName=cluster,
            jobId=f"{name}-{suffix}",
            failed=status.get("failed", 0),
        )
        time.sleep(2.5)  # longer than a client takes to look again

    def _submit(self, job: dict[str, Any], status: dict[str, Any]) -> None:
        spec = job["spec"]
        runtime_env = yaml.safe_load(self._mounted(spec))
        command = ["ray", "job", "submit", "--no-wait", "--address", self._address]
        command += ["--submission-id", status["jobId"]]
        command += ["--runtime-env-json", json.dumps(runtime_env)]
        command += ["--", *shlex.split(spec["entrypoint"])]
        self._set(job, **{**status, "jobDeploymentStatus": "Running"})
        subprocess.run(
            [str(BIN / command[0]), *command[1:]], env=ENVIRON, check=True, capture_output=True
        )

    def _mounted(self, spec: dict[str, Any]) -> str:
        """Return the runtime environment with the paths of the mounted ConfigMaps."""
        text = str(spec["runtimeEnvYAML"])
        pod = spec["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]
        paths = {item["name"]: item["mountPath"] for item in pod["containers"][0]["volumeMounts"]}
        for volume in pod["volumes"]:
            if "configMap" in volume:
                name = volume["configMap"]["name"]
                # The next attempt has another node, hence another path here: Ray keeps packages.
                folder = self._folder / f"{name}-{uuid.uuid4().hex[:5]}"
                folder.mkdir()
                config_map = self._server.get("configmap", name)
                assert config_map is not None
                for key, content in config_map["binaryData"].items():
                    (folder / key).write_bytes(base64.b64decode(content))
                text = text.replace(paths[volume["name"]], str(folder))
        return text

    def _look(self, job: dict[str, Any], status: dict[str, Any]) -> None:
        try:
            seen = self._cluster.job(status["jobId"])
        except NoSuchJob:
            return
        now = {**status, "jobStatus": seen.status, "message": seen.message}
        if seen.status == "FAILED":
            now["failed"] += 1
            is_last = now["failed"] > job["spec"]["backoffLimit"]
            now["jobDeploymentStatus"] = "Failed" if is_last else "Retrying"
        elif seen.has_ended:
            now["jobDeploymentStatus"] = "Complete"
        if now != status:
            self._set(job, **now)


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with head(2, ENVIRON) as url:
        yield url


@pytest.fixture
def server(address: str, tmp_path: Path) -> Iterator[ApiServer]:
    stand_in = ApiServer(tmp_path / "kubernetes")
    stand_in.forward_to(address.removeprefix("http://"))
    (tmp_path / "mounts").mkdir()
    operator = Operator(stand_in, address, tmp_path / "mounts")
    operator.start()
    yield stand_in
    operator.ended.set()
    operator.join(60)


@pytest.fixture
def here(tmp_path: Path) -> Path:
    folder = tmp_path / "here"
    folder.mkdir()
    (folder / "mine.yaml").write_text(TINY.read_text())
    return folder


def words(shards: Path, tmp_path: Path, name: str) -> list[str]:
    job = ["submit", "mine.yaml", f"name={name}", f"data.url={shards}"]
    cluster = ["--workers", "1", "--gpus", "0", "--set", "worker.cpus=1", "--context", "lab"]
    for volume, folder in (("runs", tmp_path), ("sets", shards)):
        cluster += ["--set", f"volumes.{volume}.path={folder}", "--set"]
        cluster += [f"volumes.{volume}.claim={volume}"]
    image = ["--image", "ghcr.io/me/prioritycut-ray:0.1.0-ray2.60.0-cpu"]
    return [*job, f"storage={tmp_path / 'runs'}", "--kubernetes", *image, *cluster]


def environ_of(server: ApiServer) -> dict[str, str]:
    """Return an environment with the stand-in for kubectl and without a token."""
    changed = {**ENVIRON, "PATH": f"{server.folder / 'bin'}:{ENVIRON['PATH']}"}
    return {key: value for key, value in changed.items() if not key.startswith("RAY_AUTH")}


def awaited(condition: Callable[[], Any], what: str, seconds: float = 180) -> Any:
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, what
        time.sleep(0.3)
    return found


def test_a_job_runs_this_folder_and_is_retried(
    server: ApiServer, here: Path, shards: Path, tmp_path: Path
) -> None:
    (here / "sitecustomize.py").write_text(FIRST_ATTEMPT_FAILS)
    command = [*words(shards, tmp_path, "retried"), "train.samples=16"]
    command += ["--env", f"MARK={tmp_path / 'mark'}"]
    result = prioritycut(*command, cwd=here, environ=environ_of(server))
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.count("code of the working directory") == 2, "two attempts"
    assert "Initializing: 0 of 1 workers are up" in result.stdout
    assert "failed with exit code 75" in result.stdout
    assert "SUCCEEDED, exit code 0" in result.stdout
    assert list((tmp_path / "runs" / "retried").glob("step_*"))
    assert all(call[2:4] == ["--context", "lab"] for call in server.calls)
    assert server.forwards == [], "no process is left"


def test_a_job_outlives_ctrl_c_and_a_lost_connection(
    address: str, server: ApiServer, here: Path, shards: Path, tmp_path: Path
) -> None:
    command = [*words(shards, tmp_path, "long"), "train.samples=400000", "--set", "retries=0"]
    environ = environ_of(server)
    submitting = start(here, environ, tmp_path / "first.txt", str(BIN / "prioritycut"), *command)
    awaited(lambda: list(tmp_path.glob("runs/long/step_*")), "no checkpoint")
    submitting.send_signal(signal.SIGINT)
    assert submitting.wait(60) == 130
    said = (tmp_path / "first.txt").read_text()
    assert "detached; RayJob prioritycut-train-" in said
    assert "Traceback" not in said
    awaited(lambda: not server.forwards, "the port is still forwarded", 10)

    [line] = re.findall("follow it with `(.*?)`", said)
    following = start(here, environ, tmp_path / "second.txt", *shlex.split(line))
    [first] = awaited(lambda: server.forwards, "no port is forwarded")
    awaited(lambda: "training" in (tmp_path / "second.txt").read_text(), "no log")
    os.kill(first, signal.SIGKILL)
    awaited(lambda: server.forwards not in ([], [first]), "no port is forwarded again")
    time.sleep(3)  # for the log's beginning to come again
    stop = ["jobs", "interrupt", "--address", address]
    ended = prioritycut(*stop, cwd=here, environ=ENVIRON)
    assert ended.returncode == 0, ended.stderr
    assert following.wait(120) == 75, (tmp_path / "second.txt").read_text()
    said = (tmp_path / "second.txt").read_text()
    assert "FAILED, exit code 75" in said
    lines = [line for line in said.splitlines() if line.startswith("training")]
    assert lines, said
    assert len(lines) == len(set(lines)), "no line is shown twice"
    assert server.forwards == []


def start(
    here: Path, environ: dict[str, str], output: Path, *command: str
) -> "subprocess.Popen[bytes]":
    with output.open("wb") as stream:
        return subprocess.Popen(
            command, cwd=here, env=environ, stdout=stream, stderr=subprocess.STDOUT
        )
