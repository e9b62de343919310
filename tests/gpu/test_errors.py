"""Real error messages of a GPU are classified like the examples in the unit tests."""

import subprocess
import sys

import pytest
import torch

from prioritycut_ray.errors import ExitCode
from prioritycut_ray.launch.failures import diagnose

ASSERT = """
import torch
table = torch.zeros(4, device="cuda")
try:
    table[torch.tensor([9], device="cuda")].cpu()
except RuntimeError as error:
    from prioritycut_ray.launch.failures import diagnose
    failure = diagnose({0: error}, {}, 60.0, lambda beat: None)
    print(int(failure.kind), failure.reason)
"""


def test_out_of_memory(gpu: torch.device) -> None:
    with pytest.raises(torch.OutOfMemoryError) as caught:
        torch.empty(1 << 50, dtype=torch.uint8, device=gpu)
    failure = diagnose({0: caught.value}, {}, 60.0, lambda beat: None)
    assert failure.kind is ExitCode.OUT_OF_MEMORY
    assert "Tried to allocate" in failure.reason


def test_an_error_of_a_kernel_is_described_by_its_first_line(gpu: torch.device) -> None:
    """In its own process, which cannot use the GPU afterwards."""
    command = [sys.executable, "-c", ASSERT]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    assert said.startswith(f"{ExitCode.WORKER_ERROR:d} ")
    assert "CUDA error: device-side assert triggered" in said
