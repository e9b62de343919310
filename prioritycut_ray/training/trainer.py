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
from prioritycut_ray.data.index import ClipIndex, read_index
from prioritycut_ray.data.shards import shard_url
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
from prioritycut_ray.training.validation import Books, OnVerdict, Validation, Validator
from prioritycut_ray.training.worker import Worker, WorkerStatus
from prioritycut_ray.transfer import send

OnFailure = Callable[[TrainState, Exception], None]
"""Takes the state after the last whole step, and the error that ended the training."""

Report = Callable[[Mapping[str, float], TrainState | None], None]
"""Takes metrics on every rank, at the same steps, and a state to save or None."""


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
    validator: Validator | None = None,
    on_verdict: OnVerdict = lambda scores: None,
    on_failure: OnFailure = lambda state, error: None,
) -> None:
    """Train until ``train.samples`` frame pairs have been seen; runs on every rank.

    With ``train.patience``, training ends early when validations stop improving.

    Args:
        config: the resolved configuration.
        index: index of the training data.
        worker: rank, world size and device of this process; with several workers, the default
            process group must exist.
        writer: writer of the run's folder on rank 0, for logs; None on the other ranks.
        checkpoint: directory to resume from, or None to start from scratch.
        report: called on every rank with metrics and, at checkpoints, the state.
        status: updated with what this rank is doing; its ``stop`` requests a stop.
        validator: scores held-out clips; None if the run does not validate.
        on_verdict: called on rank 0 with the scores of every validation.
        on_failure: called on this rank if a step fails, before the error is raised.

    Raises:
        Preempted: some rank was asked to stop; all ranks have reported the state of the same step.
        NotFiniteError: losses stayed NaN or infinite, or were so in the last steps.
    """
    if worker.device.type == "cuda":
        choose_algorithms(deterministic=config.train.deterministic)
    config = agree_on_precision(config, worker)

    # Build the networks and restore the checkpoint.
    state = new_state(config, worker.device)
    if checkpoint is not None:
        load_checkpoint(state, checkpoint)
    perceptual = build_perceptual(config, worker.device)
    animator, discriminator = distribute(state, worker)
    if config.train.compile:
        compile_networks(*state.networks(), perceptual)

    # Train; random numbers and learning rates are functions of the step and of samples seen.
    tracker = Tracker(writer, start=state.step) if writer else None
    books = Books(writer, tracker, on_verdict) if writer and tracker else None
    validation = Validation(config, validator, worker, status, books)
    validation.resume(state)
    meter = Meter(worker)
    pairs = training_pairs(config, index, worker, start=state.samples)
    status.mark(state.step, "waiting for data")
    for pair in () if validation.ends_training() else meter.watch(pairs):
        randomness = draw_randomness(config, state.step, worker)
        parts = micro_batches(pair, randomness, config.train.accumulate)
        set_learning_rates(state, config)
        try:
            outcome = training_step(
                state,
                animator,
                discriminator,
                perceptual,
                parts,
                config,
                stop=status.stop or validation.is_exhausted,
                on_phase=partial(status.mark, state.step),
            )
        except Exception as error:
            # Weights are updated last, when all ranks have agreed: only buffers have changed.
            for network in state.networks():
                state.restore_buffers(network)
            on_failure(state, error)
            raise
        state.ema.update_parameters(state.animator)
        state.step += 1
        state.samples += config.train.batch_size
        status.mark(state.step, "reporting")
        meter.update(outcome.losses)

        # Log, save, validate and stop when it is time.
        finished = state.samples >= config.train.samples
        validate = validation.is_due(state.step)
        if tracker and (finished or state.step % config.train.image_every == 0):
            tracker.pictures(training_pictures(parts[0].pair, outcome, config), state.step)
        stop = outcome.stop and not finished
        save = finished or stop or validate or state.step % config.train.checkpoint_every == 0
        if save or state.step % config.train.log_every == 0:
            scalars = meter.summarise() | optimizer_scalars(state)
            if tracker:
                tracker.scalars(scalars, state.step)
            progress = {"step": float(state.step), "samples": float(state.samples)}
            report(scalars | progress, state if save else None)
        if stop:
            break
        if validate and not finished:
            validation.begin(state)
        validation.poll()
        status.mark(state.step, "waiting for data")
    is_complete = state.samples >= config.train.samples or validation.ends_training()
    if is_complete:
        validation.finish(state)
    if tracker:
        tracker.close()
    if not is_complete:
        raise Preempted(f"asked to stop, and saved at step {state.step}")
    check_finite_end(state)


def check_finite_end(state: TrainState) -> None:
    """Check that a finished run was still learning at its end.

    Raises:
        NotFiniteError: the last updates were skipped, on all ranks.
    """
    skipped = {name: count for name, count in state.skipped_in_a_row.items() if count}
    if skipped:
        updates = " and ".join(f"{count} of the {name}" for name, count in skipped.items())
        raise NotFiniteError(
            f"the training is complete, but its last losses are not finite: the last updates were "
            f"skipped ({updates}); lower optim.lr or set optim.max_grad_norm, and train again "
            "under another name=..."
        )


def choose_algorithms(*, deterministic: bool) -> None:
    """Choose the fastest algorithms on this process's GPU, or reproducible ones.

    Call it before the first collective operation: otherwise NCCL may sum in hardware, in arbitrary
    order. For cuBLAS, see :data:`~prioritycut_ray.training.worker.DETERMINISTIC_CUBLAS`.
    """
    torch.backends.cudnn.benchmark = not deterministic  # few shapes: B, 2B and 3B images
    if deterministic:
        torch.use_deterministic_algorithms(True)
        # A debugging aid that would overwrite all new memory.
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def agree_on_precision(config: Config, worker: Worker) -> Config:
    """Replace ``train.precision: auto`` by bfloat16 if every rank supports it, else float32."""
    precision = resolve_precision(config.train.precision, worker.device)
    if worker.world_size > 1:
        everywhere = torch.tensor(float(precision == "bfloat16"), device=worker.device)
        dist.all_reduce(everywhere, op=dist.ReduceOp.MIN)
        precision = "bfloat16" if everywhere else "float32"
    return config.model_copy(
        update={"train": config.train.model_copy(update={"precision": precision})}
    )


def distribute(state: TrainState, worker: Worker) -> tuple[nn.Module, nn.Module | None]:
    """Wrap both networks for distributed training, unless there is only one worker.

    Batch statistics are then those of the global batch, as in the reference.

    After its first step, DistributedDataParallel reduces gradients in the order in which they
    became ready. With three ranks or more, another order gives another sum: a resumed run would
    differ in the last bits from an uninterrupted one. Where equal bits are promised, the order is
    kept.
    """
    for network in state.networks():
        network.train()
    if worker.world_size == 1:
        return state.animator, state.discriminator
    synchronise(state.animator)
    same_bits = worker.device.type == "cpu" or torch.are_deterministic_algorithms_enabled()
    # torch warns that there are no unused parameters; the option serves to keep the order.
    warnings.filterwarnings("ignore", "find_unused_parameters=True was specified")
    wrap = partial(
        DistributedDataParallel,
        gradient_as_bucket_view=True,  # gradients need not be copied back from the buckets
    )
    animator = wrap(
        state.animator,
        find_unused_parameters=same_bits or state.animator.parts_change,
        # All buffers of the animator are batch statistics, which are equal on all ranks anyway.
        broadcast_buffers=False,
    )
    return animator, state.discriminator and wrap(
        state.discriminator, find_unused_parameters=same_bits
    )


def training_pairs(
    config: Config, index: ClipIndex, worker: Worker, *, start: int
) -> Iterator[FramePair]:
    """Yield the frames of :func:`training_batches`, augmented and on the device."""
    share = training_batches(config, index, worker, start=start)
    pairs = (prepare(batch, config, worker.device) for batch in share)
    # While the training thread waits for the GPU, another thread fetches and sends the next frames.
    return prefetch_on_gpu(pairs, worker.device) if worker.device.type == "cuda" else pairs


def training_batches(
    config: Config, index: ClipIndex, worker: Worker, *, start: int
) -> Iterator[Batch]:
    """Yield this rank's share of every global batch, from sample ``start`` to the run's end."""
    data, options = config.data, config.train
    pairs = FramePairs(
        data.url,
        index,
        data.split,
        size=data.size,
        seed=options.seed,
        num_repeats=data.num_repeats,
        pairs_per_visit=data.pairs_per_visit,
        visit=data.visit,
        decoder=data.decoder,
        cache=clip_cache(data, index),
        known=None if data.known is None else read_index(data.known, cache_dir=data.cache_dir),
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


def clip_cache(data: DataConfig, index: ClipIndex) -> ClipCache | None:
    """Return the cache of remote shards, if one is configured; local shards need none."""
    if data.cache_dir is None or all(is_local(shard_url(data.url, name)) for name in index.shards):
        return None
    return ClipCache(data.cache_dir, int(data.cache_gb * 1e9))


def prepare(batch: Batch, config: Config, device: torch.device) -> FramePair:
    """Send uint8 frames to the device, scale them to [0, 1], and augment each pair consistently."""
    source, driving = (
        send(frames, device).contiguous(memory_format=torch.channels_last).float() / 255
        for frames in (batch.source, batch.driving)
    )
    options = config.data.augment.model_dump()
    return FramePair(*augment(source, driving, batch.augment_seeds, **options))


def optimizer_scalars(state: TrainState) -> dict[str, float]:
    """Return the current learning rates and the number of skipped updates."""
    detector, rest = state.animator_optimizer.param_groups
    scalars = {
        "skipped_updates": float(state.skipped),
        "lr/detector": detector["lr"],
        "lr/generator": rest["lr"],
    }
    if state.discriminator_optimizer:
        scalars["lr/discriminator"] = state.discriminator_optimizer.param_groups[0]["lr"]
    return scalars
