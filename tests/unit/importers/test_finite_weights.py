"""NaN and infinite weights are rejected wherever weights are read or written."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from prioritycut_ray.config import Config, load_config
from prioritycut_ray.errors import NotFiniteError, UserError
from prioritycut_ray.importers.first_order import import_checkpoint
from prioritycut_ray.inference.export import export_graph
from prioritycut_ray.inference.pretrained import Animator
from prioritycut_ray.metrics.perceptual import perceptual_metric
from prioritycut_ray.models.perceptual import perceptual_features
from prioritycut_ray.retraining.registry import promote, read_current
from prioritycut_ray.runs.manifest import MANIFEST, seal
from prioritycut_ray.storage.folder import Folder
from prioritycut_ray.storage.lease import leased
from prioritycut_ray.training.checkpoint import (
    fork_checkpoint,
    load_checkpoint,
    save_checkpoint,
)
from prioritycut_ray.training.state import new_state
from prioritycut_ray.training.trainer import check_finite_end
from tests.conftest import TINY, Prioritycut, assert_one_line
from tests.unit.importers.test_first_order import GOLDEN

CPU = torch.device("cpu")
REFUSED = "NaN or infinite: "
BAD = pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])


def poison(file: Path, key: str, bad: float, dtype: torch.dtype = torch.float32) -> None:
    weights = load_file(file)
    weights[key] = weights[key].to(dtype)
    weights[key].view(-1)[-1] = bad
    save_file(weights, file)


@pytest.fixture
def run(tiny: Config, tmp_path: Path) -> Path:
    """A run with random weights."""
    save_checkpoint(new_state(tiny, CPU), tiny, tmp_path / "run" / "step_0000001")
    return tmp_path / "run"


def poisoned(run: Path, network: str, bad: float) -> Path:
    """Its checkpoint, as a version without these checks might have written it."""
    directory = run / "step_0000001"
    file = directory / f"{network}.safetensors"
    key = min(key for key in load_file(file) if "weight" in key)
    poison(file, key, bad)
    (directory / MANIFEST).unlink()
    seal(directory)
    return directory


@BAD
def test_they_are_not_imported(tmp_path: Path, bad: float) -> None:
    entries: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in load_file(GOLDEN).items():
        if key.startswith("weights/"):
            network, _, name = key.removeprefix("weights/").partition(".")
            entries.setdefault(network, {})[name] = tensor
    entries["generator"]["final.bias"][0] = bad
    torch.save(entries, tmp_path / "model.pth.tar")
    with pytest.raises(UserError, match=f"{REFUSED}generator.final.bias"):
        import_checkpoint(tmp_path / "model.pth.tar", tmp_path / "imported")
    assert not (tmp_path / "imported").exists()


@BAD
def test_they_do_not_animate(run: Path, bad: float) -> None:
    poisoned(run, "animator_ema", bad)
    with pytest.raises(UserError, match=f"animator_ema.safetensors: these weights are {REFUSED}"):
        Animator.from_pretrained(run)


def test_they_are_not_exported(run: Path, prioritycut: Prioritycut, tmp_path: Path) -> None:
    poisoned(run, "animator_ema", math.nan)
    result = prioritycut("export", str(run), "--out", str(tmp_path / "out"))
    assert_one_line(result, REFUSED, "animator_ema.safetensors")
    assert not (tmp_path / "out").exists()


def test_an_export_with_them_is_rejected(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    Animator.from_pretrained(run).save_pretrained(out)
    poison(out / "model.safetensors", "generator.final.bias", math.nan, torch.float16)
    with pytest.raises(UserError, match=f"{REFUSED}generator.final.bias"):
        Animator.from_pretrained(out)


@pytest.mark.parametrize("network", ["animator", "animator_ema", "discriminator"])
def test_training_does_not_resume_from_them(run: Path, tiny: Config, network: str) -> None:
    directory = poisoned(run, network, math.inf)
    with pytest.raises(UserError, match=f"{network}.safetensors: these weights are {REFUSED}"):
        load_checkpoint(new_state(tiny, CPU), directory)


@pytest.mark.parametrize("network", ["animator", "animator_ema", "discriminator"])
def test_they_are_neither_promoted_nor_copied(
    run: Path, tiny: Config, tmp_path: Path, network: str
) -> None:
    directory = poisoned(run, network, math.nan)
    with pytest.raises(UserError, match=REFUSED):
        fork_checkpoint(directory, tiny, str(tmp_path / "fork"))
    assert not list(tmp_path.glob("fork/step_*"))
    models = Folder(str(tmp_path / "models"))
    (tmp_path / "models" / "a").mkdir(parents=True)
    run.rename(tmp_path / "models" / "a" / "run")
    with leased(models, 60) as lease, pytest.raises(UserError, match=REFUSED):
        promote(models, lease, "a", "by hand")
    assert read_current(models) is None


@BAD
@pytest.mark.parametrize("network", ["animator", "animator_ema", "discriminator"])
def test_no_checkpoint_contains_them(
    tiny: Config, tmp_path: Path, network: str, bad: float
) -> None:
    state = new_state(tiny, CPU)
    module = {
        "animator": state.animator,
        "animator_ema": state.ema.module,
        "discriminator": state.discriminator,
    }[network]
    next(module.parameters()).data[0] = bad
    with pytest.raises(NotFiniteError, match=f"weights of the {network} are {REFUSED}"):
        save_checkpoint(state, tiny, tmp_path / "step_0000001")
    assert not list((tmp_path / "step_0000001").iterdir())


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_perceptual_networks_do_not_load_them(tmp_path: Path, suffix: str) -> None:
    file = tmp_path / f"weights{suffix}"
    weights = {"features.0.weight": torch.full((64, 3, 11, 11), math.nan)}
    if suffix == ".pth":
        torch.save(weights, file)
    else:
        save_file(weights, file)
    with pytest.raises(UserError, match=f"{REFUSED}features.0.weight"):
        perceptual_features(str(file))
    with pytest.raises(UserError, match=f"{REFUSED}features.0.weight"):
        perceptual_metric(str(file))


def test_finite_weights_that_give_no_picture_do_not_animate(run: Path, tmp_path: Path) -> None:
    """What a learning rate of 1e30 leaves: huge, but finite."""
    animator = Animator.from_pretrained(run, device="cpu")
    for parameter in animator.network.parameters():
        parameter.data.mul_(1e30)
    frames = [np.full((32, 32, 3), value, np.uint8) for value in (0, 255)]
    with pytest.raises(UserError, match="outputs NaN or infinite values"):
        list(animator.animate(frames[0], frames))
    with pytest.raises(UserError, match="outputs NaN or infinite values"):
        export_graph(animator.network, 32, tmp_path / "graph.pt2")


def test_a_training_that_ends_with_skipped_updates_says_so() -> None:
    state = new_state(load_config(str(TINY)), CPU)
    check_finite_end(state)
    state.skipped_in_a_row["discriminator"] = 2
    with pytest.raises(NotFiniteError, match=r"last losses are not finite.*2 of the discriminator"):
        check_finite_end(state)
