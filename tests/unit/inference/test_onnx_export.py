"""`prioritycut export --onnx`: ONNX Runtime against torch, with random weights at 64x64."""

import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import nn

from prioritycut_ray import Animator
from prioritycut_ray.config import load_config
from prioritycut_ray.data.puppets import render_clip
from prioritycut_ray.errors import UserError
from prioritycut_ray.inference import onnx_export
from prioritycut_ray.inference.export import in_planes
from prioritycut_ray.inference.onnx_export import OPSET, require_onnx
from prioritycut_ray.models.animator import Animator as Network
from prioritycut_ray.training.checkpoint import save_checkpoint
from prioritycut_ray.training.state import new_state
from tests.conftest import Prioritycut
from tests.networks import spread_keypoints
from tests.places import ALONE, FAMILIES, ROOT

SIZE = 64
SNIPPET = next(
    block
    for block in re.findall(
        r"^```python\n(.*?)^```$", (ROOT / "docs" / "animation.md").read_text(), re.M | re.S
    )
    if "onnxruntime" in block
)


def saved(family: str, folder: Path) -> Path:
    """A run of random weights."""
    words = ["model.background=false"] * (family == "thin_plate")
    config = load_config(str(FAMILIES[family]), [f"data.size={SIZE}", *words, *ALONE])
    state = new_state(config, torch.device("cpu"))
    spread_keypoints(state.ema.module)
    save_checkpoint(state, config, folder / "step_0000001")
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_the_graphs_equal_the_model_and_the_documented_program_runs_them(
    family: str, prioritycut: Prioritycut, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = saved(family, tmp_path / "run")
    result = prioritycut("export", str(run), "--out", "model", "--onnx")
    assert result.returncode == 0, result.stderr
    assert "detector.onnx and renderer.onnx match the model to within" in result.stdout
    assert_graphs_are_portable(tmp_path / "model", has_jacobians=family == "first_order")

    monkeypatch.chdir(tmp_path)
    frames = render_clip(3, size=SIZE, frames=19).frames
    picture, shown = render_clip(7, size=SIZE, frames=1).frames[0], []
    exec(SNIPPET, {"picture": picture, "frames": frames, "show": shown.append})
    assert [len(batch) for batch in shown] == [16, 3], "any number of driving frames"
    expected = list(Animator.from_pretrained(run, device="cpu").animate(picture, frames))
    got = np.concatenate(shown)
    assert np.abs(got.astype(int) - expected).max() <= 1
    assert (got[0] != got[10]).any(), "something moves"


def assert_graphs_are_portable(folder: Path, *, has_jacobians: bool) -> None:
    """Nothing but standard operators, and all weights inside; the card names what goes in."""
    names = ["value", "jacobian"][: 1 + has_jacobians]
    card = (folder / "README.md").read_text()
    for name, inputs, outputs in (
        ("detector.onnx", ["frames"], names),
        (
            "renderer.onnx",
            ["source", *(f"{o}_{n}" for o in ("source", "initial", "driving") for n in names)],
            ["pictures"],
        ),
    ):
        graph = onnx.load(str(folder / name), load_external_data=False)
        onnx.checker.check_model(graph, full_check=True)
        assert [(each.domain, each.version) for each in graph.opset_import] == [("", OPSET)]
        assert not graph.functions
        session = onnxruntime.InferenceSession(folder / name)
        for role, values in (("input", session.get_inputs()), ("output", session.get_outputs())):
            assert [each.name for each in values] == (inputs if role == "input" else outputs)
            for each in values:
                shape = ["B" if isinstance(side, str) else side for side in each.shape]
                is_batch = each.name.startswith(("driving", "frames", *outputs))
                assert shape[0] == ("B" if is_batch else 1)
                assert f"| `{name}` | {role} `{each.name}` | `{shape}` |".replace("'", "") in card
    assert sorted(path.name for path in folder.iterdir()) == [
        *("README.md", "config.json", "detector.onnx", "model.safetensors", "renderer.onnx")
    ]


@pytest.mark.slow
def test_absolute_motion_takes_the_source_as_the_initial_frame(tmp_path: Path) -> None:
    animator = Animator.from_pretrained(saved("first_order", tmp_path / "run"), device="cpu")
    onnx_export.export_onnx(animator.network, SIZE, tmp_path)
    detector, renderer = (
        onnxruntime.InferenceSession(tmp_path / f"{name}.onnx") for name in ("detector", "renderer")
    )
    clip = render_clip(3, size=SIZE, frames=4).frames
    planes = np.moveaxis(np.float32(clip) / 255, 3, 1)

    def keypoints(role: str, frames: np.ndarray) -> dict[str, Any]:
        value, jacobian = detector.run(None, {"frames": frames})
        return {f"{role}_value": value, f"{role}_jacobian": jacobian}

    inputs = {"source": planes[:1], **keypoints("driving", planes[1:])}
    for role in ("source", "initial"):
        inputs |= keypoints(role, planes[:1])
    (pictures,) = renderer.run(None, inputs)
    expected = list(animator.animate(clip[0], clip[1:], relative=False))
    assert np.abs(np.moveaxis(pictures, 1, 3) * 255 - expected).max() <= 1


@pytest.mark.slow
def test_graphs_that_differ_from_the_model_are_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def changed(network: Network) -> Network:
        planes = in_planes(network)
        nn.init.zeros_(planes.get_submodule("generator.final").weight)
        return planes

    animator = Animator.from_pretrained(saved("first_order", tmp_path / "run"), device="cpu")
    monkeypatch.setattr(onnx_export, "in_planes", changed)
    with pytest.raises(UserError, match=r"ONNX graphs differ from the model by .*--onnx"):
        onnx_export.export_onnx(animator.network, SIZE, tmp_path)


@pytest.mark.parametrize("missing", ["onnx", "onnxruntime", "onnxscript"])
def test_without_the_extra_the_error_names_it(
    missing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    require_onnx()
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(UserError, match=rf"requires {missing}: .*'prioritycut_ray\[onnx\]'"):
        require_onnx()
