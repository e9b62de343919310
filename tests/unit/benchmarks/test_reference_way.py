"""benchmarks/reference_way.py, the baseline of the others, computes what our steps compute."""

import importlib
from pathlib import Path

import pytest
import torch

from prioritycut_ray.config import load_config
from prioritycut_ray.models.animator import FramePair
from prioritycut_ray.networks import build_perceptual
from prioritycut_ray.training.state import new_state
from prioritycut_ray.training.steps import draw_randomness, micro_batches, training_step
from prioritycut_ray.training.worker import Worker
from tests.places import ROOT, TINY, TINY_TPS

CPU = torch.device("cpu")


MIXED = ["priority_cut.mix_prob=1", "priority_cut.warmup_samples=0"]
PATCH = ["discriminator.kind=patch", "discriminator.patch_num_blocks=2", "priority_cut=null"]
NONE = ["discriminator.kind=none", "priority_cut=null"]
EARLY = ["model.background_start=0"]


@pytest.mark.parametrize(
    ("source", "words", "count"),
    [
        (TINY, MIXED, 7),
        (TINY_TPS, [*MIXED, *EARLY], 8),
        (TINY_TPS, [*PATCH, *EARLY], 7),
        (TINY_TPS, NONE, 3),
    ],
)
def test_its_losses_are_ours(
    source: Path, words: list[str], count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny = load_config(str(source), words)
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    reference = importlib.import_module("reference_way")
    torch.manual_seed(0)
    ours = new_state(tiny, CPU)
    theirs = reference.reference_state(tiny, CPU)
    for of_ours, of_theirs in zip(ours.networks(), theirs.networks(), strict=True):
        of_theirs.load_state_dict(of_ours.state_dict())
    frames = torch.rand(2, tiny.train.batch_size, 3, tiny.data.size, tiny.data.size)
    randomness = draw_randomness(tiny, 0, Worker(0, 1, CPU))
    [batch] = micro_batches(FramePair(*frames), randomness, 1)
    expected = reference.reference_step(
        theirs, reference.reference_perceptual(tiny, CPU), batch, tiny
    )
    perceptual = build_perceptual(tiny, CPU)
    computed = training_step(ours, ours.animator, ours.discriminator, perceptual, [batch], tiny)
    found = {name: computed.losses[name].item() for name in expected}
    assert len(expected) == count
    # Rounding may move a pixel across the border of the top k percent, so of the mask.
    masked = {"discriminator/mixed", "discriminator/consistency"}
    for name, loss in expected.items():
        tolerance = 2e-3 if name in masked else 1e-4
        assert found[name] == pytest.approx(loss, rel=tolerance, abs=1e-6), name
