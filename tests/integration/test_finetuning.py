"""The commands of docs/finetuning.md, in order, on synthetic puppets at 64² and small networks."""

import shlex
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image

from prioritycut_ray.data.puppets import render_clip
from prioritycut_ray.runs.locate import find_checkpoint, read_config, read_progress
from prioritycut_ray.runs.verdicts import read_verdicts
from prioritycut_ray.storage.folder import Folder
from prioritycut_ray.video.encoding import write_video
from tests.conftest import Prioritycut
from tests.documents import shell_commands
from tests.places import DATA, ROOT
from tests.unit.importers.test_thin_plate import published_golden
from tests.unit.models.thin_plate.test_parity import load

pytestmark = [pytest.mark.integration, pytest.mark.slow, pytest.mark.usefixtures("local_ray")]

SHORT = ["train.workers=0", "train.checkpoint_every=1"]
SMALL = {
    "vox256": ["quickstart", "train.samples=16", "train.validate_every=1", *SHORT],
    "vox256_tps": ["quickstart_tps", "train.samples=8", *SHORT],
    "vox512": [
        *("quickstart", "data.size=128", "train.samples=8", *SHORT),
        *("model.detector.scale_factor=0.25", "model.dense_motion.scale_factor=0.25"),
    ],
}
"""Small configurations that stand in for the shipped ones."""


def small(words: list[str]) -> list[str]:
    if "--size" in words:
        words[words.index("--size") + 1] = "64"
    if words[0] == "train":
        name, *changes = SMALL[words[1]]
        words = ["train", name, *words[2:], *changes]
    return words


def write_videos(folder: Path, seeds: range) -> None:
    folder.mkdir(parents=True)
    for seed in seeds:
        write_video(folder / f"{seed}.mp4", render_clip(seed, size=64, frames=12).frames, 12.0)


@pytest.fixture
def belongings(tmp_path: Path, prioritycut: Prioritycut) -> Path:
    """What the reader has: videos of one person, models of others, and larger clips."""
    torch.save(published_golden(load(DATA / "tps_dev_a.safetensors")), tmp_path / "vox.pth.tar")
    write_videos(tmp_path / "others", range(3))
    write_videos(tmp_path / "me" / "train", range(10, 12))
    write_videos(tmp_path / "me" / "val", range(12, 13))
    shutil.copy(tmp_path / "me" / "val" / "12.mp4", tmp_path / "dance.mp4")
    Image.fromarray(next(iter(render_clip(11, size=64, frames=1).frames))).save(tmp_path / "me.png")
    for out, size in (("data", "64"), ("data512", "128")):
        assert prioritycut("shard", "others", "--out", out, "--size", size).returncode == 0
    words = ["name=vox", "data.url=data", "train.samples=16", *SHORT]
    assert prioritycut("train", "quickstart", *words).returncode == 0
    return tmp_path


def test_every_command_of_the_recipes_runs(belongings: Path, prioritycut: Prioritycut) -> None:
    lines = shell_commands(ROOT / "docs" / "finetuning.md")
    assert len(lines) >= 5
    for line in lines:
        program, *words = shlex.split(line)
        assert program == "prioritycut"
        result = prioritycut(*small(words))
        assert result.returncode == 0, f"{line}\n{result.stderr}"
    runs = belongings / "runs"
    assert {v.step for v in read_verdicts(Folder(runs / "me"))} >= {1, 2}
    assert read_config(find_checkpoint(runs / "me" / "best")).name == "me"
    assert (runs / "me" / "evaluation" / "val" / "report.html").exists()
    assert (belongings / "me.mp4").exists()
    for name, has_all in (("me", True), ("large", False)):
        origin = read_progress(find_checkpoint(runs / name)).origin
        assert origin is not None
        assert origin.model == "vox"
        assert (origin.fresh == ()) is has_all
        assert not [tensor for tensor in origin.fresh if tensor.startswith("animator")]
