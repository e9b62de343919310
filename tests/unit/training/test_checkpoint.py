import json
import logging
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from prioritycut_ray.config import Config, load_config
from prioritycut_ray.errors import UserError
from prioritycut_ray.runs.locate import COPIES, find_checkpoint, local_copy, read_config
from prioritycut_ray.runs.manifest import seal, verify
from prioritycut_ray.storage.folder import Folder
from prioritycut_ray.training.checkpoint import (
    fork_checkpoint,
    load_animator,
    load_checkpoint,
    save_checkpoint,
)
from prioritycut_ray.training.state import TrainState, new_state
from tests.places import ALONE, TINY, TINY_TPS

CPU = torch.device("cpu")


def a_trained_state(config: Config) -> TrainState:
    """A state whose every part differs from a fresh one."""
    state = new_state(config, CPU)
    for module in state.networks():
        loss = torch.stack([p.square().sum() for p in module.parameters()]).sum()
        loss.backward()
    state.animator_optimizer.step()
    if state.discriminator_optimizer:
        state.discriminator_optimizer.step()
    stored = state.animator.state_dict()
    for name, buffer in state.animator.named_buffers():
        if name in stored:  # Others are constants.
            buffer += 1
    state.remember_buffers(state.animator)
    state.ema.update_parameters(state.animator)
    state.step, state.samples, state.skipped = 3, 12, 1
    return state


def tensors(state: TrainState) -> dict[str, torch.Tensor]:
    modules = {"a": state.animator, "e": state.ema, "d": state.discriminator}
    found = {f"{k}.{n}": t for k, m in modules.items() if m for n, t in m.state_dict().items()}
    for name, optimizer in (
        ("ao", state.animator_optimizer),
        ("do", state.discriminator_optimizer),
    ):
        if optimizer is None:
            continue
        for i, moments in optimizer.state_dict()["state"].items():
            found |= {f"{name}.{i}.{k}": v for k, v in moments.items()}
    return found


def good_buffers(state: TrainState) -> dict[str, list[torch.Tensor]]:
    """The batch statistics that are restored after a skipped update."""
    found = {}
    for name, module in zip(("animator", "discriminator"), state.networks(), strict=False):
        state.restore_buffers(module)
        found[name] = [buffer.clone() for buffer in module.buffers()]
    return found


@pytest.mark.parametrize(
    ("source", "words"),
    [(TINY, ()), (TINY, ALONE), (TINY_TPS, ("model.background=false",))],
    ids=["first order", "without a discriminator", "thin plate"],
)
def test_a_state_is_restored_bit_for_bit(
    tmp_path: Path, source: Path, words: tuple[str, ...]
) -> None:
    tiny = load_config(str(source), words)
    saved = a_trained_state(tiny)
    save_checkpoint(saved, tiny, tmp_path / "step_0000003")
    files = {path.stem for path in (tmp_path / "step_0000003").glob("*.safetensors")}
    assert files - {"discriminator"} == {"animator", "animator_ema"}
    assert ("discriminator" in files) == (tiny.discriminator.kind != "none")
    restored = new_state(tiny, CPU)
    load_checkpoint(restored, tmp_path / "step_0000003")
    expected, got = tensors(saved), tensors(restored)
    assert expected.keys() == got.keys()
    for name in expected:
        assert torch.equal(expected[name], got[name]), name
    assert (restored.step, restored.samples, restored.skipped) == (3, 12, 1)
    for name, buffers in good_buffers(saved).items():
        assert all(map(torch.equal, buffers, good_buffers(restored)[name])), name


def test_moments_are_restored_in_the_layout_of_their_parameters(
    tiny: Config, tmp_path: Path
) -> None:
    """Fused Adam iterates over both in memory order."""
    state = a_trained_state(tiny)
    save_checkpoint(state, tiny, tmp_path)
    restored = new_state(tiny, CPU)
    load_checkpoint(restored, tmp_path)
    for optimizer in (restored.animator_optimizer, restored.discriminator_optimizer):
        for parameter, moments in optimizer.state.items():
            assert moments["exp_avg"].stride() == parameter.stride()
            assert moments["exp_avg_sq"].stride() == parameter.stride()


def test_options_of_optimisers_are_those_of_the_configuration(tiny: Config, tmp_path: Path) -> None:
    """A fork may be trained with others than its origin."""
    save_checkpoint(a_trained_state(tiny), tiny, tmp_path)
    optim = tiny.optim.model_copy(update={"betas": (0.0, 0.9), "weight_decay": 0.25})
    restored = new_state(tiny.model_copy(update={"optim": optim}), CPU)
    load_checkpoint(restored, tmp_path)
    for optimizer in (restored.animator_optimizer, restored.discriminator_optimizer):
        assert len(optimizer.state) == sum(len(g["params"]) for g in optimizer.param_groups)
        for group in optimizer.param_groups:
            assert (group["betas"], group["weight_decay"]) == ((0.0, 0.9), 0.25)


def test_weights_and_config_are_readable_without_the_project(tiny: Config, tmp_path: Path) -> None:
    state = a_trained_state(tiny)
    save_checkpoint(state, tiny, tmp_path)
    weights = load_file(tmp_path / "animator.safetensors")
    assert torch.equal(weights["generator.final.bias"], state.animator.generator.final.bias)
    assert load_config(str(tmp_path / "config.yaml")) == tiny == read_config(tmp_path)


def test_the_averaged_weights_animate(tiny: Config, tmp_path: Path) -> None:
    state = a_trained_state(tiny)
    with torch.no_grad():
        state.animator.generator.final.bias += 5
    save_checkpoint(state, tiny, tmp_path)
    animator, config = load_animator(tmp_path, CPU)
    assert config == tiny
    assert not animator.training
    assert torch.equal(animator.generator.final.bias, state.ema.module.generator.final.bias)


@pytest.mark.parametrize("name", ["animator.safetensors", "optimizers.pt", "progress.json"])
@pytest.mark.parametrize("damage", ["truncate", "flip", "delete"])
def test_any_damage_is_detected_and_named(
    tiny: Config, tmp_path: Path, name: str, damage: str
) -> None:
    save_checkpoint(new_state(tiny, CPU), tiny, tmp_path)
    path = tmp_path / name
    content = path.read_bytes()
    if damage == "delete":
        path.unlink()
    elif damage == "truncate":
        path.write_bytes(content[: len(content) // 2])
    else:
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(UserError, match=name):
        verify(tmp_path)
    with pytest.raises(UserError):
        load_checkpoint(new_state(tiny, CPU), tmp_path)


def test_the_newest_intact_checkpoint_is_found(
    tiny: Config, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for step in (1, 2, 10):
        save_checkpoint(new_state(tiny, CPU), tiny, tmp_path / f"step_{step:07d}")
    assert find_checkpoint(tmp_path).name == "step_0000010"
    (tmp_path / "step_0000010" / "optimizers.pt").write_bytes(b"damaged")
    (tmp_path / "step_0000002" / "manifest.json").unlink()
    with caplog.at_level(logging.WARNING):
        assert find_checkpoint(tmp_path).name == "step_0000001"
    assert "optimizers.pt" in caplog.text
    assert find_checkpoint(tmp_path / "step_0000001").name == "step_0000001"


def test_a_folder_without_checkpoints_is_rejected(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="contains no checkpoint"):
        find_checkpoint(tmp_path)
    with pytest.raises(UserError, match="no such run"):
        find_checkpoint(tmp_path / "missing")


def test_weights_of_another_model_are_rejected(tiny: Config, tmp_path: Path) -> None:
    save_checkpoint(new_state(tiny, CPU), tiny, tmp_path)
    other = load_config(str(TINY), ["model.num_keypoints=5"])
    with pytest.raises(UserError, match="do not match the model"):
        load_checkpoint(new_state(other, CPU), tmp_path)


def test_weights_of_another_kind_are_rejected_on_one_line(tiny: Config, tmp_path: Path) -> None:
    alone = load_config(str(TINY), ALONE)
    splines = load_config(str(TINY_TPS), ["model.background=false"])
    save_checkpoint(new_state(tiny, CPU), tiny, tmp_path / "with")
    save_checkpoint(new_state(alone, CPU), alone, tmp_path / "without")
    for config, folder, reason in (
        (alone, "with", "was saved with a discriminator; set discriminator.kind"),
        (tiny, "without", "was saved without a discriminator; set discriminator.kind"),
        (splines, "with", "animator.safetensors: the weights do not match the model"),
    ):
        with pytest.raises(UserError, match=reason) as caught:
            load_checkpoint(new_state(config, CPU), tmp_path / folder)
        assert "\n" not in str(caught.value)
        assert len(str(caught.value)) < 1000


def test_a_fork_keeps_the_networks_of_its_source(tmp_path: Path) -> None:
    config = load_config(str(TINY), ALONE)
    saved = a_trained_state(config)
    save_checkpoint(saved, config, tmp_path / "old" / "step_0000003")
    new = load_config(str(TINY), [*ALONE, "optim.lr=1"])
    fork_checkpoint(tmp_path / "old" / "step_0000003", new, str(tmp_path / "new"))
    restored = new_state(new, CPU)
    load_checkpoint(restored, find_checkpoint(tmp_path / "new"))
    assert restored.discriminator is None
    assert all(torch.equal(tensors(saved)[k], v) for k, v in tensors(restored).items())


def test_a_pickle_with_code_is_not_executed(tiny: Config, tmp_path: Path) -> None:
    save_checkpoint(new_state(tiny, CPU), tiny, tmp_path)

    class Evil:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return (exec, (f"open({str(tmp_path / 'ran')!r}, 'w')",))

    torch.save({"animator": Evil()}, tmp_path / "optimizers.pt")
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    import hashlib

    manifest["optimizers.pt"] = hashlib.sha256(
        (tmp_path / "optimizers.pt").read_bytes()
    ).hexdigest()
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=r"optimizers\.pt"):
        load_checkpoint(new_state(tiny, CPU), tmp_path)
    assert not (tmp_path / "ran").exists()


def test_a_copy_of_a_checkpoint_is_a_checkpoint(tiny: Config, tmp_path: Path) -> None:
    save_checkpoint(new_state(tiny, CPU), tiny, tmp_path / "a")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    verify(tmp_path / "b")


def test_few_copies_of_remote_checkpoints_are_kept(tmp_path: Path) -> None:
    run = f"memory://{tmp_path.name}/run"
    storage, copies = Folder(run), []
    for step in range(COPIES + 2):
        (tmp_path / "made").mkdir(exist_ok=True)
        (tmp_path / "made" / "weights").write_text(str(step))
        seal(tmp_path / "made")
        storage.fs.put(f"{tmp_path}/made/", storage.path(f"step_{step:07d}/"), recursive=True)
        copies.append(find_checkpoint(run))
    assert [copy.exists() for copy in copies] == [False, False, *[True] * COPIES]
    assert local_copy(f"{run}/step_0000002") == copies[2], "used again, so it is kept longer"
    for step in (0, 1, COPIES + 1):
        again = local_copy(f"{run}/step_{step:07d}")
        assert (again / "weights").read_text() == str(step)
    assert [copy.exists() for copy in copies[2:]] == [True, *[False] * (COPIES - 2), True]
