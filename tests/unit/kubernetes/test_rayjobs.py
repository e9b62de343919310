"""`submit` and `jobs logs` with `--kubernetes`, with a stand-in for kubectl and without a head."""

import base64
import io
import os
import zipfile
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console

from prioritycut_ray.commands.rayjob import AttemptLog
from prioritycut_ray.kubernetes.check import check_text, errors_of
from tests.conftest import Prioritycut, Result, assert_one_line
from tests.fake_kubectl import ApiServer

IMAGE = "ghcr.io/me/prioritycut-ray:0.1.0-ray2.60.0-cpu"
PLACES = ["storage=s3://bucket/runs", "data.url=s3://bucket/data"]


@pytest.fixture
def server(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> ApiServer:
    stand_in = ApiServer(tmp_path_factory.mktemp("kubernetes"))
    monkeypatch.setenv("PATH", stand_in.path)
    return stand_in


def submitted(prioritycut: Prioritycut, *words: str) -> Result:
    return prioritycut("submit", *words, "--kubernetes", "--image", IMAGE)


def objects(result: Result) -> dict[str, Any]:
    assert result.returncode == 0, result.stderr
    assert errors_of(check_text(result.stdout)) == []
    return {item["kind"]: item for item in yaml.safe_load_all(result.stdout)}


def working_directory(config_map: dict[str, Any]) -> zipfile.ZipFile:
    content = base64.b64decode(config_map["binaryData"]["working_dir.zip"])
    return zipfile.ZipFile(io.BytesIO(content))


# What is created.


def test_code_and_configuration_are_sent_in_a_config_map(
    prioritycut: Prioritycut, tmp_path: Path
) -> None:
    (tmp_path / "mine.yaml").write_text("name: own\nloss:\n  feature_matching: 5\n")
    (tmp_path / "model.py").write_text("changed = True\n")
    (tmp_path / "notes.txt").write_text("left here\n")
    words = ["mine.yaml", *PLACES, "--dry-run", "--exclude", "*.txt", "--env", "LEVEL=2"]
    result = submitted(prioritycut, *words)
    made = objects(result)
    archive = working_directory(made["ConfigMap"])
    assert sorted(archive.namelist()) == ["mine.yaml", "model.py"]
    assert archive.read("model.py") == b"changed = True\n"
    spec = made["RayJob"]["spec"]
    assert "prioritycut train mine.yaml" in spec["entrypoint"]
    assert spec["entrypoint"].count("name=own") == 1, "the run that the file names"
    assert yaml.safe_load(spec["runtimeEnvYAML"]) == {
        "working_dir": "file:///submitted/working_dir.zip",
        "env_vars": {"LEVEL": "2"},
    }
    cluster = spec["rayClusterSpec"]
    name = made["ConfigMap"]["metadata"]["name"]
    for group in (cluster["headGroupSpec"], cluster["workerGroupSpecs"][0]):
        pod = group["template"]["spec"]
        assert {"name": "working-dir", "configMap": {"name": name}} in pod["volumes"]
        [container] = pod["containers"]
        mount = {"name": "working-dir", "mountPath": "/submitted", "readOnly": True}
        assert mount in container["volumeMounts"]
    assert spec["backoffLimit"] == 3, "the operator retries with the same code"
    assert "Working directory:" in result.stderr


def test_there_is_no_config_map_without_files(prioritycut: Prioritycut, tmp_path: Path) -> None:
    (tmp_path / "big.py").write_bytes(os.urandom(2**21))
    result = submitted(prioritycut, "vox256", *PLACES, "--dry-run", "--exclude", "*")
    made = objects(result)
    assert list(made) == ["RayJob"]
    assert "runtimeEnvYAML" not in made["RayJob"]["spec"]
    assert "working-dir" not in result.stdout


def test_a_single_folder_keeps_its_name(prioritycut: Prioritycut, tmp_path: Path) -> None:
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "mine.yaml").write_text("name: mine\n")
    made = objects(submitted(prioritycut, "configs/mine.yaml", *PLACES, "--dry-run"))
    names = working_directory(made["ConfigMap"]).namelist()
    assert "configs/mine.yaml" in names
    assert any("/" not in name for name in names), "Ray would remove the only folder"


def test_flags_and_options_shape_the_cluster(prioritycut: Prioritycut, tmp_path: Path) -> None:
    (tmp_path / "options.yaml").write_text("worker: {memory_gib: 96}\nqueue: team-a\n")
    words = ["--workers", "2", "--gpus", "4", "--namespace", "vision", "--options", "options.yaml"]
    words += ["--set", "worker.cpus=32", "--set", "storage=s3://mine", "--dry-run"]
    job = objects(submitted(prioritycut, "vox256", *words, "--exclude", "*"))["RayJob"]
    assert job["metadata"]["namespace"] == "vision"
    assert job["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "team-a"
    group = job["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]
    assert group["replicas"] == 2
    container = group["template"]["spec"]["containers"][0]
    assert container["image"] == IMAGE
    wanted = {"cpu": "32", "memory": "96Gi", "nvidia.com/gpu": "4"}
    assert container["resources"]["limits"] == wanted
    assert "train.workers=8" in job["spec"]["entrypoint"]
    assert "storage=s3://mine/runs" in job["spec"]["entrypoint"]


# Rejected submissions.


@pytest.mark.parametrize(
    ("words", "fragments"),
    [
        (["--kubernetes", "--address", "http://h:1"], ["--address", "--kubernetes"]),
        (["--image", IMAGE], ["--image", "--kubernetes"]),
        (["--namespace", "n"], ["--namespace", "--kubernetes"]),
        (["--context", "c"], ["--context", "--kubernetes"]),
        (["--workers", "2"], ["--workers", "--kubernetes"]),
        (["--gpus", "2"], ["--gpus", "--kubernetes"]),
        (["--options", "o.yaml"], ["--options", "--kubernetes"]),
        (["--set", "spot=false"], ["--set", "--kubernetes"]),
        (["--kubernetes", "--set", "worker.gpus=2", "--gpus", "1"], ["--set worker.gpus=2", "1"]),
        (["--kubernetes", "--set", "worker.gpu=2"], ["worker.gpu", "worker.gpus"]),
        (["--kubernetes", "--env", "LEVEL"], ["--env LEVEL", "KEY=VALUE"]),
        (["--kubernetes", "--image", "Me/x:1"], ["image", "Me/x:1"]),
        (["--kubernetes", "--workers", "3"], ["3 workers", "train.batch_size=40", "--workers"]),
        (["--kubernetes", "storage=runs"], ["storage=runs", "relative"]),
        (["--kubernetes", "--set", "volumes.a.path=/submitted"], ["volumes"]),
    ],
)
def test_invalid_flags_are_named(
    prioritycut: Prioritycut, tmp_path: Path, words: list[str], fragments: list[str]
) -> None:
    (tmp_path / "mine.py").write_text("")
    assert_one_line(prioritycut("submit", "vox256", "--dry-run", *words), *fragments)


def test_an_address_in_the_environment_does_not_matter(
    prioritycut: Prioritycut, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "http://127.0.0.1:9")
    assert submitted(prioritycut, "vox256", "--dry-run").returncode == 0


def test_a_package_beyond_the_limit_is_named(prioritycut: Prioritycut, tmp_path: Path) -> None:
    (tmp_path / "large.bin").write_bytes(os.urandom(2**21))
    result = submitted(prioritycut, "vox256", *PLACES, "--dry-run")
    assert_one_line(result, "1 MiB", "large.bin", "--exclude")
    weights = f"loss.perceptual.weights={'large.bin'}"
    result = submitted(prioritycut, "vox256", *PLACES, weights, "--dry-run")
    assert_one_line(result, "1 MiB", "large.bin", "the job needs it")


def test_a_placeholder_image_is_rejected(prioritycut: Prioritycut, server: ApiServer) -> None:
    result = prioritycut("submit", "vox256", *PLACES, "--kubernetes")
    assert_one_line(result, "registry.example.com", "--image")
    assert server.calls == []


def test_only_one_job_trains_a_run(prioritycut: Prioritycut, server: ApiServer) -> None:
    words = ["vox256", "name=bodies", *PLACES, "--detach", "--context", "lab"]
    assert submitted(prioritycut, *words).returncode == 0
    [job] = server.all("rayjob")
    name = job["metadata"]["name"]
    result = submitted(prioritycut, *words)
    follow = f"prioritycut jobs logs {name} --follow --kubernetes --namespace prioritycut"
    assert_one_line(result, "'bodies'", f"{follow} --context lab")
    assert f"kubectl --namespace prioritycut --context lab delete rayjob {name}" in result.stderr
    server.put({**job, "status": {"jobDeploymentStatus": "Failed"}})
    assert submitted(prioritycut, *words).returncode == 0
    assert all(call[2:4] == ["--context", "lab"] for call in server.calls)


# What is left behind.


def test_the_config_map_is_deleted_with_its_job(
    prioritycut: Prioritycut, server: ApiServer, tmp_path: Path
) -> None:
    (tmp_path / "mine.yaml").write_text("name: mine\n")
    result = submitted(prioritycut, "mine.yaml", *PLACES, "--detach")
    assert result.returncode == 0, result.stderr
    [job], [config_map] = server.all("rayjob"), server.all("configmap")
    [owner] = config_map["metadata"]["ownerReferences"]
    assert owner["uid"] == job["metadata"]["uid"]
    assert owner["kind"] == "RayJob"
    assert f"jobs logs {job['metadata']['name']} --follow --kubernetes" in result.stdout


def test_nothing_is_left_of_a_rejected_job(
    prioritycut: Prioritycut, server: ApiServer, tmp_path: Path
) -> None:
    (tmp_path / "mine.yaml").write_text("name: mine\n")
    server.forbid("RayJob")
    result = submitted(prioritycut, "mine.yaml", *PLACES)
    assert_one_line(result, "kubectl create", "Forbidden")
    assert server.all("configmap") == []


def test_a_config_map_that_is_not_deleted_is_named(
    prioritycut: Prioritycut, server: ApiServer, tmp_path: Path
) -> None:
    (tmp_path / "mine.yaml").write_text("name: mine\n")
    server.forbid("patch")
    result = submitted(prioritycut, "mine.yaml", *PLACES, "--detach")
    assert result.returncode == 0, "the job is there"
    [config_map] = server.all("configmap")
    assert f"delete configmap {config_map['metadata']['name']}" in result.stdout


# A job whose head is gone.


@pytest.mark.parametrize(
    ("status", "code", "shown"),
    [
        ({"jobDeploymentStatus": "Complete", "jobStatus": "SUCCEEDED"}, 0, "SUCCEEDED"),
        ({"jobDeploymentStatus": "Complete", "jobStatus": "STOPPED"}, 1, "STOPPED"),
        (
            {
                "jobDeploymentStatus": "Failed",
                "jobStatus": "FAILED",
                "reason": "AppFailed",
                "message": "Job entrypoint command failed with exit code 65, last available logs",
            },
            65,
            "AppFailed, exit code 65",
        ),
        (
            {
                "jobDeploymentStatus": "Failed",
                "jobStatus": "RUNNING",
                "reason": "DeadlineExceeded",
                "message": "The RayJob has passed the activeDeadlineSeconds",
            },
            1,
            "DeadlineExceeded, exit code 1 · The RayJob has passed",
        ),
        (
            {
                "jobDeploymentStatus": "ValidationFailed",
                "reason": "ValidationFailed",
                "message": "The RayJob spec is invalid",
            },
            1,
            "ValidationFailed, exit code 1 · The RayJob spec is invalid",
        ),
    ],
)
def test_the_end_of_a_job_comes_from_the_operator_if_its_head_is_gone(
    prioritycut: Prioritycut, server: ApiServer, status: dict[str, str], code: int, shown: str
) -> None:
    metadata = {"name": "train", "namespace": "vision"}
    status = {**status, "jobId": "train-1", "rayClusterName": "train-a"}
    server.put({"kind": "RayJob", "metadata": metadata, "status": status})
    words = ["jobs", "logs", "train", "--follow", "--kubernetes", "--namespace", "vision"]
    result = prioritycut(*words)
    assert result.returncode == code, result.stderr
    assert f"Job train: {shown}" in result.stdout


def test_a_log_continues_where_it_was(
    capsys: pytest.CaptureFixture[str],
) -> None:
    attempt = AttemptLog("job", Console(soft_wrap=True))
    first = attempt.reader()
    first("one\ntw")
    first("o\n")
    second = attempt.reader()
    second("one\n")
    second("two\nthr")
    second("ee\n")
    assert capsys.readouterr().out == "one\ntwo\nthree\n"


def test_a_job_that_does_not_exist_is_named(prioritycut: Prioritycut, server: ApiServer) -> None:
    for words in (["--follow"], []):
        result = prioritycut("jobs", "logs", "train", "--kubernetes", *words)
        assert_one_line(result, "train: there is no such RayJob", "get rayjobs")


def test_a_job_without_a_log_says_why(prioritycut: Prioritycut, server: ApiServer) -> None:
    metadata = {"name": "train", "namespace": "prioritycut"}
    server.put({"kind": "RayJob", "metadata": metadata})
    result = prioritycut("jobs", "logs", "train", "--kubernetes")
    assert_one_line(result, "no log yet", "--follow")
    server.put(
        {
            "kind": "RayJob",
            "metadata": metadata,
            "status": {
                "jobDeploymentStatus": "Running",
                "jobId": "train-1",
                "rayClusterName": "train-a",
            },
        }
    )
    result = prioritycut("jobs", "logs", "train", "--kubernetes")
    assert_one_line(result, "kubectl port-forward", "train-a-head-svc")
