"""``train.deterministic``: equal bits in two runs and after a resume, with correct gradients."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from prioritycut_ray.models.sampling import DeterministicSample
from prioritycut_ray.training.checkpoint import load_checkpoint, save_checkpoint
from prioritycut_ray.training.trainer import choose_algorithms
from tests.gpu.runs import KINDS, set_up, tensors


@pytest.fixture
def deterministic() -> Iterator[None]:
    """As in a worker with the option; conftest.py sets the variable for cuBLAS."""
    search = torch.backends.cudnn.benchmark
    choose_algorithms(deterministic=True)
    yield
    torch.use_deterministic_algorithms(False)
    torch.backends.cudnn.benchmark = search


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["mixing", "patch", "accumulated"])
def test_runs_are_equal_to_the_bit(
    device: torch.device, deterministic: None, tmp_path: Path, kind: str, precision: str
) -> None:
    words = [*KINDS[kind], f"train.precision={precision}"]
    once, again = set_up(device, *words), set_up(device, *words)
    for _ in range(4):
        once.step()
    for _ in range(2):
        again.step()
    save_checkpoint(again.state, again.config, tmp_path / "step_0000002")
    resumed = set_up(device, *words)
    load_checkpoint(resumed.state, tmp_path / "step_0000002")
    for run in (again, resumed):
        for _ in range(2):
            run.step()
    expected = tensors(once.state)
    for run in (again, resumed):
        different = [n for n, value in tensors(run.state).items() if not value.equal(expected[n])]
        assert not different


@pytest.mark.parametrize("padding", ["zeros", "reflection"])
def test_sampling_has_torchs_values_and_gradients(device: torch.device, padding: str) -> None:
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(3, 8, 20, 24, generator=generator).to(device)
    grid = (3 * torch.rand(3, 18, 22, 2, generator=generator) - 1.5).to(device)
    weights = torch.randn(3, 8, 18, 22, generator=generator).to(device)
    results = []
    for ours in (True, False):
        inputs = image.clone().requires_grad_(), grid.clone().requires_grad_()
        out = (
            DeterministicSample.apply(*inputs, padding)
            if ours
            else F.grid_sample(*inputs, padding_mode=padding, align_corners=False)
        )
        results.append((out, *torch.autograd.grad((out * weights).sum(), inputs)))
    for mine, expected in zip(*results, strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-4, atol=1e-4)
