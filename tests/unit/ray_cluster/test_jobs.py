"""What happens before a job reaches a cluster."""

import os
from pathlib import Path

import pytest

from prioritycut_ray.config import load_config
from prioritycut_ray.errors import UserError
from prioritycut_ray.kubernetes.check import check_text, errors_of
from prioritycut_ray.ray_cluster.jobs import Cluster, Job, exit_code
from tests.conftest import Prioritycut, assert_one_line
from tests.hosts import ROOT

REMOTE = ["storage=s3://bucket/runs", "data.url=s3://bucket/data"]


@pytest.mark.parametrize(
    ("status", "code", "expected"),
    [
        ("SUCCEEDED", 0, 0),
        ("FAILED", 3, 3),
        ("FAILED", 75, 75),
        ("FAILED", None, 1),
        ("STOPPED", None, 1),
        ("FAILED", 0, 1),
    ],
)
def test_the_exit_code_is_the_drivers(status: str, code: int | None, expected: int) -> None:
    assert exit_code(Job("job", "run", status, "", code)) == expected


@pytest.mark.parametrize("address", ["localhost:8265", "ray://head:10001", "auto"])
def test_an_address_that_is_no_dashboard_is_named(address: str) -> None:
    with pytest.raises(UserError, match="http://HOST:8265"):
        Cluster(address)


def test_an_address_without_a_dashboard_is_one_line(prioritycut: Prioritycut) -> None:
    words = ["submit", "quickstart", *REMOTE, "--address", "http://127.0.0.1:9"]
    assert_one_line(prioritycut(*words), "http://127.0.0.1:9", "no Ray dashboard answers")


@pytest.mark.parametrize(
    ("words", "fragments"),
    [
        (["nowhere.yaml"], ["nowhere.yaml"]),
        (["quickstart"], ["storage=runs", "relative"]),
        (["quickstart", REMOTE[0]], ["data.url=data", "relative"]),
        (["../config.yaml", *REMOTE], ["config.yaml", "is outside"]),
        (["quickstart", *REMOTE, "data.known=old"], ["data.known=old", "relative"]),
        (["quickstart", *REMOTE, "loss.perceptual.weights=v.pth"], ["v.pth", "no such file"]),
        (["quickstart", *REMOTE, "--env", "NAME"], ["--env NAME", "KEY=VALUE"]),
        (["quickstart", *REMOTE, "train.worker=2"], ["train.workers"]),
        (["quickstart", *REMOTE, "train.workers=0"], ["train.workers=0", "set train.workers=1"]),
        (["nowhere.yaml", *REMOTE, "--kubernetes"], ["shipped"]),
    ],
)
def test_what_a_cluster_could_not_find_is_rejected_here(
    prioritycut: Prioritycut, tmp_path: Path, words: list[str], fragments: list[str]
) -> None:
    (tmp_path.parent / "config.yaml").write_text("name: mine\n")
    assert_one_line(prioritycut("submit", *words, "--dry-run"), *fragments)


def test_dry_run_shows_what_would_be_packed(prioritycut: Prioritycut, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("name: mine\n")
    result = prioritycut("submit", "mine.yaml", *REMOTE, "--dry-run")
    assert result.returncode == 0, result.stderr
    assert "1 file," in result.stdout
    assert f"prioritycut train mine.yaml {' '.join(REMOTE)}" in result.stdout


@pytest.mark.parametrize("name", ["ignored.yaml", "runs/a.yaml", "data/a.yaml", "link/a.yaml"])
def test_the_configuration_is_always_packed(
    prioritycut: Prioritycut, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, name: str
) -> None:
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    (tmp_path / "link").symlink_to(elsewhere)
    (tmp_path / ".gitignore").write_text("ignored.yaml\nlink\n.gitignore\n")
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("name: mine\n")
    result = prioritycut("submit", name, *REMOTE, "--dry-run")
    assert result.returncode == 0, result.stderr
    assert "1 file," in result.stdout


def test_local_perceptual_weights_are_packed(prioritycut: Prioritycut, tmp_path: Path) -> None:
    (tmp_path / "vgg.safetensors").write_text("weights")
    words = ["quickstart", *REMOTE, "loss.perceptual.weights=vgg.safetensors", "--dry-run"]
    assert "1 file," in prioritycut("submit", *words).stdout


def test_what_cannot_be_packed_is_listed(prioritycut: Prioritycut, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    result = prioritycut("submit", "quickstart", *REMOTE, "--dry-run")
    assert result.returncode == 0, result.stderr
    assert "pipe (a FIFO)" in result.stdout


def test_dry_run_for_kubernetes_prints_a_valid_job(prioritycut: Prioritycut) -> None:
    words = ["submit", "taichi256", "name=bodies", "train.samples=10", "--kubernetes", "--dry-run"]
    result = prioritycut(*words)
    assert result.returncode == 0, result.stderr
    assert errors_of(check_text(result.stdout)) == []
    assert "name: prioritycut-train-" in result.stdout
    assert "name=bodies" in result.stdout


def test_a_job_that_does_not_fit_its_cluster_is_rejected(prioritycut: Prioritycut) -> None:
    result = prioritycut("submit", "vox256", "train.workers=8", "--kubernetes", "--dry-run")
    assert_one_line(result, "train.workers=8", "room for 4")


def test_without_kubectl_the_fix_is_reported(
    prioritycut: Prioritycut, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "")
    assert_one_line(prioritycut("submit", "vox256", "--kubernetes"), "kubectl", "--dry-run")


def test_rendering_and_checking(prioritycut: Prioritycut, tmp_path: Path) -> None:
    assert prioritycut("k8s", "render", "max_workers=8", "--out", "mine").returncode == 0
    files = sorted(str(path) for path in (tmp_path / "mine").glob("*.yaml"))
    assert len(files) == 6
    result = prioritycut("k8s", "validate", *files)
    assert result.returncode == 0, "warnings do not fail the check"
    assert "warning: " in result.stdout
    assert "is a placeholder" in result.stdout
    broken = tmp_path / "mine" / "rayjob-train.yaml"
    broken.write_text(broken.read_text().replace("entrypoint:", "entripoint:"))
    result = prioritycut("k8s", "validate", str(broken))
    assert "entripoint" in result.stdout
    assert_one_line(result, "1 error; see above")


def test_files_of_the_image_must_exist_here(prioritycut: Prioritycut, tmp_path: Path) -> None:
    for word in ("tune=tune_configs/mine.yaml", "retrain=nightly.yaml"):
        assert_one_line(prioritycut("k8s", "render", word), word, "is not a file in this folder")
    (tmp_path / "nightly.yaml").write_text("data: data\nbudget: 100\nreplai: 0.5\n")
    assert_one_line(prioritycut("k8s", "render", "retrain=nightly.yaml"), "replai", "replay")
    (tmp_path / "nightly.yaml").write_text("data: data\nbudget: 100\n")
    assert prioritycut("k8s", "render", "retrain=nightly.yaml").returncode == 0
    manifest = (tmp_path / "cluster" / "cronjob-retrain.yaml").read_text()
    assert "prioritycut retrain nightly.yaml" in manifest
    words = ["volumes.settings.path=/settings", "volumes.settings.config_map=settings"]
    assert prioritycut("k8s", "render", *words, "retrain=/settings/a.yaml").returncode == 0
    result = prioritycut("k8s", "render", *words, "retrain=/setting/a.yaml")
    assert_one_line(result, "retrain=/setting/a.yaml")


def test_sizes_that_no_job_accepts_are_rejected(prioritycut: Prioritycut, tmp_path: Path) -> None:
    result = prioritycut("k8s", "render", "max_workers=3")
    assert_one_line(result, "max_workers=3", "train.batch_size=40")
    assert not (tmp_path / "cluster").exists()
    search = tmp_path / "mine.yaml"
    search.write_text((ROOT / "tune_configs" / "top_k.yaml").read_text())
    result = prioritycut("k8s", "render", "tune=mine.yaml", "max_workers=1", "worker.gpus=3")
    assert_one_line(result, "worker.gpus=3", "train.batch_size=40")


def test_a_placeholder_image_is_reported(prioritycut: Prioritycut) -> None:
    assert "placeholder" in prioritycut("k8s", "render").stdout
    image = "image=ghcr.io/me/prioritycut-ray:0.1.0-ray2.60.0-cpu"
    assert "placeholder" not in prioritycut("k8s", "render", image).stdout


def test_options_are_read_back_and_typos_named(prioritycut: Prioritycut, tmp_path: Path) -> None:
    shown = prioritycut("k8s", "render", "worker.gpus=2", "--show-options")
    (tmp_path / "options.yaml").write_text(shown.stdout)
    again = prioritycut("k8s", "render", "--options", "options.yaml", "--show-options")
    assert again.stdout == shown.stdout
    result = prioritycut("k8s", "render", "worker.gpu=2", "--out", "mine")
    assert_one_line(result, "worker.gpu", "worker.gpus")


def test_yes_and_no_are_words_in_an_override() -> None:
    assert load_config("quickstart", ["train.use_gpu=yes"]).train.use_gpu == "yes"
    assert load_config("quickstart", ["train.use_gpu=no"]).train.use_gpu == "no"
