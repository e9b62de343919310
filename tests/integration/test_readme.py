"""Every command of README's code blocks, run in order on synthetic clips and small networks.

Files, folders, options and overrides are those of README; only `small` changes the sizes. A command
that cannot run here is listed in `NOT_RUN` with the reason; any other command that fails, or that
the test does not know, is an error.
"""

import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import requests
import torch
from PIL import Image
from safetensors.torch import load_file

from prioritycut_ray import Animator
from prioritycut_ray.video.decoding import frames_upright
from tests.conftest import Prioritycut
from tests.documents import shell_commands
from tests.places import DATA, ROOT, TINY

pytestmark = [pytest.mark.integration, pytest.mark.usefixtures("local_ray")]

NOT_RUN = {
    "make quickstart": "installs from a package index; test_training.py runs the quickstart",
    "make test": "installs from a package index and runs these tests",
    "source .venv/bin/activate": "these tests already run in an environment",
}
PATIENCE_S = 120.0


def small(words: list[str]) -> list[str]:
    """The same command on frames of 32 pixels, small networks and two steps of training."""
    if "--size" in words:
        words[words.index("--size") + 1] = "32"
    if words[0] == "train":
        words[1] = str(TINY)
        words.append("train.samples=8")
    return words


@pytest.fixture
def belongings(puppet_videos: Path, tmp_path: Path) -> Path:
    """A folder with the files that the reader of README has."""
    shutil.copytree(puppet_videos, tmp_path / "my_videos")
    (tmp_path / "my_videos" / "broken.mp4").write_bytes(b"<html>not found</html>")
    for name, clip in (("dance", 0), ("talk", 1)):
        shutil.copy(puppet_videos / f"puppet_{clip}.mp4", tmp_path / f"{name}.mp4")
    frame = next(frames_upright(puppet_videos / "puppet_2.mp4"))
    Image.fromarray(frame).save(tmp_path / "me.png")
    torch.save(published_weights(), tmp_path / "vox-adv-cpk.pth.tar")
    return tmp_path


def published_weights() -> dict[str, dict[str, torch.Tensor]]:
    """Random weights of small networks, in the layout of First Order Motion's checkpoints."""
    networks: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in load_file(DATA / "dev_a.safetensors").items():
        if key.startswith("weights/"):
            network, _, name = key.removeprefix("weights/").partition(".")
            networks.setdefault(network, {})[name] = tensor
    return networks


def test_every_command_of_the_readme_runs(belongings: Path, prioritycut: Prioritycut) -> None:
    lines = shell_commands(ROOT / "README.md")
    assert len(lines) >= 12
    assert set(NOT_RUN) <= set(lines), "NOT_RUN lists a command that README no longer has"
    for line in lines:
        program, *words = shlex.split(line)
        if line in NOT_RUN:
            continue
        if program == "prioritycut":
            result = prioritycut(*small(words))
            assert result.returncode == 0, f"{line}\n{result.stderr}"
        elif program == "tensorboard":
            with tensorboard(words, belongings) as url:
                assert_shows_a_run(url)
        else:
            pytest.fail(f"{line}: run it in this test, or list it in NOT_RUN with the reason")
    assert_made(belongings)


def assert_made(folder: Path) -> None:
    """The outputs that README names exist."""
    assert "broken.mp4" in (folder / "data" / "rejected.csv").read_text()
    assert (folder / "runs" / "mine" / "evaluation" / "test" / "report.html").exists()
    assert len(list(frames_upright(folder / "me.mp4"))) == 12
    names = {path.name for path in (folder / "mine").iterdir()}
    assert names >= {"config.json", "README.md", "animator.pt2"}
    assert "| L1 " in (folder / "mine" / "README.md").read_text(), "the scores of step 4"
    assert Animator.from_pretrained(str(folder / "mine"), device="cpu").size == 32


@contextmanager
def tensorboard(words: list[str], folder: Path) -> Iterator[str]:
    """Run the server on a free port; yield its address."""
    program = str(Path(sys.executable).parent / "tensorboard")
    output = folder / "tensorboard.txt"
    with output.open("wb") as stream:
        server = subprocess.Popen(
            [program, *words, "--port=0"], cwd=folder, stdout=stream, stderr=subprocess.STDOUT
        )
    try:
        deadline = time.monotonic() + PATIENCE_S
        while not (found := re.search(r"http://\S+:\d+", output.read_text())):
            assert server.poll() is None, output.read_text()
            assert time.monotonic() < deadline, output.read_text()
            time.sleep(0.2)
        yield found[0]
    finally:
        server.terminate()
        server.wait(30)


def assert_shows_a_run(url: str) -> None:
    """Wait until TensorBoard, which reads its folder in the background, shows a run."""
    deadline = time.monotonic() + PATIENCE_S
    while not requests.get(f"{url}/data/runs", timeout=30).json():
        assert time.monotonic() < deadline, "TensorBoard shows no run"
        time.sleep(0.2)
