"""Training on a GPU, against the same steps on the CPU; run by ``benchmarks/gpu.py``."""

import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

from prioritycut_ray.config import load_config
from prioritycut_ray.data.stream import Batch
from prioritycut_ray.errors import NotFiniteError
from prioritycut_ray.models.animator import FramePair
from prioritycut_ray.models.batch_norm import BatchNorm2d
from prioritycut_ray.precision import has_bfloat16
from prioritycut_ray.training import trainer
from prioritycut_ray.training.checkpoint import load_checkpoint, save_checkpoint
from prioritycut_ray.training.state import TrainState
from prioritycut_ray.training.steps import draw_randomness, micro_batches, training_step
from prioritycut_ray.training.worker import Worker, WorkerStatus
from tests.clip_sets import NO_CLIPS
from tests.conftest import TINY
from tests.gpu.runs import KINDS, WORDS, set_up, tensors

CPU = torch.device("cpu")


def assert_close(losses: Mapping[str, float], expected: Mapping[str, float], rel: float) -> None:
    assert losses.keys() == expected.keys()
    for name, loss in losses.items():
        assert loss == pytest.approx(expected[name], rel=rel, abs=rel / 10), name


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_gives_the_losses_of_the_cpu(device: torch.device, kind: str) -> None:
    run = set_up(device, *KINDS[kind])
    # Convolutions run in TF32, with 10 bits of mantissa.
    assert_close(run.step(), set_up(CPU, *KINDS[kind]).step(), rel=1e-2)
    assert run.state.skipped == 0


def test_losses_stay_together_for_some_steps(device: torch.device) -> None:
    ours, theirs = set_up(device), set_up(CPU)
    for _ in range(5):
        losses, expected = ours.step(), theirs.step()
    assert_close(losses, expected, rel=5e-2)


@pytest.mark.parametrize("kind", ["mixing", "patch"])
def test_bfloat16_on_a_gpu_matches_float32_within_its_noise(gpu: torch.device, kind: str) -> None:
    if not has_bfloat16(gpu):
        pytest.skip("this GPU has no bfloat16")
    losses = set_up(gpu, *KINDS[kind], "train.precision=bfloat16").step()
    assert_close(losses, set_up(gpu, *KINDS[kind]).step(), rel=0.05)


def test_updates_that_are_not_finite_are_skipped_and_too_many_end_the_run(
    device: torch.device,
) -> None:
    run = set_up(device, "optim.max_skipped_in_a_row=2")
    run.step()
    weight = next(run.state.animator.generator.parameters())
    with torch.no_grad():
        weight[(0,) * weight.ndim] = float("nan")
    before = tensors(run.state)
    run.step()
    assert run.state.skipped == 2
    for name, value in tensors(run.state).items():
        if not name.startswith("ema"):
            assert torch.equal(value.nan_to_num(), before[name].nan_to_num()), name
    with pytest.raises(NotFiniteError, match="generator/perceptual"):
        run.step()


def test_a_step_reports_the_request_to_stop(device: torch.device) -> None:
    run = set_up(device)
    assert not run.outcome().stop
    assert run.outcome(stop=True).stop


def test_a_restored_state_is_the_saved_one(device: torch.device, tmp_path: Path) -> None:
    run = set_up(device)
    run.step()
    save_checkpoint(run.state, run.config, tmp_path / "step_0000001")
    other = set_up(device)
    load_checkpoint(other.state, tmp_path / "step_0000001")
    saved, restored = tensors(run.state), tensors(other.state)
    assert all(torch.equal(saved[name], restored[name]) for name in saved)
    assert all(value.device == saved[name].device for name, value in restored.items())
    assert_close(other.step(), run.step(), rel=1e-2)


def test_the_host_waits_once_a_step(gpu: torch.device) -> None:
    """As CUDA reports it: only when updates are decided; pictures and losses are read elsewhere."""
    run = set_up(gpu)
    config, state = run.config, run.state
    frames = torch.rand(2, config.train.batch_size, 3, 32, 32, device=gpu)
    for index in range(3):
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("warn" if index == 2 else "default")
        try:
            with warnings.catch_warnings(record=True) as waits:
                warnings.simplefilter("always")
                randomness = draw_randomness(config, index, run.worker)
                parts = micro_batches(FramePair(*frames), randomness, 1)
                networks = state.animator, state.discriminator
                training_step(state, *networks, run.perceptual, parts, config)
                state.ema.update_parameters(state.animator)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    places = [
        f"{wait.filename}:{wait.lineno}" for wait in waits if "synchroniz" in str(wait.message)
    ]
    assert len(places) == 1, places


def test_the_whole_loop(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """With frames that are prefetched, sent and augmented as in a run."""
    config = load_config(str(TINY), [*WORDS, "train.samples=24", "train.log_every=3"])

    def batches(*_: object, **__: object) -> Iterator[Batch]:
        generator = torch.Generator().manual_seed(0)
        for _ in range(6):
            shape = (2, config.train.batch_size, 32, 32, 3)
            frames = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
            if device.type == "cuda":
                frames = frames.pin_memory()
            source, driving = frames.permute(0, 1, 4, 2, 3)
            yield Batch(source, driving, torch.arange(config.train.batch_size))

    monkeypatch.setattr(trainer, "training_batches", batches)
    reports: list[dict[str, float]] = []
    states: list[TrainState] = []

    def report(metrics: Mapping[str, float], state: TrainState | None) -> None:
        reports.append(dict(metrics))
        if state is not None:
            states.append(state)

    trainer.train(
        config,
        NO_CLIPS,
        worker=Worker(0, 1, device),
        writer=None,
        checkpoint=None,
        report=report,
        status=WorkerStatus(),
    )
    assert [row["step"] for row in reports][-1] == 6
    assert all(torch.isfinite(torch.tensor(list(row.values()))).all() for row in reports)
    assert all(torch.isfinite(value).all() for value in tensors(states[-1]).values())


def test_frames_arrive_in_unit_range(device: torch.device) -> None:
    frames = torch.randint(0, 256, (2, 4, 32, 32, 3), dtype=torch.uint8)
    source, driving = frames.permute(0, 1, 4, 2, 3)
    batch = Batch(source, driving, torch.arange(4))
    for frame in trainer.prepare(batch, load_config(str(TINY)), device):
        assert frame.device == device
        assert float(frame.min()) >= 0
        assert float(frame.max()) <= 1


def test_global_batch_statistics_are_torchs_own(device: torch.device, tmp_path: Path) -> None:
    """In a group of one, both must agree in values, gradients and running statistics."""
    ours, theirs = BatchNorm2d(16).to(device), nn.BatchNorm2d(16).to(device)
    ours.synchronised = True
    generator = torch.Generator().manual_seed(0)
    shape = (4, 16, 24, 24)
    values, weights = (torch.randn(shape, generator=generator).to(device) for _ in range(2))
    outputs, gradients = [], []
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        for layer in (ours, theirs):
            x = (3 * values + 1).to(memory_format=torch.channels_last).requires_grad_()
            out = layer(x)
            (out * weights).sum().backward()
            outputs.append(out)
            gradients.append([x.grad, layer.weight.grad, layer.bias.grad])
    finally:
        dist.destroy_process_group()
    torch.testing.assert_close(*outputs, rtol=1e-5, atol=1e-5)
    for mine, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-4, atol=1e-4)
    for mine, expected in zip(ours.buffers(), theirs.buffers(), strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-5, atol=1e-5)
