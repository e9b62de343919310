"""Whole training steps on a GPU that does not exist, and the checks seen to fail."""

from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from prioritycut_ray.config import load_config
from prioritycut_ray.losses import feature_distance
from tests.conftest import TINY
from tests.fake_cuda import CUDA, SAMPLES, FakeGpu, MixedDevicesError, Seen, fake_cuda, train

WORDS = [
    f"train.batch_size={2 * SAMPLES}",
    "train.samples=1000",
    "train.workers=1",
    "train.log_every=1000",
]
PATCH = ["discriminator.kind=patch", "discriminator.patch_num_blocks=2", "priority_cut=null"]
STEPS = {
    "mixing": ["priority_cut.mix_prob=1"],
    "not mixing": ["priority_cut.mix_prob=0"],
    "patch": PATCH,
    "accumulated": ["priority_cut.mix_prob=1", "train.accumulate=2"],
    "checkpointed": ["priority_cut.mix_prob=1", "train.activation_checkpointing=true"],
    "frozen detector": ["priority_cut.mix_prob=1", "optim.detector_lr=0"],
}


@pytest.fixture
def gpu() -> Iterator[FakeGpu]:
    with fake_cuda() as gpu:
        yield gpu


def one_step(gpu: FakeGpu, *words: str) -> Seen:
    return train(gpu, load_config(str(TINY), [*WORDS, *words]), steps=1)[1]


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", STEPS)
def test_a_training_step_runs_on_a_gpu(gpu: FakeGpu, kind: str, precision: str) -> None:
    seen = one_step(gpu, *STEPS[kind], f"train.precision={precision}")
    assert seen.convolutions > 100
    assert {place.named() for place in seen.waits} == {"update.py _agree"}


def on_gpu(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.zeros(shape, device=CUDA, dtype=dtype)


@pytest.mark.parametrize(
    "mistake",
    [
        lambda: torch.stack([on_gpu(), torch.zeros(())]),
        lambda: torch.cat([on_gpu(2), torch.zeros(2)]),
        lambda: on_gpu(2) + torch.zeros(2),
        lambda: on_gpu(2) @ torch.zeros(2),
        lambda: torch.zeros(4)[on_gpu(2, dtype=torch.int64)],
        lambda: torch._foreach_add([on_gpu(2)], [torch.zeros(2)]),
    ],
)
def test_tensors_of_two_devices_are_refused(gpu: FakeGpu, mistake: Callable[[], object]) -> None:
    with pytest.raises(MixedDevicesError):
        mistake()


def test_scalars_of_the_cpu_go_into_pointwise_operations_as_on_a_gpu(gpu: FakeGpu) -> None:
    assert (on_gpu(2) * torch.ones(())).device == CUDA
    assert gpu.seen.complaints() == []


@pytest.mark.parametrize(
    ("mistake", "complaint"),
    [
        (lambda: [bool(on_gpu()), bool(on_gpu())], "the host waits"),
        (lambda: [on_gpu().item(), on_gpu(3).cpu()], "the host waits"),
        (lambda: [on_gpu(3).tolist(), torch.cuda.synchronize()], "the host waits"),
        (lambda: torch.zeros(3).to(CUDA), "stops for a copy"),
        (lambda: torch.zeros(3).to(CUDA, non_blocking=True), "stops for a copy"),
        (lambda: torch.zeros(3, pin_memory=True).to(CUDA), "stops for a copy"),
        (lambda: torch.tensor([1.0, 2.0], device=CUDA), "stops for a copy"),
        (lambda: on_gpu(8)[torch.tensor([1, 2])], "stops for a copy"),
        (lambda: F.conv2d(on_gpu(SAMPLES, 8, 32, 32), on_gpu(8, 8, 3, 3)), "not channels last"),
        (lambda: on_gpu(SAMPLES, 8, 32, 32) + 1, "float32"),
    ],
)
def test_mistakes_are_seen(gpu: FakeGpu, mistake: Callable[[], object], complaint: str) -> None:
    mistake()
    seen = gpu.restart()
    assert complaint in " ".join(seen.complaints(may_be_float32=()))
    assert "test_fake_cuda.py" in " ".join(seen.complaints(may_be_float32=()))


def test_what_is_right_is_not_complained_of(gpu: FakeGpu) -> None:
    pinned = torch.zeros(SAMPLES, 8, 32, 32).pin_memory()
    images = pinned.to(CUDA, torch.bfloat16, non_blocking=True)
    images = images.contiguous(memory_format=torch.channels_last)
    weight = on_gpu(8, 8, 3, 3, dtype=torch.bfloat16).requires_grad_()
    loss = feature_distance([F.conv2d(images, weight)], [on_gpu(dtype=torch.bfloat16)])
    loss.backward()
    loss.item()
    assert gpu.seen.convolutions == 2
    assert gpu.seen.complaints(may_be_float32=()) == []
