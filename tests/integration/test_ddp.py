"""Two processes under DistributedDataParallel (gloo) against one process with the whole batch.

Both processes are started once; they run every scenario and leave their results in files.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from copy import deepcopy
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from prioritycut_ray.config import Config, load_config
from prioritycut_ray.models.animator import FramePair, TrainingInputs
from prioritycut_ray.models.batch_norm import BatchNorm2d, synchronise
from prioritycut_ray.models.perceptual import PerceptualPyramid
from prioritycut_ray.networks import build_perceptual
from prioritycut_ray.training.checkpoint import load_checkpoint, save_checkpoint
from prioritycut_ray.training.gradients import apply_gradients
from prioritycut_ray.training.state import TrainState, new_state
from prioritycut_ray.training.steps import (
    MicroBatch,
    draw_randomness,
    micro_batches,
    training_step,
)
from prioritycut_ray.training.trainer import distribute
from prioritycut_ray.training.worker import Worker
from tests.float64 import as_float64, in_float64
from tests.places import ALONE, TINY, TINY_TPS

Result = dict[str, Any]

CPU = torch.device("cpu")
ONE_PROCESS = Worker(0, 1, CPU)
STEPS = 50
pytestmark = pytest.mark.timeout(600)  # Three imports of torch take minutes on a busy machine.
PATCH = ["discriminator.kind=patch", "discriminator.patch_num_blocks=2", "priority_cut=null"]
UPDATES: dict[str, tuple[Path, list[str]]] = {
    "plain": (TINY, ["priority_cut.mix_prob=0"]),
    "mixing": (TINY, ["priority_cut.mix_prob=1"]),
    "patch": (TINY, PATCH),
    "alone": (TINY, [*ALONE]),
    "accumulated": (TINY, ["priority_cut.mix_prob=1", "train.accumulate=2"]),
    "splines, mixing": (TINY_TPS, ["priority_cut.mix_prob=1", "model.background_start=0"]),
    "splines, alone, frozen detector": (TINY_TPS, [*ALONE, "optim.detector_lr=0"]),
}
"""The scenarios that take one step and leave their gradients: configuration and overrides."""


STATISTICS: dict[str, tuple[Path, list[str]]] = {
    "plain": (TINY, []),
    "accumulated": (TINY, ["train.accumulate=2"]),
    "frozen detector": (TINY, ["optim.detector_lr=0"]),
    "splines": (TINY_TPS, ["model.background=false"]),
}
"""The scenarios about batch statistics: configuration and overrides."""
LAYERS = {
    "float64": 1e-12,
    "float32": 1e-6,
    "channels last": 1e-6,
    "checkpoint": 1e-6,
    "bfloat16": 1e-2,
}
"""How a single batch norm is run, and how close two processes must come to one."""


class Setup(NamedTuple):
    """One process's side of a run."""

    config: Config
    worker: Worker
    state: TrainState
    animator: nn.Module
    discriminator: nn.Module | None
    perceptual: PerceptualPyramid


def configured(*words: str, source: Path = TINY) -> Config:
    """With micro-batches of two and more in every scenario.

    torch rounds a convolution of a single image differently, and where that tips a ReLU or an L1
    loss over its kink, gradients differ by 1e-3 for no fault of ours.
    """
    return load_config(str(source), ["train.batch_size=8", *words])


def set_up(config: Config, worker: Worker, perceptual: PerceptualPyramid) -> Setup:
    state = new_state(config, worker.device)
    return Setup(config, worker, state, *distribute(state, worker), perceptual)


@contextmanager
def in_exact_numbers(
    config: Config, worker: Worker, perceptual: PerceptualPyramid
) -> Iterator[Setup]:
    """The same in float64: float32 tips the ReLUs of a ResNet-18 with any way to round."""
    state, perceptual = new_state(config, worker.device), deepcopy(perceptual)
    with in_float64(*state.networks(), perceptual):
        yield Setup(config, worker, state, *distribute(state, worker), perceptual)


def freeze_batch_statistics(module: nn.Module) -> None:
    """In float32, two processes round them differently than one does, which tips ReLUs.

    :func:`learning_statistics` looks at them in float64, where nothing tips.
    """
    for layer in module.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.eval()


def my_share(config: Config, worker: Worker, step: int) -> list[MicroBatch]:
    """This rank's part of a global batch that is the same for any number of workers."""
    generator = torch.Generator().manual_seed(step)
    size, total = config.data.size, config.train.batch_size
    frames = torch.rand(2, total, 3, size, size, generator=generator)
    source, driving = frames.chunk(worker.world_size, dim=1)[worker.rank]
    randomness = draw_randomness(config, step, worker)
    return micro_batches(FramePair(source, driving), randomness, config.train.accumulate)


def both_steps(setup: Setup, batches: Sequence[MicroBatch]) -> bool:
    """Update both networks; return whether the step mixed."""
    config, _, state, animator, discriminator, perceptual = setup
    outcome = training_step(state, animator, discriminator, perceptual, batches, config)
    return any(batch.mask is not None for batch in outcome.discriminator_batches)


def joined(tensors: Sequence[Tensor | None]) -> Tensor:
    """All numbers of some tensors; of millions, every 64th."""
    numbers = torch.cat([t.detach().flatten() for t in tensors if t is not None])
    return numbers if len(numbers) < 10**6 else numbers[::64].clone()


def weights(state: TrainState) -> Tensor:
    return joined([p for network in state.networks() for p in network.parameters()])


def gradients(state: TrainState) -> dict[str, Tensor]:
    names = ("animator", "discriminator")
    return {
        name: joined([p.grad for p in network.parameters()])
        for name, network in zip(names, state.networks(), strict=False)
    }


# What a process does --------------------------------------------------------------------------


def one_update(name: str, worker: Worker, perceptual: PerceptualPyramid) -> Result:
    """Gradients and weights after one step with frozen batch statistics."""
    source, words = UPDATES[name]
    config = configured(*words, source=source)
    batches = my_share(config, worker, step=0)
    if source == TINY:
        return updated(set_up(config, worker, perceptual), batches)
    with in_exact_numbers(config, worker, perceptual) as setup:
        return updated(setup, as_float64(batches))


def updated(setup: Setup, batches: Sequence[MicroBatch]) -> Result:
    state = setup.state
    freeze_batch_statistics(state.animator)
    before = weights(state)
    mixed = both_steps(setup, batches)
    return {
        "gradients": gradients(state),
        "weights": weights(state),
        "moved": not torch.equal(before, weights(state)),
        "mixed": mixed,
    }


def a_part_that_begins_later(worker: Worker, perceptual: PerceptualPyramid) -> Result:
    """Gradients of two steps; the background's motion is used in the second one alone.

    The networks hardly change: any difference comes from a single step.
    """
    slow = [f"optim.{key}=1e-12" for key in ("lr", "detector_lr", "discriminator_lr")]
    config = configured("model.background_start=8", *slow, source=TINY_TPS)
    seen = []
    with in_exact_numbers(config, worker, perceptual) as setup:
        state = setup.state
        freeze_batch_statistics(state.animator)
        for step in range(2):
            both_steps(setup, as_float64(my_share(config, worker, step)))
            state.samples += config.train.batch_size
            used = [p.grad is not None for p in state.animator.background.parameters()]
            seen.append((all(used), any(used), gradients(state)["animator"]))
    return {"seen": seen, "skipped": state.skipped, "weights": weights(state)}


def several_steps(worker: Worker, perceptual: PerceptualPyramid) -> Result:
    """Several steps with updated batch statistics, with the mix decisions of the config."""
    setup = set_up(configured(), worker, perceptual)
    forwards = {"animator": 0, "discriminator": 0}

    def count(name: str) -> None:
        forwards[name] += 1

    setup.animator.register_forward_hook(lambda *_: count("animator"))
    setup.discriminator.register_forward_hook(lambda *_: count("discriminator"))
    mixed = [both_steps(setup, my_share(setup.config, worker, step)) for step in range(4)]
    return {
        "weights": weights(setup.state),
        "statistics": joined(list(setup.state.animator.buffers())),
        "skipped": setup.state.skipped,
        "mixed": mixed,
        "forwards": forwards,
    }


def a_value_that_is_not_finite(worker: Worker, perceptual: PerceptualPyramid) -> Result:
    """A good step; a frame that is NaN, then a loss that is infinite, on rank 1; a good step."""
    setup = set_up(configured("priority_cut.mix_prob=1"), worker, perceptual)
    state, spoil = setup.state, worker.rank == 1
    both_steps(setup, my_share(setup.config, worker, step=0))
    before = _snapshot(state)

    (batch,) = my_share(setup.config, worker, step=1)
    source = batch.pair.source * (float("nan") if spoil else 1.0)
    both_steps(setup, [batch._replace(pair=batch.pair._replace(source=source))])
    after_frame, skipped_by_frame = _changed(state, before), state.skipped

    # Averaging spreads a gradient that is not finite to all ranks, but not a loss.
    for parameter in state.animator.parameters():
        parameter.grad = torch.ones_like(parameter)
    losses = {"spoilt": torch.tensor(float("inf") if spoil else 1.0)}
    optim = setup.config.optim
    apply_gradients(state, {"animator": losses}, optim)
    after_loss, skipped_by_loss = _changed(state, before), state.skipped - skipped_by_frame

    both_steps(setup, my_share(setup.config, worker, step=2))
    return {
        "after_frame": after_frame,
        "skipped_by_frame": skipped_by_frame,
        "after_loss": after_loss,
        "skipped_by_loss": skipped_by_loss,
        "skipped_in_a_row": state.skipped_in_a_row,
        "after_good_step": _changed(state, before),
        "weights": weights(state),
    }


def _snapshot(state: TrainState) -> dict[str, Tensor]:
    networks = {"animator": state.animator, "discriminator": state.discriminator}
    return {
        f"{name}.{key}": tensor.clone()
        for name, network in networks.items()
        for key, tensor in network.state_dict().items()
    }


def _changed(state: TrainState, before: dict[str, Tensor]) -> list[str]:
    return [key for key, now in _snapshot(state).items() if not torch.equal(now, before[key])]


def learning_statistics(name: str, worker: Worker) -> Result:
    """Gradients and batch statistics of the animator after two steps, in float64.

    The passes are those of a generator's step; the loss has no kinks.
    """
    source, words = STATISTICS[name]
    config = configured(*words, source=source)
    reduced: list[torch.Size] = []
    passes: list[nn.Module] = []
    all_reduce = dist.all_reduce

    def reduce_and_note(tensor: Tensor) -> None:
        reduced.append(tensor.shape)
        all_reduce(tensor)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Tensor, "float", Tensor.double)
        patch.setattr(dist, "all_reduce", reduce_and_note)
        state = new_state(config, worker.device)
        state.animator.double()
        for layer in state.animator.modules():
            if isinstance(layer, BatchNorm2d):
                layer.register_forward_hook(lambda layer, *_: passes.append(layer))
        animator, _ = distribute(state, worker)
        for step in range(2):
            batches = my_share(config, worker, step)
            for batch in batches:
                pair = FramePair(*(frame.double() for frame in batch.pair))
                inputs = TrainingInputs(pair.driving.flip(3), batch.randomness.motion, 0)
                several = isinstance(animator, DistributedDataParallel)
                last = batch is batches[-1]
                with animator.no_sync() if several and not last else nullcontext():
                    animation, keypoints, _ = animator(pair, inputs)
                    assert keypoints is not None
                    distances = (
                        (animation.prediction - pair.driving).square().mean(),
                        (keypoints.value - animation.driving_keypoints.value).square().mean(),
                    )
                    (torch.stack(distances).sum() / len(batches)).backward()
    return {
        "gradients": joined([p.grad for p in state.animator.parameters()]),
        "statistics": joined(list(state.animator.buffers())),
        "reduced": reduced,
        "passes": sum(1 + layer.weight.requires_grad for layer in passes),
    }


def one_layer(worker: Worker, case: str) -> Result:
    """A batch norm's results for this rank's rows, its gradients, and its running statistics."""
    generator = torch.Generator().manual_seed(0)
    whole, slopes = torch.randn(2, 8, 6, 5, 4, generator=generator) * 3 + 2
    x, slope = (part.chunk(worker.world_size)[worker.rank].double() for part in (whole, slopes))
    norm = BatchNorm2d(6).double()
    if case != "float64":
        norm, x, slope = norm.float(), x.bfloat16().float(), slope.bfloat16().float()
    with torch.no_grad():
        norm.weight.copy_(torch.linspace(0.5, 2, 6))
        norm.bias.copy_(torch.linspace(-1, 1, 6))
    if worker.world_size > 1:
        synchronise(norm)
    if case == "channels last":
        x, slope = (part.to(memory_format=torch.channels_last) for part in (x, slope))
    x.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=case == "bfloat16"):
        given = x.bfloat16() if case == "bfloat16" else x
        out = checkpoint(norm, given, use_reentrant=False) if case == "checkpoint" else norm(given)
    (out * slope).sum().backward()
    assert x.grad is not None
    assert norm.running_mean is not None
    assert norm.running_mean.dtype == norm.weight.dtype
    return {
        "rows": torch.stack([out.double(), x.grad.double()]),
        "parameters": joined([norm.weight.grad, norm.bias.grad]).double(),
        "statistics": joined([norm.running_mean, norm.running_var]),
        "format": out.dtype,
        "strides": out.stride() == x.stride() == x.grad.stride(),
    }


def two_forwards(worker: Worker) -> Result:
    """What happens to batch statistics between two forward passes, and to the backward pass."""
    norm = nn.BatchNorm2d(3, momentum=0.0)  # it does not update its statistics
    module = DistributedDataParallel(norm)
    images = torch.rand(2, 3, 8, 8)
    first = module(images)
    assert norm.running_mean is not None
    norm.running_mean.data.fill_(1.0 + worker.rank)
    second = module(images)
    result = {"mean": norm.running_mean.mean().item(), "error": ""}
    try:
        (first.square().sum() + second.square().sum()).backward()
    except RuntimeError as error:
        result["error"] = str(error)
    return result


def run_rank(rank: int, port: int, folder: Path) -> None:
    """All scenarios, in one of the two processes."""
    torch.set_num_threads(1)
    store = dist.TCPStore("127.0.0.1", port, is_master=False)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
    worker = Worker(rank, 2, CPU)
    perceptual = build_perceptual(configured())
    results: dict[str, Any] = {name: one_update(name, worker, perceptual) for name in UPDATES}
    results["later"] = a_part_that_begins_later(worker, perceptual)
    for case in LAYERS:
        results[f"layer {case}"] = one_layer(worker, case)
    for name in STATISTICS:
        results[f"statistics {name}"] = learning_statistics(name, worker)
    results["several"] = several_steps(worker, perceptual)
    results["not_finite"] = a_value_that_is_not_finite(worker, perceptual)
    results["draws"] = [draw_randomness(configured(), step, worker).mix for step in range(STEPS)]
    results["two_forwards"] = two_forwards(worker)
    torch.save(results, folder / f"{rank}.pt")
    dist.destroy_process_group()


def run_and_resume(rank: int, port: int, folder: Path) -> None:
    """Three steps; and one, a checkpoint, and two more by networks that were loaded from it."""
    torch.set_num_threads(1)
    store = dist.TCPStore("127.0.0.1", port, is_master=False)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=3)
    worker, config = Worker(rank, 3, CPU), configured("train.batch_size=12")
    perceptual = build_perceptual(config)
    whole, first, second = (set_up(config, worker, perceptual) for _ in range(3))
    for step in range(3):
        both_steps(whole, my_share(config, worker, step))
    both_steps(first, my_share(config, worker, step=0))
    save_checkpoint(first.state, config, folder / f"checkpoint{rank}")
    load_checkpoint(second.state, folder / f"checkpoint{rank}")
    for step in (1, 2):
        both_steps(second, my_share(config, worker, step))
    torch.save((weights(whole.state), weights(second.state)), folder / f"{rank}.pt")
    dist.destroy_process_group()


# What comes of it -----------------------------------------------------------------------------


def spawn(run: Callable[[int, int, Path], None], folder: Path, processes: int) -> list[Any]:
    """The result of each of several processes."""
    # Hosted here, so that no other process can take the port in between.
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GLOO_SOCKET_IFNAME", "lo" if os.path.exists("/sys/class/net/lo") else "lo0")
        torch.multiprocessing.spawn(run, (store.port, folder), nprocs=processes)
    return [torch.load(folder / f"{rank}.pt") for rank in range(processes)]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> tuple[Result, Result]:
    """The results of the two processes."""
    first, second = spawn(run_rank, tmp_path_factory.mktemp("ddp"), 2)
    return first, second


@pytest.fixture(scope="module")
def perceptual() -> PerceptualPyramid:
    return build_perceptual(configured())


def distance(a: Tensor, b: Tensor) -> float:
    assert a.shape == b.shape
    return ((a - b).norm() / b.norm()).item()


@pytest.mark.parametrize("name", [name for name in UPDATES if name != "accumulated"])
def test_two_processes_update_like_one_with_the_whole_batch(
    name: str, ranks: tuple[Result, Result], perceptual: PerceptualPyramid
) -> None:
    alone = one_update(name, ONE_PROCESS, perceptual)
    first, second = (rank[name] for rank in ranks)
    assert {first["mixed"], second["mixed"], alone["mixed"]} == {"mixing" in name}
    assert ("discriminator" in alone["gradients"]) == ("alone" not in name)
    # Compare gradients: Adam's first step is lr·sign(g), which does not depend on the size of g.
    for network, gradient in alone["gradients"].items():
        assert torch.equal(first["gradients"][network], second["gradients"][network])
        assert distance(first["gradients"][network], gradient) <= 1e-5, network
    assert first["moved"]
    assert torch.equal(first["weights"], second["weights"])


def test_two_processes_begin_to_train_a_part_like_one(
    ranks: tuple[Result, Result], perceptual: PerceptualPyramid
) -> None:
    alone = a_part_that_begins_later(ONE_PROCESS, perceptual)
    first, second = (rank["later"] for rank in ranks)
    assert torch.equal(first["weights"], second["weights"])
    for result in (first, second, alone):
        assert result["skipped"] == 0
        assert [(all_of_it, any_of_it) for all_of_it, any_of_it, _ in result["seen"]] == [
            (False, False),
            (True, True),
        ]
    for (*_, mine), (*_, others), (*_, expected) in zip(
        first["seen"], second["seen"], alone["seen"], strict=True
    ):
        assert torch.equal(mine, others)
        assert distance(mine, expected) <= 1e-5


@pytest.mark.parametrize("case", list(LAYERS))
def test_a_batch_norm_of_two_processes_is_that_of_the_whole_batch(
    case: str, ranks: tuple[Result, Result]
) -> None:
    first, second = (rank[f"layer {case}"] for rank in ranks)
    alone, limit = one_layer(ONE_PROCESS, case), LAYERS[case]
    rows = torch.cat([first["rows"], second["rows"]], dim=1)
    assert distance(rows, alone["rows"]) <= limit
    assert distance(first["parameters"] + second["parameters"], alone["parameters"]) <= limit
    assert torch.equal(first["statistics"], second["statistics"])
    assert distance(first["statistics"], alone["statistics"]) <= min(limit, 1e-6), "float32"
    for result in (first, second, alone):
        assert result["format"] == (torch.bfloat16 if case == "bfloat16" else alone["format"])
        assert result["strides"]


@pytest.mark.parametrize("name", list(STATISTICS))
def test_batch_statistics_are_those_of_one_process_with_the_whole_batch(
    name: str, ranks: tuple[Result, Result]
) -> None:
    first, second = (rank[f"statistics {name}"] for rank in ranks)
    alone = learning_statistics(name, ONE_PROCESS)
    for what in ("gradients", "statistics"):
        assert torch.equal(first[what], second[what])
        assert distance(first[what], alone[what]) <= 1e-9, what
    # Once for each layer and pass, in one order.
    assert first["reduced"] == second["reduced"]
    assert len(first["reduced"]) == first["passes"] > 0
    assert alone["reduced"] == []


def test_accumulation_gives_the_same_gradient_under_ddp(ranks: tuple[Result, Result]) -> None:
    for rank in ranks:
        accumulated, whole = (rank[name]["gradients"] for name in ("accumulated", "mixing"))
        assert distance(accumulated["animator"], whole["animator"]) <= 1e-5
    first, second = (rank["accumulated"]["weights"] for rank in ranks)
    assert torch.equal(first, second)


def test_every_rank_mixes_at_the_same_steps(ranks: tuple[Result, Result]) -> None:
    config = configured("train.workers=4")
    alone = [draw_randomness(config, step, ONE_PROCESS).mix for step in range(STEPS)]
    of_four = [
        [draw_randomness(config, step, Worker(rank, 4, CPU)).mix for step in range(STEPS)]
        for rank in range(4)
    ]
    assert [rank["draws"] for rank in ranks] == [alone] * 2
    assert of_four == [alone] * 4
    assert 0.25 < sum(draw < 0.5 for draw in alone) / STEPS < 0.75
    # The decisions of the steps in the processes.
    decisions = [draw < 0.5 for draw in alone[:4]]
    assert len(set(decisions)) == 2, "both kinds of step occur"
    assert [rank["several"]["mixed"] for rank in ranks] == [decisions] * 2


def test_a_value_that_is_not_finite_on_one_rank_stops_the_update_of_both(
    ranks: tuple[Result, Result],
) -> None:
    for rank, result in enumerate(r["not_finite"] for r in ranks):
        assert result["after_frame"] == [], f"rank {rank}"
        assert result["skipped_by_frame"] == 2, "both networks"
        assert result["after_loss"] == [], f"rank {rank}"
        assert result["skipped_by_loss"] == 1
        counts = {"animator": 0, "discriminator": 0}
        assert result["skipped_in_a_row"] == counts, "a good step follows"
        assert result["after_good_step"] != []
    first, second = (r["not_finite"]["weights"] for r in ranks)
    assert torch.isfinite(first).all()
    assert torch.equal(first, second)


def test_steps_take_one_forward_of_each_network_before_its_backward(
    ranks: tuple[Result, Result],
) -> None:
    """DDP writes rank 0's batch statistics over those that an earlier forward has saved.

    Some versions of torch notice and refuse the backward; 2.15 on the CPU does not.
    """
    for rank in ranks:
        assert rank["two_forwards"]["mean"] == 1.0, "of rank 0"
        error = rank["two_forwards"]["error"]
        assert error == "" or "modified by an inplace operation" in error
        assert rank["several"]["forwards"] == {"animator": 4, "discriminator": 4}, "in 4 steps"
        assert rank["several"]["skipped"] == 0
    for what in ("weights", "statistics"):
        first, second = (rank["several"][what] for rank in ranks)
        assert torch.isfinite(first).all()
        assert torch.equal(first, second), what


@pytest.mark.slow
def test_three_processes_resume_to_the_same_bits(tmp_path: Path) -> None:
    """The sum of three gradients depends on their order, which a resume must not change."""
    for whole, resumed in spawn(run_and_resume, tmp_path, 3):
        assert torch.isfinite(whole).all()
        assert torch.equal(whole, resumed)
