import copy
import json
import os
import subprocess
import sys
from typing import Any

import pytest
import torch

from prioritycut_ray.errors import UserError
from prioritycut_ray.models.blocks import DownBlock
from prioritycut_ray.training import compilation
from prioritycut_ray.training.compilation import compile_networks
from tests.places import FAMILIES


def compiled(*words: str) -> dict[str, Any]:
    """The output of :mod:`tests.compiled_steps`."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.compiled_steps", *words],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def check(result: dict[str, Any], gradients: float = 1e-5) -> None:
    """Equal numbers, from code that was compiled for the first batch.

    Args:
        result: the results of both ways.
        gradients: how far the norm of the animator's gradients may differ.
    """
    assert result["breaks"] == {}
    for plain, same in zip(result["plain"], result["compiled"], strict=True):
        assert plain.pop("graphs") == 0
        assert same.pop("graphs") == result["graphs"]
        if "animator" in plain:
            assert same.pop("animator") == pytest.approx(plain.pop("animator"), rel=gradients)
        assert same == pytest.approx(plain, rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_compiled_steps_give_the_same_losses_and_compile_once_for_all_batches(family: str) -> None:
    result = compiled("eager", family)
    assert "discriminator/mixed" not in result["plain"][0]
    assert "discriminator/mixed" in result["plain"][1], "three images per sample, not two"
    result["graphs"] = result["compiled"][0]["graphs"]
    assert result["graphs"] >= 20, "blocks of all three networks"
    # Another rounding tips some ReLUs of a ResNet.
    check(result, gradients=1e-2 if family == "thin_plate" else 1e-5)


@pytest.mark.slow
def test_generated_code_gives_the_same_results() -> None:
    check(compiled("inductor", "block") | {"graphs": 1})


def test_names_are_kept_and_copies_are_not_compiled() -> None:
    network = DownBlock(3, 4)
    names = list(network.state_dict())
    compile_networks(network, backend="eager")
    assert list(network.state_dict()) == names
    other = copy.deepcopy(network)
    other.conv.requires_grad_(False).weight.fill_(0.0)
    assert other(torch.rand(2, 3, 8, 8)).max() < 1e-3, "a copy has its own weights"


def test_a_missing_compiler_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compilation, "_has_compiler", lambda: False)
    with pytest.raises(UserError, match="needs a C\\+\\+ compiler"):
        compile_networks(DownBlock(3, 4))
