"""The example of docs/api.md, run on tiny data."""

import re
from pathlib import Path
from typing import Any

import pytest

from prioritycut_ray.data.puppets import render_clip
from tests.places import ROOT, TINY

pytestmark = pytest.mark.integration


def test_the_documented_example_trains_evaluates_and_animates(
    shards_copy: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (example,) = re.findall(
        r"^```python\n(.*?)^```$", (ROOT / "docs" / "api.md").read_text(), flags=re.M | re.S
    )
    assert example.count('load_config("quickstart", [') == 1
    smaller = example.replace('"quickstart", [', f'{str(TINY)!r}, ["train.samples=8", ')
    monkeypatch.chdir(tmp_path)
    frames = list(render_clip(3, size=48, frames=5).frames)
    names: dict[str, Any] = {"picture": frames[0], "driving_frames": frames}
    exec(smaller, names)
    assert names["run"] == str(tmp_path / "runs" / "mine")
    assert (tmp_path / "runs" / "mine" / "evaluation" / "test" / "report.html").is_file()
    assert re.search(r"^L1 0\.\d{4}, 95 % interval", capsys.readouterr().out, flags=re.M)
    assert [frame.shape for frame in names["frames"]] == [(32, 32, 3)] * 5
