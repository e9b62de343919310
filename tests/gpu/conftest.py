"""Where these tests run: on a GPU, or not at all.

``benchmarks/gpu.py --dry`` sets PRIORITYCUT_REHEARSE_GPU_TESTS: those that can run on a CPU do so
then, so that they do not fail of a slip where a GPU is at hand at last.
"""

import os

# cuBLAS reads it when it is used first; what is not deterministic does not mind.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import pytest
import torch


@pytest.fixture
def device() -> torch.device:
    """The GPU; the CPU in the rehearsal."""
    if torch.cuda.is_available():
        return torch.device("cuda", 0)
    if "PRIORITYCUT_REHEARSE_GPU_TESTS" in os.environ:
        return torch.device("cpu")
    pytest.skip("needs a GPU")


@pytest.fixture
def gpu() -> torch.device:
    """The GPU, for tests of what CPUs lack."""
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    return torch.device("cuda", 0)
