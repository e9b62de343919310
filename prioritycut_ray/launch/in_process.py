"""A run in this process, without Ray: for a debugger, a profiler or a notebook."""

import os
import tempfile
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch

from prioritycut_ray.config import Config
from prioritycut_ray.data.index import ClipIndex
from prioritycut_ray.errors import NotFiniteError, Preempted, UserError
from prioritycut_ray.launch.signals import StopSignals
from prioritycut_ray.runs.attempts import claim_run
from prioritycut_ray.storage.folder import Folder
from prioritycut_ray.training.run import check_run, forwarded_warnings, open_run, save_state
from prioritycut_ray.training.state import TrainState
from prioritycut_ray.training.trainer import train
from prioritycut_ray.training.validation import Validator
from prioritycut_ray.training.worker import DETERMINISTIC_CUBLAS, Worker, WorkerStatus


def train_in_process(
    config: Config,
    on_progress: Callable[[Mapping[str, float]], None],
    on_warning: Callable[[str], None],
) -> str:
    """Train in this process, resuming the run of the same name if there is one.

    The run's folder and weights are those of one Ray worker. SIGTERM or Ctrl-C finishes the step,
    saves and stops; a second Ctrl-C stops at once.

    Args:
        config: the resolved configuration, with absolute paths.
        on_progress: called with the metrics of every report, and with the scores of every
            validation (``val/...``).
        on_warning: called with every warning.

    Returns:
        Path or URL of the run's folder.

    Raises:
        UserError: the data, the configuration or an older run of this name does not fit.
        Preempted: the run was asked to stop.
        Exception: any error of the training itself, for a debugger to stop at.
    """
    index = check_run(config)
    worker, status = Worker(0, 1, _device(config)), WorkerStatus()
    if worker.device.type == "cuda" and config.train.deterministic:
        os.environ.update(DETERMINISTIC_CUBLAS)

    def stop(signal: str) -> None:
        if status.stop and signal == "SIGINT":
            raise KeyboardInterrupt
        status.stop = True
        on_warning(f"{signal}: saving at this step; a second Ctrl-C stops without saving")

    claim = claim_run(Folder(config.run), uuid.uuid4().hex, first=True)
    if config.init is not None:
        from prioritycut_ray.launch.initial_weights import write_initial_weights

        write_initial_weights(config, claim, on_warning)
    with (
        tempfile.TemporaryDirectory(prefix="prioritycut-") as scratch,
        StopSignals(stop),
        forwarded_warnings(on_warning),
        _threads(config.train.cpus_per_worker),
    ):
        writer, _, checkpoint = open_run(config, claim, Path(scratch))

        def report(metrics: Mapping[str, float], state: TrainState | None) -> None:
            if state is not None:
                save_state(writer, state, metrics, config, index.fingerprint)
            on_progress(metrics)

        with writer:
            try:
                train(
                    config,
                    index,
                    worker=worker,
                    writer=writer,
                    checkpoint=checkpoint,
                    report=report,
                    status=status,
                    validator=_validator(config, index),
                    on_verdict=on_progress,
                )
            except Preempted as error:
                writer.flush()
                raise Preempted(
                    f"run {config.name!r} ended: {error}; the same command resumes it"
                ) from error
            except NotFiniteError as error:
                writer.flush()
                raise NotFiniteError(f"run {config.name!r} ended: {error}") from error
            except KeyboardInterrupt:
                if not status.stop:  # the interrupt did not come through StopSignals
                    raise
                raise Preempted(
                    f"run {config.name!r} ended at step {status.step}: stopped without saving (a "
                    "second Ctrl-C); the same command resumes from the last checkpoint"
                ) from None
    return config.run


def _validator(config: Config, index: ClipIndex) -> Validator | None:
    if not config.train.validate_every:
        return None
    from prioritycut_ray.launch.validation import validator_of  # the metrics take seconds to import

    return validator_of(config, index)


def _device(config: Config) -> torch.device:
    """Return the device that ``train.use_gpu`` selects.

    Raises:
        UserError: a GPU was requested and there is none.
    """
    if config.train.use_gpu != "no" and torch.cuda.is_available():
        return torch.device("cuda", 0)
    if config.train.use_gpu == "yes":
        raise UserError(
            "train.use_gpu=yes with train.workers=0, but torch finds no GPU on this machine: set "
            "train.use_gpu=auto, or train.workers=1 to train on a cluster"
        )
    return torch.device("cpu")


@contextmanager
def _threads(count: int) -> Iterator[None]:
    """Give torch as many threads as Ray gives a worker: another number is another sum."""
    before = torch.get_num_threads()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", count)))
    try:
        yield
    finally:
        torch.set_num_threads(before)
