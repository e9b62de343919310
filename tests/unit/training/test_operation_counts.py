"""A training step of the published size issues few operations to a GPU, and waits once."""

import pytest

from prioritycut_ray.config import load_config
from tests.conftest import TINY
from tests.fake_cuda import Seen, fake_cuda, train

SPECTRAL = "models/spectral.py"
PARTS = {
    "first_order": ("detector", "dense_motion", "generator"),
    "thin_plate": ("dense_motion", "inpainting"),
}
NARROW = [
    *("discriminator.unet_base_channels=4", "discriminator.max_features=8"),
    *("loss.perceptual.weights=random", "train.workers=1", "train.precision=bfloat16"),
]  # fmt: skip
"""Narrow networks have the same number of operations, and are quick to initialise."""


@pytest.fixture(
    scope="module",
    params=["first_order", pytest.param("thin_plate", marks=pytest.mark.slow)],
)
def family(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture(scope="module")
def published_step(family: str) -> Seen:
    """The second step of vox256, which mixes, with few channels."""
    words = [f"model.family={family}", "priority_cut.mix_prob=1"]
    words += [
        f"model.{part}.{key}"
        for part in PARTS[family]
        for key in ("block_expansion=4", "max_features=8")
    ]
    with fake_cuda() as gpu:
        config = load_config("vox256", [*NARROW, *words, "priority_cut.warmup_samples=0"])
        return train(gpu, config, steps=2)[2]


def test_a_step_has_few_operations_and_one_wait(family: str, published_step: Seen) -> None:
    """With 5700 operations and fewer than 16 samples, an H200 would wait for Python."""
    assert 2500 < published_step.count() <= {"first_order": 3500, "thin_plate": 4700}[family]
    assert [place.named() for place in published_step.waits] == ["training/gradients.py _agree"]
    assert published_step.blocking == []
    assert len(published_step.uploads) == 4, "two frames, seeds and random numbers"


def test_spectral_norms_are_in_float32_and_copy_no_weight(published_step: Seen) -> None:
    names = {name for _, name, place in published_step.operations if place.file == SPECTRAL}
    assert {"mv", "addr"} <= names
    assert not {"_to_copy", "clone"} & names


def test_spectral_norms_of_the_reference_are_in_float32() -> None:
    words = [
        *("discriminator.kind=patch", "discriminator.patch_num_blocks=2", "priority_cut=null"),
        *("discriminator.patch_spectral_norm=true", "train.precision=bfloat16", "train.workers=1"),
    ]
    with fake_cuda() as gpu:
        seen = train(gpu, load_config(str(TINY), words), steps=1)[1]
    names = {name for _, name, place in seen.operations if place.file == SPECTRAL}
    assert "mv" in names
    assert "_to_copy" not in names
