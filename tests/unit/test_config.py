import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from prioritycut_ray.config import (
    Config,
    ThinPlateConfig,
    as_words,
    dump_config,
    load_config,
    load_section,
    shipped_configs,
)
from prioritycut_ray.errors import UserError
from prioritycut_ray.retraining.settings import RetrainSettings
from prioritycut_ray.storage.paths import resolved
from tests.places import TINY_TPS


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


def test_overrides_change_values_at_any_depth(minimal: str) -> None:
    config = load_config(
        minimal, ["optim.lr=1e-4", "model.detector.num_blocks=4", "optim.milestones=[10, 20]"]
    )
    assert config.optim.lr == 1e-4
    assert config.model.detector.num_blocks == 4
    assert config.optim.milestones == (10, 20)


def test_null_disables_mixing_and_one_override_enables_it_again(minimal: str) -> None:
    off = load_config(minimal, ["priority_cut=null"])
    assert off.priority_cut is None
    on = load_config(minimal, ["priority_cut=null", "priority_cut.mask=cutmix"])
    assert on.priority_cut is not None
    assert on.priority_cut.mask == "cutmix"


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
        ("discriminator.kind=none", ["discriminator.kind=unet or priority_cut=null"]),
        ("model.family=splines", ["model.family='splines'", "'first_order', 'thin_plate'"]),
        ("model.num_splines=3", ["a key of model.family=thin_plate", "'model.num_keypoints'"]),
        ("loss.perceptual.scales=[1, 0.03125]", ["VGG-19", "scales"]),
        ("name=../escape", ["name"]),
        ("optim", ["dotted.key=value"]),
        ("optim.lr=[", ["not valid YAML"]),
    ],
)
def test_a_wrong_override_is_one_line_with_the_key_and_the_fix(
    minimal: str, word: str, fragments: list[str]
) -> None:
    with pytest.raises(UserError) as caught:
        load_config(minimal, [word])
    message = str(caught.value)
    assert "\n" not in message
    for fragment in fragments:
        assert fragment in message


@pytest.mark.parametrize(
    ("word", "fragments"),
    [
        ("model.num_keypoints=3", ["model.family=first_order", "did you mean 'model.num_splines'"]),
        ("model.generator.max_features=8", ["model.family=first_order", "num_splines, resnet_ch"]),
        ("model.dense_motion.num_block=3", ["did you mean 'model.dense_motion.num_blocks'"]),
        ("model.dense_motion.scale_factor=0.3", ["scale_factor=0.3 must be 1, 0.5, 0.25 or"]),
        ("model.dense_motion.num_blocks=2", ["num_blocks=2 must be at least 3"]),
        ("data.size=160", ["num_blocks=32"]),
        ("model.motion_dropout.peak=1", ["model.motion_dropout.peak=1", "less than 1"]),
        ("discriminator.kind=none", ["discriminator.kind=unet or priority_cut=null"]),
    ],
)
def test_a_wrong_override_of_the_thin_plate_family_names_the_key_and_the_fix(
    word: str, fragments: list[str]
) -> None:
    words = ["model.dense_motion.scale_factor=0.5", "model.dense_motion.num_blocks=3"]
    words += ["model.dense_motion.num_blocks=5"] if word.startswith("data") else []
    with pytest.raises(UserError) as caught:
        load_config(str(TINY_TPS), [*words, word])
    message = str(caught.value)
    assert "\n" not in message
    for fragment in fragments:
        assert fragment in message


def test_one_override_turns_the_discriminator_off(minimal: str) -> None:
    config = load_config(minimal, ["discriminator.kind=none", "priority_cut=null"])
    assert load_config(minimal, as_words(config.model_dump(mode="json"))) == config


def test_a_configuration_of_either_family_reads_back(tmp_path: Path) -> None:
    config = load_config(str(TINY_TPS))
    path = tmp_path / "dumped.yaml"
    path.write_text(dump_config(config))
    assert load_config(str(path)) == config
    assert isinstance(config.model, ThinPlateConfig)
    assert config.model.num_keypoints == 5 * config.model.num_splines


@pytest.mark.parametrize(
    ("content", "fragment"),
    [("a: [", "not valid YAML"), ("- 1\n- 2\n", "mapping"), ("", "mapping")],
)
def test_a_file_that_is_not_a_configuration_is_named(
    tmp_path: Path, content: str, fragment: str
) -> None:
    path = tmp_path / "broken.yaml"
    path.write_text(content)
    with pytest.raises(UserError, match=fragment) as caught:
        load_config(str(path))
    assert str(path) in str(caught.value)


def test_values_survive_the_way_through_overrides(minimal: str) -> None:
    values = {
        "storage": "a b/\U0001f600/ü/\x7f\x85\u2028\ufeff'\"\\\n\t: #x",
        "data.url": "1e6",
        "optim.betas": [0.5, 1e-5],
        "priority_cut": None,
        "data.augment": {"hue": 0.0, "time_flip": False},
    }
    config = load_config(minimal, as_words(values))
    assert (config.storage, config.data.url) == (values["storage"], "1e6")
    assert config.optim.betas == (0.5, 1e-5)
    assert config.priority_cut is None
    assert config.data.augment.time_flip is False


@pytest.mark.parametrize(
    ("content", "word"),
    [
        ("train: {samples: 1e6}", "train.samples=1e6"),
        ("train: {samples: 1.0e+6}", "train.samples=1E6"),
        ("train: {samples: '1000000'}", "train.samples='1000000'"),
    ],
)
def test_numbers_with_exponents_may_be_integers(
    tmp_path: Path, minimal: str, content: str, word: str
) -> None:
    path = tmp_path / "numbers.yaml"
    path.write_text(content)
    for config in (load_config(str(path)), load_config(minimal, [word])):
        assert config.train.samples == 1_000_000
        assert type(config.train.samples) is int


def test_numbers_with_exponents_in_lists_may_be_integers(tmp_path: Path, minimal: str) -> None:
    path = tmp_path / "lists.yaml"
    path.write_text("optim: {milestones: [6e6, 9e6], betas: [5e-1, 9e-1]}")
    words = ["optim.milestones=[6e6, 9e6]", "optim.betas=[5e-1, 9e-1]"]
    for config in (load_config(str(path)), load_config(minimal, words)):
        assert config.optim.milestones == (6_000_000, 9_000_000)
        assert config.optim.betas == (0.5, 0.9)


@pytest.mark.parametrize(
    "name", ["20261129", "007", "yes", "No", "off", "2026-11-29", "1.10", "1e6", "0x10", "1_000"]
)
def test_a_name_that_looks_like_another_type_stays_a_name(
    tmp_path: Path, minimal: str, name: str
) -> None:
    path = tmp_path / "named.yaml"
    path.write_text(f"name: {name}\ndata: {{split: {name}}}\n")
    for config in (load_config(str(path)), load_config(minimal, [f"name={name}"])):
        assert config.name == name
        dumped = tmp_path / "dumped.yaml"
        dumped.write_text(dump_config(config))
        assert load_config(str(dumped)) == config
    assert load_config(str(path)).data.split == name


@pytest.mark.parametrize(
    ("word", "fragments"),
    [
        ("name=true", ["boolean", "quote it"]),
        ("name=", ["quote it"]),
        ("storage=~", ["~", "quote it"]),
        ("name=12:30", ["name='12:30'", "letters, digits"]),
        ("train.workers=auto", ["train.workers='auto'", "A..B"]),
        ("train.workers=-1", ["train.workers=-1", "A..B"]),
        ("train.workers=true", ["train.workers=True", "boolean"]),
        ("train.workers=0..2", ["train.workers='0..2'", "A..B"]),
        ("train.samples=1.5", ["train.samples=1.5", "must be a whole number"]),
        ("train.samples=1e6x", ["must be a whole number"]),
        ("priority_cut=false", ["priority_cut", "null to disable it"]),
        ("priority_cut=off", ["priority_cut", "null to disable it"]),
        ("model=7", ["model", "set its keys"]),
        ("model.detector.num_blocks=99999999999999999999", ["num_blocks", "16"]),
        ("train={samples: 5, samples: 6}", ["'samples' is given twice"]),
    ],
)
def test_the_message_says_how_to_write_the_value(
    minimal: str, word: str, fragments: list[str]
) -> None:
    with pytest.raises(UserError) as caught:
        load_config(minimal, [word])
    message = str(caught.value)
    for fragment in fragments:
        assert fragment in message
    for inside in ("constrained", "valid dictionary", "function-", "PriorityCutConfig", "\n"):
        assert inside not in message


def test_a_duplicate_section_is_rejected_with_both_lines(tmp_path: Path) -> None:
    path = tmp_path / "twice.yaml"
    path.write_text("train: {samples: 5}\ndata: {}\ntrain: {batch_size: 4}\n")
    with pytest.raises(UserError, match=r"twice.yaml: .*'train'.* on line 1 and on line 3"):
        load_config(str(path))


PLACES = ("storage", "data.url", "data.index", "data.cache_dir", "loss.perceptual.weights")


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("~/x", "/home/me/x"),
        ("~", "/home/me"),
        ("$SCRATCH/x", "/scratch/me/x"),
        ("${SCRATCH}/$USER-x", "/scratch/me/me-x"),
        ("s3://$BUCKET/x", "s3://mine/x"),
        ("/a/~/x", "/a/~/x"),
        ("x$", "x$"),
        ("$NOT_SET/x", "$NOT_SET/x"),
    ],
)
def test_paths_are_expanded_as_by_a_shell(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, minimal: str, written: str, meant: str
) -> None:
    for name, value in [("HOME", "/home/me"), ("SCRATCH", "/scratch/me"), ("USER", "me")]:
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("BUCKET", "mine")
    monkeypatch.delenv("NOT_SET", raising=False)
    tree: dict[str, Any] = {}
    for place in PLACES:
        section = tree
        *parents, leaf = place.split(".")
        for parent in parents:
            section = section.setdefault(parent, {})
        section[leaf] = written
    path = tmp_path / "places.yaml"
    path.write_text(yaml.safe_dump(tree))
    words = [f"{place}='{written}'" for place in PLACES]
    for config in (load_config(str(path)), load_config(minimal, words)):
        found = [config.storage, config.data.url, config.data.index, config.data.cache_dir]
        assert [*found, config.loss.perceptual.weights] == [meant] * len(PLACES)


def test_a_path_that_cannot_be_expanded_is_rejected_when_it_is_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("NOT_SET", raising=False)
    with pytest.raises(UserError, match="the environment variable NOT_SET is not set"):
        resolved("$NOT_SET/runs")
    with pytest.raises(UserError, match="NOT_SET is not set"):
        resolved("s3://bucket/${NOT_SET}/runs")
    with pytest.raises(UserError, match="the user ~nobody-of-this-name has no home folder"):
        resolved("~nobody-of-this-name/runs")
    (tmp_path / "a$NOT_SET").mkdir()
    assert resolved("a$NOT_SET") == str(tmp_path / "a$NOT_SET"), "it is called so"
    (tmp_path / "~").mkdir()
    monkeypatch.setenv("HOME", "/home/me")
    assert resolved("~/runs") == "/home/me/runs"
    settings = load_section(RetrainSettings, None, ["data='~/data'", "budget=1e3"])
    assert (settings.data, settings.budget) == ("/home/me/data", 1000)


def test_a_missing_file_lists_the_shipped_configs() -> None:
    with pytest.raises(UserError, match="quickstart"):
        load_config("nowhere.yaml")


def test_the_configuration_is_immutable(minimal: str) -> None:
    config = load_config(minimal)
    with pytest.raises(ValidationError, match="frozen"):
        config.name = "other"  # type: ignore[misc]


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
