import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from pydantic import ValidationError

from prioritycut_ray.config import (
    Config,
    changed_keys,
    dump_config,
    load_config,
    shipped_configs,
)
from prioritycut_ray.errors import UserError


@pytest.fixture
def minimal(tmp_path: Path) -> str:
    path = tmp_path / "minimal.yaml"
    path.write_text("name: minimal\n")
    return str(path)


def test_defaults_are_the_published_sizes(minimal: str) -> None:
    config = load_config(minimal)
    assert config.model.num_keypoints == 10
    assert config.model.detector.model_dump() == {
        "block_expansion": 32,
        "max_features": 1024,
        "num_blocks": 5,
        "scale_factor": 0.25,
        "temperature": 0.1,
        "single_jacobian_map": False,
    }
    assert config.model.dense_motion.block_expansion == 64
    assert config.model.generator.max_features == 512
    assert config.optim.lr == 2e-4
    assert config.optim.betas == (0.5, 0.999)


@pytest.mark.parametrize("name", shipped_configs())
def test_every_shipped_config_is_valid(name: str) -> None:
    assert isinstance(load_config(name), Config)


def test_overrides_change_values_of_any_depth(minimal: str) -> None:
    config = load_config(
        minimal, ["optim.lr=1e-4", "model.detector.num_blocks=4", "optim.milestones=[10, 20]"]
    )
    assert config.optim.lr == 1e-4
    assert config.model.detector.num_blocks == 4
    assert config.optim.milestones == (10, 20)


def test_null_switches_mixing_off_and_one_word_switches_it_back_on(minimal: str) -> None:
    off = load_config(minimal, ["priority_cut=null"])
    assert off.priority_cut is None
    on = load_config(minimal, ["priority_cut=null", "priority_cut.mask=cutmix"])
    assert on.priority_cut is not None
    assert on.priority_cut.mask == "cutmix"


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ("baseline", ["priority_cut=null", "discriminator.kind=patch"]),
        ("+ U-Net", ["priority_cut=null"]),
        ("+ CutMix", ["priority_cut.mask=cutmix"]),
        ("+ PriorityCut", []),
    ],
)
def test_each_row_of_the_ablation_is_one_word_from_its_neighbour(
    minimal: str, row: str, words: list[str]
) -> None:
    assert load_config(minimal, words)


def test_the_dump_reads_back_as_the_same_config(minimal: str, tmp_path: Path) -> None:
    config = load_config(minimal, ["priority_cut=null", "optim.lr=1e-5", "train.workers=4"])
    path = tmp_path / "dumped.yaml"
    path.write_text(dump_config(config))
    assert load_config(str(path)) == config


@pytest.mark.parametrize(
    ("word", "fragments"),
    [
        ("priority_cut.topk=3", ["'priority_cut.topk'", "did you mean 'priority_cut.top_k'"]),
        ("modle.x=1", ["'modle'", "did you mean 'model'"]),
        ("model.detector.num_block=3", ["did you mean 'model.detector.num_blocks'"]),
        ("train.batch_size=many", ["train.batch_size", "'many'"]),
        ("priority_cut.top_k=101", ["priority_cut.top_k", "100"]),
        ("optim.lr=.nan", ["optim.lr", "finite"]),
        ("data.size=100", ["data.size", "multiple of 32"]),
        ("data.size=96", ["data.size=96", "num_blocks"]),
        ("train.workers=7", ["train.batch_size=40", "7"]),
        ("discriminator.kind=patch", ["priority_cut=null"]),
        ("loss.perceptual.scales=[1, 0.03125]", ["VGG-19", "scales"]),
        ("name=../escape", ["name"]),
        ("optim", ["dotted.key=value"]),
        ("optim.lr=[", ["not valid YAML"]),
    ],
)
def test_a_wrong_override_is_one_line_that_names_key_and_way_out(
    minimal: str, word: str, fragments: list[str]
) -> None:
    with pytest.raises(UserError) as caught:
        load_config(minimal, [word])
    message = str(caught.value)
    assert "\n" not in message
    for fragment in fragments:
        assert fragment in message


@pytest.mark.parametrize(
    ("content", "fragment"),
    [("a: [", "not valid YAML"), ("- 1\n- 2\n", "mapping"), ("", "mapping")],
)
def test_a_file_that_is_no_config_is_named(tmp_path: Path, content: str, fragment: str) -> None:
    path = tmp_path / "broken.yaml"
    path.write_text(content)
    with pytest.raises(UserError, match=fragment) as caught:
        load_config(str(path))
    assert str(path) in str(caught.value)


def test_a_missing_file_lists_the_shipped_configs() -> None:
    with pytest.raises(UserError, match="quickstart"):
        load_config("nowhere.yaml")


def test_the_tree_is_frozen(minimal: str) -> None:
    config = load_config(minimal)
    with pytest.raises(ValidationError, match="frozen"):
        config.name = "other"  # type: ignore[misc]


def test_changed_keys_are_dotted(minimal: str) -> None:
    old, new = load_config(minimal), load_config(minimal, ["optim.lr=1", "priority_cut=null"])
    changed = changed_keys(old.model_dump(mode="json"), new.model_dump(mode="json"))
    assert "optim.lr" in changed
    assert "priority_cut.top_k" in changed
    assert "name" not in changed


def test_config_and_command_line_import_neither_torch_nor_ray() -> None:
    code = (
        "import sys, prioritycut_ray.config, prioritycut_ray.cli;"
        "print([m for m in ('torch', 'ray', 'av', 'decord') if m in sys.modules])"
    )
    output = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout
    assert output.strip() == "[]"


def test_dumped_config_is_plain_yaml(minimal: str) -> None:
    assert yaml.safe_load(dump_config(load_config(minimal)))["name"] == "minimal"
