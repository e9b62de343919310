"""The page of two runs of random weights, on synthetic clips: its limits, and a real browser."""

import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from PIL import Image
from selenium import webdriver
from selenium.webdriver.common.by import By

from prioritycut_ray.config import load_config
from prioritycut_ray.data.puppets import render_clip
from prioritycut_ray.errors import UserError
from prioritycut_ray.inference.footage import Limits
from prioritycut_ray.inference.pretrained import Animator
from prioritycut_ray.inference.scene import Motion
from prioritycut_ray.inference.uploads import animate_upload, driving_with_box, source_with_box
from prioritycut_ray.training.checkpoint import save_checkpoint
from prioritycut_ray.training.state import new_state
from prioritycut_ray.video.decoding import frames_upright
from prioritycut_ray.video.encoding import write_video
from tests.browser import chromium
from tests.conftest import Prioritycut, assert_one_line
from tests.places import ALONE, TINY, TINY_TPS

DEADLINE = 120.0
LIMITS = Limits(seconds=2.0, pixels=100_000)


class Inputs(NamedTuple):
    """Two runs, the second of the other family, not mixing; a picture; clips of 1 and 3 s."""

    runs: list[Path]
    picture: Path
    clip: Path
    long: Path


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    folder = tmp_path_factory.mktemp("app")
    runs = []
    for name, source, words in (
        ("mixed", TINY, ()),
        ("plain", TINY_TPS, ("model.background=false", *ALONE)),
    ):
        config = load_config(str(source), words)
        state = new_state(config, torch.device("cpu"))
        save_checkpoint(state, config, folder / name / "step_0000001")
        runs.append(folder / name)
    frames = list(render_clip(3, size=64, frames=30).frames)
    write_video(folder / "clip.mp4", frames[:10], 10)
    write_video(folder / "long.mp4", frames, 10)
    Image.fromarray(frames[0]).resize((120, 80)).save(folder / "me.png")
    return Inputs(runs, folder / "me.png", folder / "clip.mp4", folder / "long.mp4")


# ---------------------------------------------------------------------------------------------
# Without a server
# ---------------------------------------------------------------------------------------------


def test_every_model_makes_an_animation_and_a_panel(inputs: Inputs, tmp_path: Path) -> None:
    animators = {run.name: Animator.from_pretrained(run, device="cpu") for run in inputs.runs}
    reported: list[tuple[int, int, str]] = []
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "of the previous request").touch()
    made = animate_upload(
        animators,
        (inputs.picture, inputs.clip),
        ("none", "auto"),
        Motion(best_frame=True),
        tmp_path / "results",
        LIMITS,
        lambda done, total, name: reported.append((done, total, name)),
        pytest.fail,
    )
    assert reported == [(10, 10, "mixed"), (10, 10, "plain")]
    for result in made:
        assert [f.shape for f in frames_upright(result.animation)] == [(32, 32, 3)] * 10
        assert [f.shape for f in frames_upright(result.panel)] == [(64, 96, 3)] * 10
    assert sorted(path.name for path in (tmp_path / "results").iterdir()) == ["0", "1"]


def test_the_crop_is_drawn_where_it_is(inputs: Inputs) -> None:
    shown = source_with_box(inputs.picture, "auto", LIMITS)
    assert shown.shape == (80, 120, 3)
    assert tuple(shown[40, 20]) == tuple(shown[0, 60]) == (255, 90, 0)
    assert tuple(driving_with_box(inputs.clip, "8,8,40,40", LIMITS)[8, 20]) == (255, 90, 0)


def test_files_beyond_the_limits_are_refused(inputs: Inputs, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"long\.mp4: is longer than 2 s"):
        driving_with_box(inputs.long, "auto", LIMITS)
    with pytest.raises(UserError, match="megapixels"):
        source_with_box(inputs.picture, "auto", Limits(9.0, 1000))
    for clip, limits in ((inputs.long, LIMITS), (inputs.clip, Limits(9.0, 5000))):
        with pytest.raises(UserError, match=r"longer than|more than 0\.0 megapixels"):
            animate_upload(
                {},
                (inputs.picture, clip),
                ("auto", "auto"),
                Motion(),
                tmp_path / "results",
                limits,
                lambda *_: None,
                lambda _: None,
            )


def test_wrong_arguments_are_errors_of_one_line(prioritycut: Prioritycut, inputs: Inputs) -> None:
    assert_one_line(prioritycut("app", "nothing"), "nothing")
    assert_one_line(prioritycut("app", "a", "b", "c"), "two models")


# ---------------------------------------------------------------------------------------------
# The server, and a browser
# ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def url(inputs: Inputs, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of the real command; it stops on SIGTERM and leaves no temporary file."""
    pytest.importorskip("gradio", reason="needs the extra app")
    folder = tmp_path_factory.mktemp("server")
    command = [sys.executable, "-c", "from prioritycut_ray.cli import main; main()", "app"]
    words = [*map(str, inputs.runs), "--max-megabytes=1", "--max-seconds=2"]
    with (folder / "log").open("w") as log:
        server = subprocess.Popen(
            [*command, *words],
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**os.environ, "TMPDIR": str(folder), "NO_PROXY": "*", "no_proxy": "*"},
            start_new_session=True,
        )
    try:
        yield _wait(lambda: _address(folder / "log", server), "no page")
        os.killpg(server.pid, signal.SIGTERM)
        server.wait(timeout=DEADLINE)
        assert list(folder.glob("prioritycut-app-*")) == []
    finally:
        if server.poll() is None:
            os.killpg(server.pid, signal.SIGKILL)
            server.wait()


def _address(log: Path, server: subprocess.Popen[bytes]) -> str | None:
    assert server.poll() is None, log.read_text()
    found = re.search(r"Page: (http://127\.0\.0\.1:\d+)", log.read_text())
    return found[1] if found else None


def _wait(condition: Callable[[], Any], complaint: str) -> Any:
    end = time.monotonic() + DEADLINE
    while time.monotonic() < end:
        if found := condition():
            return found
        time.sleep(0.2)
    raise AssertionError(complaint)


def _status(request: str | urllib.request.Request) -> int:
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code


def _call(url: str, verb: str, *data: object) -> str:
    """Call the API of the page and return the response."""
    body = json.dumps({"data": data}).encode()
    kind = {"Content-Type": "application/json"}
    request = urllib.request.Request(f"{url}/gradio_api/call/{verb}", body, kind)
    with urllib.request.urlopen(request, timeout=30) as answer:
        event = json.load(answer)["event_id"]
    with urllib.request.urlopen(f"{url}/gradio_api/call/{verb}/{event}", timeout=60) as answer:
        return str(answer.read().decode())


def test_no_file_outside_its_folder_can_be_read(url: str, inputs: Inputs) -> None:
    config = inputs.runs[0] / "step_0000001" / "config.yaml"
    for path in ("/etc/passwd", str(config), "pyproject.toml", "/tmp/../etc/passwd"):
        assert _status(f"{url}/gradio_api/file={path}") == 403, path
    for path in (str(inputs.picture), "/etc/passwd"):
        for file in ({"path": path}, {"path": "x", "url": f"file://{path}"}):
            file["meta"] = {"_type": "gradio.FileData"}
            assert "event: error" in _call(url, "shown", file, "auto"), file


def test_a_large_upload_is_refused(url: str) -> None:
    part = b'--x\r\nContent-Disposition: form-data; name="files"; filename="a.mp4"\r\n\r\n'
    body = part + bytes(1_500_000) + b"\r\n--x--\r\n"
    kind = {"Content-Type": "multipart/form-data; boundary=x"}
    assert _status(urllib.request.Request(f"{url}/gradio_api/upload", body, kind)) == 413


def test_a_user_uploads_files_sees_crops_and_compares_two_models(
    url: str, inputs: Inputs, tmp_path: Path
) -> None:
    (tmp_path / "page.mp4").write_text("<html>not found</html>")
    with chromium(tmp_path / "profile") as browser:
        browser.set_window_size(1280, 1600)
        browser.get(url)
        _drop(browser, "driving", tmp_path / "page.mp4")
        _wait(lambda: "page.mp4: is not a video" in _text(browser), "no complaint about a bad file")
        assert "/uploads/" not in _text(browser)
        browser.get(url)
        _drop(browser, "source", inputs.picture)
        _drop(browser, "driving", inputs.clip)
        for name, width in (("source", 120), ("driving", 64)):
            _wait(lambda n=name: _width_of(browser, n), f"no crop of the {name}")
            assert _width_of(browser, name) == width
        _wait(lambda: browser.find_elements(By.ID, "animate"), "no button")
        browser.find_element(By.ID, "animate").click()
        sizes = _wait(lambda: _videos(browser), "no videos")
        severe = [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]
        requests = [_request(entry) for entry in browser.get_log("performance")]
        browser.save_screenshot(str(tmp_path / "page.png"))
        browser.set_window_size(500, 1000)
        overflow = browser.execute_script(
            "return document.documentElement.scrollWidth - document.documentElement.clientWidth"
        )
        browser.save_screenshot(str(tmp_path / "narrow.png"))
    assert sizes == [[32, 32], [96, 64], [32, 32], [96, 64]]
    assert overflow <= 0, "the page scrolls sideways"
    assert severe == []
    own = (url, "data:", "blob:", "chrome:", "about:")
    assert [address for address in requests if address and not address.startswith(own)] == []


def _drop(browser: webdriver.Chrome, name: str, path: Path) -> None:
    field = f"#{name} input[type=file]"
    _wait(lambda: browser.find_elements(By.CSS_SELECTOR, field), f"no field for the {name}")
    browser.find_element(By.CSS_SELECTOR, field).send_keys(str(path))


def _text(browser: webdriver.Chrome) -> str:
    return str(browser.execute_script("return document.body.innerText"))


def _width_of(browser: webdriver.Chrome, name: str) -> int:
    script = (
        "const image = document.querySelector(arguments[0]); return image && image.naturalWidth"
    )
    return int(browser.execute_script(script, f"#{name}-crop img") or 0)


def _videos(browser: webdriver.Chrome) -> list[list[int]] | None:
    script = (
        "return [...document.querySelectorAll('video')].filter(v => v.readyState >= 1)"
        ".map(v => [v.videoWidth, v.videoHeight])"
    )
    found: list[list[int]] = browser.execute_script(script)
    return found if len(found) == 4 else None


def _request(entry: dict[str, Any]) -> str:
    message = json.loads(entry["message"])["message"]
    if message["method"] != "Network.requestWillBeSent":
        return ""
    return str(message["params"]["request"]["url"])
