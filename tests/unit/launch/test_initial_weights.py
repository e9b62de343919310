"""``init``: runs that start from the weights of other models."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from prioritycut_ray.config import Config, load_config, with_absolute_paths
from prioritycut_ray.errors import UserError
from prioritycut_ray.launch.in_process import train_in_process
from prioritycut_ray.launch.initial_weights import short_name, write_initial_weights
from prioritycut_ray.networks import build_animator, build_discriminator
from prioritycut_ray.runs.attempts import claim_run
from prioritycut_ray.runs.locate import find_checkpoint, read_progress
from prioritycut_ray.storage.folder import Folder
from tests.clip_sets import write_set
from tests.conftest import Prioritycut, assert_one_line
from tests.places import TINY

SCALES = ["model.detector.scale_factor=0.25", "model.dense_motion.scale_factor=0.25"]
AT_64 = ["data.size=64", *SCALES]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_set(str(tmp_path_factory.mktemp("data")))


def configured(data: str, storage: Path, *words: str) -> Config:
    places = [f"data.url={data}", f"storage={storage}", "train.workers=0"]
    return with_absolute_paths(load_config(str(TINY), [*places, *words]))


@pytest.fixture(scope="module")
def source(data: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two steps."""
    config = configured(data, tmp_path_factory.mktemp("source"), "train.samples=8", "name=old")
    return Path(train_in_process(config, lambda metrics: None, print))


def begin(config: Config) -> tuple[Path, list[str]]:
    """Write the initial checkpoint of a run; returns it and the warnings."""
    warnings: list[str] = []
    claim = claim_run(Folder(config.run), "test", first=True)
    write_initial_weights(config, claim, warnings.append)
    return find_checkpoint(config.run), warnings


def same_tensors(first: Path, second: Path) -> tuple[set[str], set[str]]:
    """Return the names of tensors that two files share, and of those in the second alone."""
    ours, theirs = load_file(first), load_file(second)
    same = {
        name
        for name, tensor in ours.items()
        if name in theirs
        and theirs[name].shape == tensor.shape
        and torch.equal(theirs[name], tensor)
    }
    return same, theirs.keys() - same


def test_a_model_of_the_same_size_is_taken_whole(data: str, source: Path, tmp_path: Path) -> None:
    checkpoint, warnings = begin(configured(data, tmp_path, f"init={source}", "optim.lr=1e-5"))
    assert checkpoint.name == "step_0000000"
    assert warnings == []
    old = find_checkpoint(source)
    for ours, theirs in (
        ("animator", "animator_ema"),
        ("animator_ema", "animator_ema"),
        ("discriminator", "discriminator"),
    ):
        left = same_tensors(checkpoint / f"{ours}.safetensors", old / f"{theirs}.safetensors")[1]
        assert left == set(), ours
    progress = read_progress(checkpoint)
    assert (progress.step, progress.samples, progress.averaged, progress.data) == (0, 0, 0, "")
    assert progress.origin is not None
    assert (progress.origin.model, progress.origin.step, progress.origin.samples) == ("old", 2, 8)
    assert progress.origin.fresh == ()


def test_at_another_size_what_does_not_fit_is_listed(
    data: str, source: Path, tmp_path: Path
) -> None:
    checkpoint, warnings = begin(configured(data, tmp_path, f"init={source}", *AT_64))
    old = find_checkpoint(source)
    animator = [path / "animator_ema.safetensors" for path in (checkpoint, old)]
    assert same_tensors(*animator)[1] == set(), "the animator works at any size"
    origin = read_progress(checkpoint).origin
    assert origin is not None
    assert origin.fresh
    assert {name.partition(".")[0] for name in origin.fresh} == {"discriminator"}
    (warning,) = warnings
    assert f"{len(origin.fresh)} tensors do not fit" in warning
    assert "different here: data.size, model.detector.scale_factor, " in warning


def test_decoder_blocks_are_matched_from_the_last(data: str, source: Path, tmp_path: Path) -> None:
    """The last one works at frame size; a larger discriminator has another first one."""
    checkpoint, _ = begin(configured(data, tmp_path, f"init={source}", *AT_64))
    ours = load_file(checkpoint / "discriminator.safetensors")
    theirs = load_file(find_checkpoint(source) / "discriminator.safetensors")
    blocks = {
        size: len(build_discriminator(load_config(str(TINY), words)).up_blocks)
        for size, words in ((32, []), (64, AT_64))
    }
    assert blocks[64] == blocks[32] + 1
    end = "conv1.parametrizations.weight.original"
    assert torch.equal(
        ours[f"up_blocks.{blocks[64] - 1}.{end}"], theirs[f"up_blocks.{blocks[32] - 1}.{end}"]
    )


def test_the_run_trains_on_other_data_and_keeps_its_origin(
    source: Path, tmp_path: Path, prioritycut: Prioritycut
) -> None:
    other = write_set(str(tmp_path / "other"), clips=3)
    patch = ("discriminator.kind=patch", "discriminator.patch_num_blocks=2", "priority_cut=null")
    config = configured(other, tmp_path, f"init={source}", *patch, "train.samples=8")
    for _ in range(2):  # the second time it is complete
        run = train_in_process(config, lambda metrics: None, print)
    checkpoint = find_checkpoint(run)
    assert checkpoint.name == "step_0000002"
    origin = read_progress(checkpoint).origin
    assert origin is not None
    assert origin.model == "old"
    exported = prioritycut("export", run, "--out", "exported")
    assert exported.returncode == 0, exported.stderr
    card = Path("exported/README.md").read_text()
    assert "Started from the averaged weights of `old` after 8 frame pairs" in card
    assert str(source.parent) not in Path("exported/config.json").read_text()


def test_an_export_can_be_the_beginning(
    data: str, source: Path, tmp_path: Path, prioritycut: Prioritycut
) -> None:
    assert prioritycut("export", str(source), "--out", "exported").returncode == 0
    checkpoint, warnings = begin(configured(data, tmp_path, "init=exported"))
    old = find_checkpoint(source)
    animator = [path / "animator_ema.safetensors" for path in (checkpoint, old)]
    assert same_tensors(*animator)[1] == set()
    assert len(warnings) == 1, "an export has no discriminator"
    origin = read_progress(checkpoint).origin
    assert origin is not None
    assert (origin.model, origin.step) == ("exported", None)


def test_a_run_that_exists_is_not_replaced(data: str, source: Path, tmp_path: Path) -> None:
    config = configured(data, tmp_path, "train.samples=8")
    train_in_process(config, lambda metrics: None, print)
    with pytest.raises(UserError, match="different values of init"):
        train_in_process(
            config.model_copy(update={"init": str(source)}), lambda metrics: None, print
        )


def test_a_model_that_is_missing_is_one_line(
    data: str, tmp_path: Path, prioritycut: Prioritycut
) -> None:
    words = ["train", str(TINY), f"data.url={data}", f"storage={tmp_path}", "train.workers=0"]
    assert_one_line(prioritycut(*words, f"init={tmp_path}/none"), "none: no such run folder")


@pytest.mark.parametrize("family", ["", "_tps"])
def test_the_larger_of_the_shipped_models_takes_every_tensor(family: str) -> None:
    with torch.device("meta"):
        networks = [build_animator(load_config(f"vox{n}{family}").model) for n in (256, 512)]
    shapes = [{k: v.shape for k, v in network.state_dict().items()} for network in networks]
    assert shapes[0] == shapes[1]


@pytest.mark.parametrize(
    ("place", "name"),
    [
        ("/private/runs/vox", "vox"),
        ("/private/runs/vox/", "vox"),
        ("s3://bucket/runs/vox/best", "vox/best"),
        ("/private/runs/vox/step_0000400", "vox/step_0000400"),
        ("owner/name", "owner/name"),
    ],
)
def test_an_origin_is_named_without_private_folders(place: str, name: str) -> None:
    assert short_name(place) == name
