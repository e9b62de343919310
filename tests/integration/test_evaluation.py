"""Evaluation of runs with random weights on packed puppets: files, scores, and the page."""

import base64
import csv
import json
import math
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from prioritycut_ray import evaluate
from prioritycut_ray.commands.evaluate import print_summary
from prioritycut_ray.config import load_config
from prioritycut_ray.data.index import clips_of, read_index
from prioritycut_ray.errors import UserError
from prioritycut_ray.evaluation.records import Evaluation
from prioritycut_ray.launch.benchmark import benchmark_puppets
from prioritycut_ray.training.checkpoint import save_checkpoint
from prioritycut_ray.training.state import new_state
from tests.browser import chromium
from tests.places import ALONE, TINY, TINY_TPS

pytestmark = pytest.mark.integration


def random_run(folder: Path, *words: str, source: Path = TINY) -> Path:
    config = load_config(str(source), list(words))
    save_checkpoint(new_state(config, torch.device("cpu")), config, folder / "step_0000001")
    return folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two runs of random weights; the second is of the other family and has no discriminator."""
    folder = tmp_path_factory.mktemp("runs")
    first = random_run(folder / "<first> & one", "train.seed=1")
    words = ["train.seed=2", "model.background=false", *ALONE]
    return first, random_run(folder / "second", *words, source=TINY_TPS)


@pytest.fixture(scope="module")
def report(runs: tuple[Path, Path], shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of both runs, made in this process."""
    out = tmp_path_factory.mktemp("report")
    evaluate(runs[0], str(shards), compare=[runs[1]], split="train", workers=0, out=out)
    return out


def test_predictions_that_are_not_finite_are_reported(
    runs: tuple[Path, Path], shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = load_config(str(TINY))
    state = new_state(config, torch.device("cpu"))
    for parameter in state.ema.module.parameters():
        parameter.data.mul_(1e30)  # finite, as a learning rate of 1e30 leaves them
    save_checkpoint(state, config, tmp_path / "diverged" / "step_0000001")
    out = tmp_path / "report"
    evaluation = evaluate(
        tmp_path / "diverged",
        str(shards),
        compare=[runs[1]],
        split="train",
        workers=0,
        out=out,
    )
    print_summary(evaluation, Console(width=200))
    said = capsys.readouterr().out
    for text in (said, (out / "report.md").read_text(), (out / "report.html").read_text()):
        assert "not finite" in text
        assert "diverged: the predictions of 60 frames are NaN or infinite" in text
        assert not re.search(r"[-+ >]nan\b", text)
        assert "nan unclear" not in text
    assert Evaluation.model_validate_json(
        (out / "evaluation.json").read_text()
    ).model_dump_json() == (evaluation.model_dump_json())
    for metric, estimate in evaluation.model("diverged").mean_over_clips.items():
        assert estimate.value is not None, metric
        assert not math.isfinite(estimate.value), metric


@pytest.mark.parametrize("workers", [1, 2])
def test_results_are_equal_for_any_number_of_workers(
    runs: tuple[Path, Path], shards: Path, report: Path, tmp_path: Path, workers: int
) -> None:
    evaluate(
        runs[0],
        str(shards),
        compare=[runs[1]],
        split="train",
        workers=workers,
        out=tmp_path,
    )
    for file in report.iterdir():
        assert (tmp_path / file.name).read_bytes() == file.read_bytes(), file.name


def test_scores_on_puppets_are_equal_for_any_number_of_workers(
    runs: tuple[Path, Path], local_ray: None, tmp_path: Path
) -> None:
    for workers in (0, 2):
        out = tmp_path / str(workers)
        benchmark_puppets(runs[1], identities=2, frames=3, workers=workers, out=out)
    for name in ("puppets.json", "columns.png"):
        assert (tmp_path / "2" / name).read_bytes() == (tmp_path / "0" / name).read_bytes()


def test_more_workers_than_the_cluster_has_room_for_are_an_error(
    runs: tuple[Path, Path], shards: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=r"--workers 3.*room for 2"):
        evaluate(runs[0], str(shards), workers=3, out=tmp_path)


def test_the_files_agree(report: Path) -> None:
    evaluation = json.loads((report / "evaluation.json").read_text())
    baseline, first, second = evaluation["models"]
    assert baseline["name"] == "copy source"
    assert [first["name"], second["name"]] == ["<first> & one", "second"]
    assert len(evaluation["protocols"]) == 1
    pairs = [(d["model"], d["reference"]) for d in evaluation["differences"]]
    assert pairs == [
        ("<first> & one", "copy source"),
        ("second", "copy source"),
        ("second", "<first> & one"),
    ]
    means = [model["mean_over_clips"]["l1"]["value"] for model in evaluation["models"]]
    got = evaluation["differences"][2]["mean_over_clips"]["l1"]
    assert got["value"] == pytest.approx(means[2] - means[1])
    assert got["low"] <= got["value"] <= got["high"]
    with (report / "frames.csv").open() as file:
        frames = [row for row in csv.DictReader(file) if row["model"] == "second"]
    assert len(frames) == 5 * 12
    mean = sum(float(row["l1"]) for row in frames) / len(frames)
    assert second["mean_over_frames"]["l1"]["value"] == pytest.approx(mean)
    with (report / "clips.csv").open() as file:
        clips = [row for row in csv.DictReader(file) if row["model"] == "second"]
    assert [float(row["psnr"]) for row in clips] == [c["values"]["psnr"] for c in second["clips"]]
    text = (report / "report.md").read_text()
    assert "as First Order Motion reports" in text
    assert "proxy, not LPIPS" in text
    assert next(iter(evaluation["protocols"])) in text


def test_scores_of_several_protocols_come_with_a_warning(
    runs: tuple[Path, Path], shards: Path, tmp_path: Path
) -> None:
    larger = random_run(tmp_path / "larger", "data.size=64")
    evaluation = evaluate(runs[1], str(shards), compare=[larger], workers=0, out=tmp_path / "out")
    assert len(evaluation.protocols) == 2
    assert any("not comparable" in warning for warning in evaluation.warnings)
    assert ("larger", "second") not in {(d.model, d.reference) for d in evaluation.differences}
    for name in ("report.md", "report.html"):
        text = (tmp_path / "out" / name).read_text()
        assert "not comparable" in text
        assert all(protocol in text for protocol in evaluation.protocols)


def test_another_split_has_another_protocol(
    runs: tuple[Path, Path], shards: Path, report: Path, tmp_path: Path
) -> None:
    other = evaluate(runs[1], str(shards), split="test", workers=0, out=tmp_path)
    known = json.loads((report / "evaluation.json").read_text())["protocols"]
    assert set(other.protocols).isdisjoint(known)


def test_a_checkpoint_replaced_at_the_same_path_is_loaded_again(
    runs: tuple[Path, Path], shards: Path, tmp_path: Path
) -> None:
    run = shutil.copytree(runs[0], tmp_path / "run")
    first = evaluate(run, shards, workers=0)
    shutil.rmtree(run)
    shutil.copytree(runs[1], run)
    second, expected = evaluate(run, shards, workers=0), evaluate(runs[1], shards, workers=0)
    assert second.runs[0].clips == expected.runs[0].clips != first.runs[0].clips


def test_a_clip_that_cannot_be_decoded_is_named_and_left_out_of_the_means(
    runs: tuple[Path, Path], shards_copy: Path, tmp_path: Path
) -> None:
    clip = clips_of(read_index(str(shards_copy)), "train")[0]
    with (shards_copy / clip.shard).open("r+b") as shard:
        shard.seek(clip.offset + 100)
        shard.write(b"\0" * 200)
    evaluation = evaluate(runs[1], str(shards_copy), split="train", workers=0, out=tmp_path)
    assert "checksum" in evaluation.skipped[clip.key]
    assert any("1 of 5 clips" in warning for warning in evaluation.warnings)
    assert evaluation.models[0].mean_over_clips["l1"].clips == 4
    assert clip.key in (tmp_path / "report.md").read_text()


@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("theme", ["light", "dark"])
def test_the_page_in_a_real_browser(report: Path, tmp_path: Path, width: int, theme: str) -> None:
    with chromium(tmp_path / "profile") as browser:
        for command, values in {
            "Emulation.setEmulatedMedia": {
                "features": [{"name": "prefers-color-scheme", "value": theme}]
            },
            "Emulation.setDeviceMetricsOverride": {
                "width": width,
                "height": 844,
                "deviceScaleFactor": 1,
                "mobile": width < 500,
            },
        }.items():
            browser.execute_cdp_cmd(command, values)
        browser.get((report / "report.html").as_uri())
        page: dict[str, Any] = browser.execute_async_script(_LOOK)
        severe = [e for e in browser.get_log("browser") if e["level"] in ("SEVERE", "WARNING")]
        requests = [_request(entry) for entry in browser.get_log("performance")]
        (tmp_path / "page.png").write_bytes(base64.b64decode(browser.get_screenshot_as_base64()))
    assert page["overflow"] <= 0, "the page scrolls sideways"
    assert severe == []
    own = ("data:", "file:", "chrome:")  # the last is the browser's own first tab
    assert [url for url in requests if url and not url.startswith(own)] == []
    assert page["videos"] == 2 * 5
    assert page["played"] == page["videos"]
    assert page["pictures"] == page["videos"]
    red, green, blue = map(int, re.findall(r"\d+", page["background"])[:3])
    assert (red + green + blue > 600) == (theme == "light")
    assert page["curves"] == 5
    assert page["heading"] == "Video reconstruction, split train"
    assert "<first> & one" in page["text"], "names are escaped"


_LOOK = """
const done = arguments[arguments.length - 1];
const videos = [...document.querySelectorAll("video")];
const started = video => new Promise(resolve => {
  video.addEventListener("timeupdate", () => { if (video.currentTime > 0) resolve(1); });
  video.addEventListener("error", () => resolve(0));
  video.play().catch(() => resolve(0));
});
Promise.all(videos.map(started)).then(played => done({
  overflow: document.documentElement.scrollWidth - document.documentElement.clientWidth,
  videos: videos.length,
  played: played.reduce((a, b) => a + b, 0),
  pictures: [...document.images].filter(image => image.naturalWidth > 0).length,
  background: getComputedStyle(document.body).backgroundColor,
  curves: document.querySelectorAll("svg").length,
  heading: document.querySelector("h1").textContent,
  text: document.body.textContent,
}));
"""


def _request(entry: dict[str, Any]) -> str:
    message = json.loads(entry["message"])["message"]
    if message["method"] != "Network.requestWillBeSent":
        return ""
    return str(message["params"]["request"]["url"])
