"""`prioritycut export` and `Animator.from_pretrained`, on small random networks."""

import json
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import numpy as np
import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from torch import nn

from prioritycut_ray import Animator, evaluate
from prioritycut_ray.config import load_config
from prioritycut_ray.data.puppets import render_clip
from prioritycut_ray.errors import UserError
from prioritycut_ray.inference.export import RelativeMotion, largest_difference
from prioritycut_ray.training.checkpoint import save_checkpoint
from prioritycut_ray.training.state import new_state
from tests.conftest import Prioritycut, assert_one_line
from tests.networks import spread_keypoints
from tests.places import ALONE, TINY, TINY_TPS

CPU = torch.device("cpu")
FRAMES = list(render_clip(3, size=48, frames=5).frames)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of random weights whose configuration contains private paths."""
    folder = tmp_path_factory.mktemp("runs") / "random"
    config = load_config(str(TINY), ["data.url=/secret/place", "storage=/secret/runs"])
    save_checkpoint(new_state(config, CPU), config, folder / "step_0000001")
    return folder


@pytest.fixture(scope="module")
def exported(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from prioritycut_ray.commands.export import export

    out = tmp_path_factory.mktemp("exported") / "model"
    export(run, out, graph=False, console=Console(quiet=True))
    return out


def animated(model: str | Path) -> np.ndarray:
    animator = Animator.from_pretrained(model, device="cpu")
    return np.stack(list(animator.animate(FRAMES[0], FRAMES)))


def test_an_export_animates_like_its_run(run: Path, exported: Path) -> None:
    names = sorted(path.name for path in exported.iterdir())
    assert names == ["README.md", "config.json", "model.safetensors"]
    frames = animated(run)
    assert frames.shape == (5, 32, 32, 3)
    assert (animated(exported) == frames).all()
    assert (animated(run / "step_0000001") == frames).all()
    weights = load_file(exported / "model.safetensors")
    assert {name.split(".")[0] for name in weights} == {"detector", "dense_motion", "generator"}


@pytest.fixture(scope="module")
def thin_plate_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of random weights of the thin-plate family."""
    config = load_config(str(TINY_TPS), ["model.background=false", *ALONE])
    state = new_state(config, CPU)
    spread_keypoints(state.ema.module)
    folder = tmp_path_factory.mktemp("runs") / "splines"
    save_checkpoint(state, config, folder / "step_0000001")
    return folder


def test_a_thin_plate_export_animates_like_its_run(
    thin_plate_run: Path, prioritycut: Prioritycut, tmp_path: Path
) -> None:
    result = prioritycut("export", str(thin_plate_run), "--out", "model")
    assert result.returncode == 0, result.stderr
    assert (animated(tmp_path / "model") == animated(thin_plate_run)).all()
    animator = Animator.from_pretrained(tmp_path / "model")
    absolute = list(animator.animate(FRAMES[0], FRAMES, relative=False))
    scaled = animator.animate(FRAMES[0], FRAMES, adapt_scale=True, initial=FRAMES[3])
    assert (absolute[2] != list(scaled)[2]).any()
    assert animator.best_frame(FRAMES[3], FRAMES) == 3
    card = (tmp_path / "model" / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: prioritycut_ray\n")
    assert "- thin-plate-spline-motion\n" in card
    assert "Thin-plate-spline-motion networks" in card
    assert "10 keypoints" in card
    assert "Discriminator: none; mixing: none." in card
    assert "irst-order" not in card


def test_an_export_contains_no_paths(exported: Path) -> None:
    for name in ("config.json", "README.md"):
        assert "secret" not in (exported / name).read_text()


def test_options_of_the_method_reach_the_network(exported: Path) -> None:
    animator = Animator.from_pretrained(exported)
    plain = list(animator.animate(FRAMES[0], FRAMES, initial=FRAMES[3]))
    absolute = list(animator.animate(FRAMES[0], FRAMES, relative=False))
    assert (plain[2] != absolute[2]).any()
    assert animator.best_frame(FRAMES[3], FRAMES) == 3


def test_the_card_without_an_evaluation_claims_nothing(exported: Path) -> None:
    card = (exported / "README.md").read_text()
    assert "Not trained by prioritycut_ray" in card
    assert "was not evaluated" in card
    assert "## Misuse" in card
    assert "a proxy, not VGG-19" in card
    assert "- first-order-motion\n" in card


def test_the_card_shows_scores_and_protocol_of_the_evaluation(
    run: Path, shards: Path, prioritycut: Prioritycut, tmp_path: Path
) -> None:
    copy = tmp_path / "run"
    (copy / "step_0000001").mkdir(parents=True)
    for file in (run / "step_0000001").iterdir():
        (copy / "step_0000001" / file.name).write_bytes(file.read_bytes())
    measured = evaluate(copy, str(shards), split="train", workers=0)
    result = prioritycut("export", str(copy), "--out", "model")
    assert result.returncode == 0, result.stderr
    card = (tmp_path / "model" / "README.md").read_text()
    ((protocol_hash, protocol),) = measured.protocols.items()
    assert protocol_hash in card
    assert f"`{protocol.data}`" in card
    assert "proxy, not LPIPS" in card
    value = measured.models[1].mean_over_clips["l1"].value
    assert f"| L1 ↓ | {value:.4f} [" in card
    assert "5 clips, 60 frames" in card


@pytest.mark.parametrize(
    ("fixture", "last"),
    [
        pytest.param("run", "generator.final", id="first_order"),
        pytest.param("thin_plate_run", "inpainting.final", id="thin_plate", marks=pytest.mark.slow),
    ],
)
def test_the_graph_equals_the_model(
    request: pytest.FixtureRequest,
    fixture: str,
    last: str,
    prioritycut: Prioritycut,
    tmp_path: Path,
) -> None:
    run = request.getfixturevalue(fixture)
    result = prioritycut("export", str(run), "--out", "model", "--torch-export")
    assert result.returncode == 0, result.stderr
    assert "animator.pt2 matches the model to within" in result.stdout
    program = torch.export.load(tmp_path / "model" / "animator.pt2")
    network = Animator.from_pretrained(run).network
    module = RelativeMotion(network).eval()
    assert largest_difference(program, module, 32) <= 1e-5
    still, frames = (torch.randint(256, (count, 3, 32, 32)) / 255 for count in (1, 4))
    with torch.no_grad():
        got = program.module()(still, frames[:1], frames)
    expected = Animator.from_pretrained(run).render(
        _uint8(still), _uint8(frames), relative=True, adapt_scale=False
    )
    prediction = next(expected).animation.prediction
    assert got.shape == prediction.shape
    torch.testing.assert_close(got, prediction, atol=1e-3, rtol=0)
    nn.init.zeros_(network.get_submodule(last).weight)
    assert largest_difference(program, module, 32) > 1e-3, "the comparison can fail"


def _uint8(images: torch.Tensor) -> Any:
    frames = (images * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    return frames[0] if len(frames) == 1 else list(frames)


def test_a_folder_in_use_is_refused(run: Path, prioritycut: Prioritycut, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "mine").write_text("keep")
    assert_one_line(prioritycut("export", str(run), "--out", "model"), "model", "in use")
    assert_one_line(prioritycut("export", "nothing", "--out", "other"), "nothing")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_damaged_export_is_an_error_that_names_the_file(exported: Path, tmp_path: Path) -> None:
    for name, damage, reason in (
        ("model.safetensors", b"damaged", "model.safetensors"),
        ("config.json", b"{", "not valid JSON"),
        ("config.json", b'{"model_type": "bert"}', "model_type"),
        ("config.json", b'{"model_type": "prioritycut", "sise": 1}', "sise"),
        ("config.json", b'{"model_type": "prioritycut"}', "do not match the model"),
    ):
        folder = tmp_path / f"{len(list(tmp_path.iterdir()))}"
        folder.mkdir()
        for file in exported.iterdir():
            (folder / file.name).write_bytes(file.read_bytes())
        (folder / name).write_bytes(damage)
        with pytest.raises(UserError, match=reason):
            Animator.from_pretrained(folder)


def test_a_model_of_the_hub_is_read_from_the_cache_offline(
    exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    commit = "0" * 40
    cache = tmp_path / "models--someone--puppets"
    (cache / "refs").mkdir(parents=True)
    (cache / "refs" / "main").write_text(commit)
    folder = cache / "snapshots" / commit
    folder.mkdir(parents=True)
    for file in exported.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    assert (animated("someone/puppets") == animated(exported)).all()
    with pytest.raises(UserError, match=r"someone/else: .*Hugging Face Hub.*folder of a run"):
        Animator.from_pretrained("someone/else")


def test_the_config_of_an_export_is_that_of_the_run(exported: Path) -> None:
    tree = json.loads((exported / "config.json").read_text())
    assert tree["model_type"] == "prioritycut"
    assert tree["data"]["size"] == 32
    assert Animator.from_pretrained(exported).config.model == load_config(str(TINY)).model
