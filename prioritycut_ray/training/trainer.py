"""The training loop: torch only, the same on a laptop's CPU and on a rank of a cluster."""

import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from prioritycut_ray.config import Config, DataConfig
from prioritycut_ray.data.augment import augment
from prioritycut_ray.data.cache import ClipCache
from prioritycut_ray.data.shards import ClipIndex, read_index
from prioritycut_ray.data.stream import Batch, FramePairs, batches
from prioritycut_ray.errors import NotFiniteError, Preempted
from prioritycut_ray.models.animator import FramePair
from prioritycut_ray.models.batch_norm import synchronise
from prioritycut_ray.networks import build_perceptual
from prioritycut_ray.precision import float32_products, resolve_precision
from prioritycut_ray.prefetch import prefetch_on_gpu
from prioritycut_ray.runs.writer import RunWriter
from prioritycut_ray.storage.filesystem import is_local
from prioritycut_ray.training.checkpoint import load_checkpoint
from prioritycut_ray.training.compilation import compile_networks
from prioritycut_ray.training.meter import Meter
from prioritycut_ray.training.state import TrainState, new_state, set_learning_rates
from prioritycut_ray.training.steps import draw_randomness, micro_batches, training_step
from prioritycut_ray.training.tracking import Tracker, training_pictures
from prioritycut_ray.training.worker import Worker, WorkerStatus
from prioritycut_ray.transfer import send

Report = Callable[[Mapping[str, float], TrainState | None], None]
"""Receives metrics on every rank, equally often; saves the state unless it is None."""


@float32_products(convolutions="tf32")
def train(
    config: Config,
    index: ClipIndex,
    *,
    worker: Worker,
    writer: RunWriter | None,
    checkpoint: Path | None,
    report: Report,
    status: WorkerStatus,
) -> None:
    """Train until ``train.samples`` frame pairs were seen; runs on every rank.

    Args:
        config: the resolved configuration.
        index: of the shards at ``data.url``.
        worker: rank, world size and device of this process; with more than one worker the
            default process group exists already.
        writer: of rank 0, for what it logs; None on the other ranks.
        checkpoint: directory to resume from, or None to start afresh.
        report: called on every rank with metrics and, at checkpoints, the state.
        status: told what this rank is doing; asks it to stop.

    Raises:
        Preempted: some rank was asked to stop; the state was reported at the same step on all.
        NotFiniteError: losses stayed NaN or infinite, or were so at the end.
    """
    if worker.device.type == "cuda":
        choose_algorithms(deterministic=config.train.deterministic)
    config = agree_on_precision(config, worker)
    state = new_state(config, worker.device)
    if checkpoint is not None:
        load_checkpoint(state, checkpoint)
    perceptual = build_perceptual(config, worker.device)
    animator, discriminator = distribute(state, worker)
    if config.train.compile:
        compile_networks(state.animator, state.discriminator, perceptual)
    tracker = Tracker(writer, start=state.step) if writer else None
    meter = Meter(worker)
    status.mark(state.step, "waiting for data")
    for pair in meter.watch(training_pairs(config, index, worker, start=state.samples)):
        randomness = draw_randomness(config, state.step, worker)
        parts = micro_batches(pair, randomness, config.train.accumulate)
        set_learning_rates(state, config)

        outcome = training_step(
            state,
            animator,
            discriminator,
            perceptual,
            parts,
            config,
            stop=status.stop,
            on_phase=partial(status.mark, state.step),
        )
        state.ema.update_parameters(state.animator)
        state.step += 1
        state.samples += config.train.batch_size
        status.mark(state.step, "reporting")
        meter.update(outcome.losses)

        finished = state.samples >= config.train.samples
        if tracker and (finished or state.step % config.train.image_every == 0):
            tracker.pictures(training_pictures(parts[0].pair, outcome, config), state.step)
        stop = outcome.stop and not finished
        save = finished or stop or state.step % config.train.checkpoint_every == 0
        if save or state.step % config.train.log_every == 0:
            scalars = meter.summarise() | optimizer_scalars(state)
            if tracker:
                tracker.scalars(scalars, state.step)
            progress = {"step": float(state.step), "samples": float(state.samples)}
            report(scalars | progress, state if save else None)
        if stop:
            break
        status.mark(state.step, "waiting for data")
    if tracker:
        tracker.close()
    if state.samples < config.train.samples:
        raise Preempted(f"asked to stop, and saved at step {state.step}")
    check_finite_end(state)


def check_finite_end(state: TrainState) -> None:
    """Say it when a run has come to its end while it could not learn any more.

    Raises:
        NotFiniteError: the last updates were skipped, on all ranks.
    """
    skipped = {name: count for name, count in state.skipped_in_a_row.items() if count}
    if skipped:
        updates = " and ".join(f"{count} of the {name}" for name, count in skipped.items())
        raise NotFiniteError(
            f"the training has all its samples, but its losses are not finite at the end: the last "
            f"updates were skipped ({updates}); lower optim.lr or set optim.max_grad_norm, and "
            "train again under another name=..."
        )


def choose_algorithms(*, deterministic: bool) -> None:
    """Of torch and its libraries on this process's GPU: the fastest, or those that repeat.

    To be called before the first collective operation: NCCL sums up in hardware, in any order,
    unless it is told first. cuBLAS is told by the environment (launch.DETERMINISTIC_CUBLAS).
    """
    torch.backends.cudnn.benchmark = not deterministic  # Few shapes: those of B, 2B and 3B images.
    if deterministic:
        torch.use_deterministic_algorithms(True)
        # For debugging: it writes over all new memory.
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def agree_on_precision(config: Config, worker: Worker) -> Config:
    """With ``train.precision: auto`` replaced by bfloat16 if every rank has it, else float32."""
    precision = resolve_precision(config.train.precision, worker.device)
    if worker.world_size > 1:
        everywhere = torch.tensor(float(precision == "bfloat16"), device=worker.device)
        dist.all_reduce(everywhere, op=dist.ReduceOp.MIN)
        precision = "bfloat16" if everywhere else "float32"
    return config.model_copy(
        update={"train": config.train.model_copy(update={"precision": precision})}
    )


def distribute(state: TrainState, worker: Worker) -> tuple[nn.Module, nn.Module]:
    """Wrap both networks for distributed training; bare where there is one worker.

    Batch statistics are then of the global batch, as in the reference.

    After its first step DistributedDataParallel shares gradients in the order in which they came.
    From three ranks on, another order is another sum: a run that was resumed would differ in the
    last bits from one that was not. Where the same bits are promised, the order stays as it was.
    """
    state.animator.train()
    state.discriminator.train()
    if worker.world_size == 1:
        return state.animator, state.discriminator
    synchronise(state.animator)
    same_bits = worker.device.type == "cpu" or torch.are_deterministic_algorithms_enabled()
    # There are none, says torch; what is wanted is that it keeps the order of gradients.
    warnings.filterwarnings("ignore", "find_unused_parameters=True was specified")
    wrap = partial(
        DistributedDataParallel,
        find_unused_parameters=same_bits,
        gradient_as_bucket_view=True,  # not copied back from the buckets that are averaged
    )
    # All buffers of the animator are batch statistics: the same on every rank as they are.
    return wrap(state.animator, broadcast_buffers=False), wrap(state.discriminator)


def training_pairs(
    config: Config, index: ClipIndex, worker: Worker, *, start: int
) -> Iterator[FramePair]:
    """What :func:`training_batches` gives, on the device and augmented."""
    share = training_batches(config, index, worker, start=start)
    pairs = (prepare(batch, config, worker.device) for batch in share)
    # While the training thread waits for the GPU, another one fetches and sends the next frames.
    return prefetch_on_gpu(pairs, worker.device) if worker.device.type == "cuda" else pairs


def training_batches(
    config: Config, index: ClipIndex, worker: Worker, *, start: int
) -> Iterator[Batch]:
    """This rank's share of every global batch from sample ``start`` to the end of the run."""
    data, options = config.data, config.train
    pairs = FramePairs(
        data.url,
        index,
        data.split,
        size=data.size,
        seed=options.seed,
        num_repeats=data.num_repeats,
        pairs_per_visit=data.pairs_per_visit,
        decoder=data.decoder,
        cache=clip_cache(data),
        known=None if data.known is None else read_index(data.known),
        replay=data.replay,
    )
    steps = math.ceil(options.samples / options.batch_size)
    return batches(
        pairs,
        start=start,
        stop=steps * options.batch_size,
        global_batch=options.batch_size,
        rank=worker.rank,
        world_size=worker.world_size,
        loader_workers=data.loader_workers,
        pin_for=worker.device if worker.device.type == "cuda" else None,
    )


def clip_cache(data: DataConfig) -> ClipCache | None:
    """The cache of a remote data set, if one is configured; local shards need none."""
    if data.cache_dir is None or is_local(data.url):
        return None
    return ClipCache(data.cache_dir, int(data.cache_gb * 1e9))


def prepare(batch: Batch, config: Config, device: torch.device) -> FramePair:
    """uint8 frames → device → [0, 1], augmented alike."""
    source, driving = (
        send(frames, device).contiguous(memory_format=torch.channels_last).float() / 255
        for frames in (batch.source, batch.driving)
    )
    options = config.data.augment.model_dump()
    return FramePair(*augment(source, driving, batch.augment_seeds, **options))


def optimizer_scalars(state: TrainState) -> dict[str, float]:
    """The current learning rates, and how many updates were skipped."""
    detector, rest = state.animator_optimizer.param_groups
    return {
        "skipped_updates": float(state.skipped),
        "lr/detector": detector["lr"],
        "lr/generator": rest["lr"],
        "lr/discriminator": state.discriminator_optimizer.param_groups[0]["lr"],
    }
