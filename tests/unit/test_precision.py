"""Float32 products of coordinates are never rounded to TF32; convolutions follow the setting."""

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import nn

from prioritycut_ray.config import Config
from prioritycut_ray.evaluation.measures import Measures
from prioritycut_ray.evaluation.scoring import load_extractors, score_frames
from prioritycut_ray.inference.animate import animate, find_best_frame
from prioritycut_ray.models.animator import FramePair
from prioritycut_ray.networks import build_animator
from prioritycut_ray.precision import float32_products
from prioritycut_ray.training import trainer
from prioritycut_ray.training.state import TrainState
from prioritycut_ray.training.worker import Worker, WorkerStatus
from tests.clip_sets import NO_CLIPS

CPU = torch.device("cpu")


class Formats(NamedTuple):
    """How CUDA rounds float32 factors of matrix products and of convolutions."""

    products: str
    convolutions: str


def current() -> Formats:
    return Formats(
        torch.backends.cuda.matmul.fp32_precision, torch.backends.cudnn.conv.fp32_precision
    )


TRAINING = Formats("ieee", "tf32")
EXACT = Formats("ieee", "ieee")


@pytest.fixture(autouse=True)
def rounded() -> Iterator[Formats]:
    """Everything in TF32, as a program or an NVIDIA container may set it."""
    before = current()
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    torch.backends.cudnn.conv.fp32_precision = "tf32"
    yield Formats("tf32", "tf32")
    torch.backends.cuda.matmul.fp32_precision, torch.backends.cudnn.conv.fp32_precision = before
    assert torch.get_float32_matmul_precision() == "highest"


def watch(network: nn.Module) -> list[Formats]:
    """Records the formats in every forward pass of a network."""
    seen: list[Formats] = []
    network.register_forward_hook(lambda *_: seen.append(current()))
    return seen


def test_settings_are_restored_even_after_an_error(rounded: Formats) -> None:
    @float32_products(convolutions="ieee")
    def fail() -> None:
        assert current() == EXACT
        raise ValueError("stop")

    with pytest.raises(ValueError, match="stop"):
        fail()
    assert current() == rounded


def test_settings_by_older_names_are_overridden_and_restored() -> None:
    torch.set_float32_matmul_precision("high")
    try:
        with float32_products(convolutions="tf32"):
            assert current() == TRAINING
        assert torch.get_float32_matmul_precision() == "high"
        assert torch.backends.cudnn.allow_tf32
    finally:
        torch.set_float32_matmul_precision("highest")


def test_training(tiny: Config, monkeypatch: pytest.MonkeyPatch, rounded: Formats) -> None:
    frames = torch.rand(2, tiny.train.batch_size, 3, 32, 32)
    monkeypatch.setattr(trainer, "training_pairs", lambda *_, **__: iter([FramePair(*frames)]))
    length = tiny.train.model_copy(update={"samples": tiny.train.batch_size})
    seen = []

    def report(metrics: Mapping[str, float], state: TrainState | None) -> None:
        seen.append(current())

    trainer.train(
        tiny.model_copy(update={"train": length}),
        NO_CLIPS,
        worker=Worker(0, 1, CPU),
        writer=None,
        checkpoint=None,
        report=report,
        status=WorkerStatus(),
    )
    assert seen == [TRAINING]
    assert current() == rounded


def test_animation(tiny: Config, rounded: Formats) -> None:
    animator = build_animator(tiny.model).eval()
    seen = watch(animator.detector)
    source = torch.rand(1, 3, 32, 32)
    driving = np.random.default_rng(0).integers(0, 256, (20, 32, 32, 3), dtype=np.uint8)
    for _ in animate(animator, source, driving, relative=True, adapt_scale=False):
        assert current() == rounded, "the caller's settings are unchanged"
    assert set(seen) == {TRAINING}
    seen.clear()
    find_best_frame(animator, source, driving)
    assert set(seen) == {TRAINING}
    assert current() == rounded


def test_evaluation(tiny: Config, rounded: Formats) -> None:
    animator = build_animator(tiny.model).eval()
    extractors = load_extractors(Measures(), CPU)
    seen = watch(animator.detector), watch(extractors.distance)
    frames = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), dtype=np.uint8)
    score_frames(frames, [animator], extractors)
    assert all(set(formats) == {EXACT} for formats in seen)
    assert current() == rounded
