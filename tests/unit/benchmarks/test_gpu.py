"""benchmarks/gpu.py: the output of stages that fail or hang is kept; the rehearsal on a CPU."""

import importlib
import os
import subprocess
import sys
import tarfile
import time
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


def is_running(pid: int) -> bool:
    try:
        return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_the_output_and_exit_code_of_a_stage_are_kept(gpu: ModuleType, tmp_path: Path) -> None:
    well, text = run_stage(gpu, tmp_path, "print('a figure')", 60)
    assert well
    assert text.startswith("=== stage\na figure\n=== stage: exit code 0, ")
    well, text = run_stage(gpu, tmp_path, "print('another'); raise SystemExit('no luck')", 60)
    assert not well
    assert "=== stage\nanother\nno luck\n=== stage: exit code 1, " in text
    assert text.startswith("=== stage\na figure\n"), "results are appended"


def test_a_stage_that_hangs_is_killed_with_its_children(gpu: ModuleType, tmp_path: Path) -> None:
    well, text = run_stage(gpu, tmp_path, HANGS, 3)
    assert not well
    child = int(text.split("child ")[1].split()[0])
    assert "=== stage: stopped at its limit of 3 s" in text
    deadline = time.monotonic() + 60
    while is_running(child):
        assert time.monotonic() < deadline, "a child of the stage is still running"
        time.sleep(0.1)


def test_stages_are_started_only_with_time_left(gpu: ModuleType, tmp_path: Path) -> None:
    setup = gpu.Setup(tmp_path, "", False)
    with (tmp_path / "results.txt").open("a") as results:
        assert gpu.run_stages(["ceilings"], setup, 1, results) == ["ceilings"]
    assert (
        "=== ceilings: not started, the 1 s are used up" in (tmp_path / "results.txt").read_text()
    )


def test_overlapping_kernels_count_once(gpu: ModuleType) -> None:
    stages = importlib.import_module("gpu_stages")
    assert stages.covered([]) == 0
    assert stages.covered([(5, 6), (0, 2), (1, 3), (1, 2)]) == 4


def test_shards_are_read_without_the_video_library(tmp_path: Path) -> None:
    """The stub that is packed in its place has every name that the stages import."""
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


def test_the_pack_leaves_out_unused_files(gpu: ModuleType, tmp_path: Path) -> None:
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
    """The stage runs as in its own process."""
    gpu.app(["stage", stage, str(tmp_path), "--dry"], standalone_mode=False)
    assert words in capsys.readouterr().out


@pytest.mark.slow
def test_all_stages_rehearsed(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "benchmarks/gpu.py"), "--dry", "--out", str(tmp_path)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    text = (tmp_path / "results.txt").read_text()
    assert text.count("exit code 0, ") == 10
    assert "stopped with exit code 75 (expected 75), resumed with 0 (expected 0)" in text
    assert "train.deterministic, resumed: all " in text


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "no GPU found; --dry rehearses"),
        (["--only", "steps,x"], "no such stage: x; the stages are"),
    ],
)
def test_a_missing_gpu_and_an_unknown_stage_are_errors(
    gpu: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    words: list[str],
    message: str,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises((SystemExit, typer.BadParameter), match=message):
        gpu.app(["--out", str(tmp_path), *words], standalone_mode=False)
