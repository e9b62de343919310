"""A step that fails leaves the state of the last whole step, bit for bit."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from prioritycut_ray.config import load_config
from prioritycut_ray.data.index import read_index
from prioritycut_ray.training import steps
from prioritycut_ray.training.state import TrainState
from prioritycut_ray.training.trainer import train
from prioritycut_ray.training.worker import Worker, WorkerStatus
from tests.clip_sets import write_set
from tests.conftest import TINY

BATCH, WHOLE = 4, 2


def tensors(state: TrainState) -> dict[str, Tensor]:
    """Copies of everything that a checkpoint stores."""
    found = {f"ema.{name}": value for name, value in state.ema.state_dict().items()}
    for number, network in enumerate(state.networks()):
        found |= {f"{number}.{name}": value for name, value in network.state_dict().items()}
    for optimizer in (state.animator_optimizer, state.discriminator_optimizer):
        assert optimizer is not None
        for number, moments in optimizer.state_dict()["state"].items():
            found |= {f"{id(optimizer)}.{number}.{k}": v for k, v in moments.items()}
    return {name: value.clone() for name, value in found.items()}


def trained(data: str, samples: int, on_failure: Any = None) -> dict[str, Tensor]:
    """Train in this process, and return the last state."""
    config = load_config(str(TINY), [f"data.url={data}", f"train.samples={samples}"])
    saved: dict[str, Tensor] = {}

    def report(metrics: Any, state: TrainState | None) -> None:
        if state is not None:
            saved.update(tensors(state))

    train(
        config,
        read_index(data),
        worker=Worker(0, 1, torch.device("cpu")),
        writer=None,
        checkpoint=None,
        report=report,
        status=WorkerStatus(),
        **({"on_failure": on_failure} if on_failure else {}),
    )
    return saved


@pytest.mark.parametrize("place", ["apply_gradients", "discriminator_gradients"])
def test_a_failed_step_has_not_changed_the_state(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    """As when another rank is gone: during a backward pass, or when all ranks must agree."""
    data = write_set(f"{tmp_path}/data")
    expected = trained(data, BATCH * WHOLE)
    action, calls = getattr(steps, place), []

    def fails(*arguments: Any, **options: Any) -> Any:
        calls.append(place)
        if len(calls) > WHOLE:
            if place == "discriminator_gradients":
                action(*arguments, **options)  # batch statistics and spectral norms have changed
            raise RuntimeError("Connection closed by peer")
        return action(*arguments, **options)

    monkeypatch.setattr(steps, place, fails)
    left: dict[str, Tensor] = {}
    with pytest.raises(RuntimeError, match="closed by peer"):
        trained(data, 100 * BATCH, lambda state, error: left.update(tensors(state)))
    assert [*map(len, (left, expected))] == [len(expected)] * 2
    for (name, value), other in zip(left.items(), expected.values(), strict=True):
        assert torch.equal(value, other), name
