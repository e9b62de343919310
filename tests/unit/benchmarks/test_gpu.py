"""benchmarks/gpu.py: stages that fail or hang leave what they said; the rehearsal on a CPU."""

import importlib
import os
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
import typer

from tests.places import ROOT

HANGS = """
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
print("child", child.pid, flush=True)
time.sleep(600)
"""


@pytest.fixture(scope="module")
def gpu() -> Iterator[ModuleType]:
    """The script, as a module."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "benchmarks"))
        yield importlib.import_module("gpu")


def run_stage(gpu: ModuleType, folder: Path, code: str, limit: float) -> tuple[bool, str]:
    path = folder / "results.txt"
    with path.open("a") as results:
        well = gpu.run_stage("stage", [sys.executable, "-c", code], limit, results)
    return well, path.read_text()


def test_what_a_stage_said_is_kept_and_how_it_ended(gpu: ModuleType, tmp_path: Path) -> None:
    well, text = run_stage(gpu, tmp_path, "print('a figure')", 60)
    assert well
    assert text.startswith("=== stage\na figure\n=== stage: exit code 0, ")
    well, text = run_stage(gpu, tmp_path, "print('another'); raise SystemExit('no luck')", 60)
    assert not well
    assert "=== stage\nanother\nno luck\n=== stage: exit code 1, " in text
    assert text.startswith("=== stage\na figure\n"), "results are added to"


def test_a_stage_that_hangs_is_ended_with_all_that_it_started(
    gpu: ModuleType, tmp_path: Path
) -> None:
    well, text = run_stage(gpu, tmp_path, HANGS, 3)
    assert not well
    child = int(text.split("child ")[1].split()[0])
    assert "=== stage: stopped after its 3 s" in text
    status = Path(f"/proc/{child}/status")
    assert not status.exists() or "State:\tZ" in status.read_text()


def test_stages_are_begun_only_with_time_left(gpu: ModuleType, tmp_path: Path) -> None:
    setup = gpu.Setup(tmp_path, "", False)
    with (tmp_path / "results.txt").open("a") as results:
        assert gpu.run_stages(["ceilings"], setup, 1, results) == ["ceilings"]
    assert "=== ceilings: not begun, 1 s are over" in (tmp_path / "results.txt").read_text()


def test_time_of_two_kernels_at_once_counts_once(gpu: ModuleType) -> None:
    stages = importlib.import_module("gpu_stages")
    assert stages.covered([]) == 0
    assert stages.covered([(5, 6), (0, 2), (1, 3), (1, 2)]) == 4


def test_shards_are_read_without_the_video_library(tmp_path: Path) -> None:
    """By the stub that is packed in its place: all that the stages import is there."""
    (tmp_path / "av.py").write_bytes((ROOT / "benchmarks/av_stub.py").read_bytes())
    code = "import av, gpu_stages, prioritycut_ray.commands.animate; print(av.__file__)"
    path = os.pathsep.join([str(tmp_path), str(ROOT), str(ROOT / "benchmarks")])
    result = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert result.stdout.strip() == str(tmp_path / "av.py"), result.stderr


def test_the_pack_leaves_out_what_is_not_used(gpu: ModuleType, tmp_path: Path) -> None:
    pack = importlib.import_module("gpu_pack")
    names = {
        "ray/__init__.py": True,
        "ray/core/src/ray/raylet/raylet": True,
        "ray/serve/__init__.py": True,
        "ray-2.dist-info/METADATA": True,
        "ray/rllib/algorithms/ppo.py": False,
        "ray/serve/api.py": False,
        "ray/jars/ray_dist.jar": False,
        "ray/dashboard/client/build/main.js": False,
        "ray/train/tests/test_x.py": False,
    }
    with zipfile.ZipFile(tmp_path / "ray.whl", "w") as wheel:
        for name in names:
            entry = zipfile.ZipInfo(name)
            entry.external_attr = (0o755 if name.endswith("raylet") else 0o644) << 16
            wheel.writestr(entry, name)
    pack.slim(tmp_path / "ray.whl", tmp_path / "ray.tar.xz")
    with tarfile.open(tmp_path / "ray.tar.xz") as kept:
        modes = {member.name: member.mode for member in kept}
        assert set(modes) == {name for name, wanted in names.items() if wanted}
        assert modes["ray/core/src/ray/raylet/raylet"] == 0o755
        file = kept.extractfile("ray/__init__.py")
        assert file is not None
        assert file.read() == b"ray/__init__.py"
    assert len(pack.command_for(Path("gpu_pack"))) < 2000


@pytest.mark.parametrize(
    ("stage", "words"), [("ceilings", "GEMM 256, bfloat16: "), ("loader", "loader_workers=1: ")]
)
def test_a_quick_stage_rehearsed(
    gpu: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str], stage: str, words: str
) -> None:
    """As its process would run it."""
    gpu.app(["stage", stage, str(tmp_path), "--dry"], standalone_mode=False)
    assert words in capsys.readouterr().out


@pytest.mark.slow
def test_all_stages_rehearsed(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "benchmarks/gpu.py"), "--dry", "--out", str(tmp_path)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    text = (tmp_path / "results.txt").read_text()
    assert text.count("exit code 0, ") == 10
    assert "stopped with exit code 75 (75 wanted), resumed with 0 (0 wanted)" in text
    assert "train.deterministic, resumed: all " in text


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "no GPU here: .*--dry rehearses"),
        (["--only", "steps,x"], "no such stage: x; there are"),
    ],
)
def test_what_cannot_be_measured_is_refused(
    gpu: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    words: list[str],
    message: str,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises((SystemExit, typer.BadParameter), match=message):
        gpu.app(["--out", str(tmp_path), *words], standalone_mode=False)
