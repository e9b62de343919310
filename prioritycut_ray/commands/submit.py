"""``prioritycut submit`` and ``prioritycut jobs``."""

import os
import shlex
import signal
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from prioritycut_ray.config import NAMED_WEIGHTS, Config, load_config, shipped_configs
from prioritycut_ray.errors import Detached, UserError
from prioritycut_ray.ray_cluster.compat import JOB_STOP_WAIT
from prioritycut_ray.ray_cluster.jobs import Cluster, Job, NoSuchJob, exit_code
from prioritycut_ray.ray_cluster.working_directory import Package, pack

_SAVE_SECONDS = "120"
"""That a stopped job has to write its checkpoint; Ray's own value is 3."""


def submit(
    source: str,
    overrides: Sequence[str],
    *,
    address: str,
    excludes: Sequence[str],
    environment: Sequence[str],
    detach: bool,
    dry_run: bool,
    console: Console,
) -> int:
    """Send the working directory and the training command to a cluster; follow the job.

    Returns:
        The exit code of the job's driver; 0 when detached.
    """
    here = Path.cwd()
    config = load_config(source, overrides)
    if config.train.workers == 0:
        raise UserError(
            "train.workers=0 trains in the process of the command itself, which is not what a "
            "cluster is for: set train.workers=1 or more"
        )
    command = ["prioritycut", "train", source, *overrides]
    variables = {JOB_STOP_WAIT: _SAVE_SECONDS, **job_variables(environment)}
    with tempfile.TemporaryDirectory() as folder:
        required = required_files(source, config, here)
        package = pack(here, Path(folder) / "working_dir.zip", excludes, required)
        show_package(package, here, shlex.join(command), console)
        if dry_run:
            return 0
        cluster = Cluster(address)
        job_id = cluster.submit(config.name, command, package=package, environment=variables)
    console.print(f"Job:               {job_id}")
    if detach:
        console.print(f"Follow: {_jobs_line(cluster, 'logs', job_id, '--follow')}", markup=False)
        return 0
    return follow(cluster, job_id, console)


def show_package(package: Package, here: Path, command: str, console: Console) -> None:
    """Say what travels to a cluster, and what will run there."""
    count = f"{package.files} file" + "s" * (package.files != 1)
    console.print(
        f"Working directory: {here}, {count}, {package.size_bytes / 2**20:.2f} MiB packed",
        markup=False,
    )
    for name in package.left_out:
        console.print(f"Left out:          {name}", markup=False)
    console.print(f"Command:           {command}", markup=False)


def follow(cluster: Cluster, job_id: str, console: Console) -> int:
    """Show what a job prints until it ends.

    Returns:
        The exit code of the job's driver.

    Raises:
        UserError: the connection was lost; the job goes on.
        Detached: Ctrl-C or SIGTERM; the job goes on.
    """
    again = f"`{_jobs_line(cluster, 'logs', job_id, '--follow')}`"
    stop = f"`{_jobs_line(cluster, 'stop', job_id)}`"
    try:
        with detaching(f"job {job_id} goes on: follow it with {again}, or stop it with {stop}"):
            job = cluster.follow(job_id, lambda text: console.print(text, end="", markup=False))
    except (Detached, NoSuchJob):
        raise
    except UserError as error:
        raise UserError(
            f"lost sight of job {job_id}, it goes on ({error}); follow it with {again}"
        ) from error
    return report_end(job, console)


@contextmanager
def detaching(ways: str) -> Iterator[None]:
    """While the body runs, Ctrl-C and SIGTERM leave the job alone.

    Raises:
        Detached: with ``ways``, what goes on and how to come back.
    """
    former = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    except KeyboardInterrupt:
        raise Detached(f"detached; {ways}") from None
    finally:
        signal.signal(signal.SIGTERM, former)


def _jobs_line(cluster: Cluster, *words: str) -> str:
    return shlex.join(["prioritycut", "jobs", *words, "--address", cluster.address])


def required_files(source: str, config: Config, here: Path) -> list[str]:
    """Files that the job reads from its working directory, relative to it.

    Raises:
        UserError: the job could not find something that the command line or the configuration
            names; the message names the key or the file.
    """
    found_anywhere = source in shipped_configs() or "://" in source
    files = [] if found_anywhere else [_within(source, source, here)]
    data = config.data
    places = [("storage", config.storage), ("data.url", data.url)]
    optional = [("data.index", data.index), ("data.known", data.known)]
    for key, location in [*places, *optional]:
        if location and "://" not in location and not Path(location).is_absolute():
            raise UserError(
                f"{key}={location}: a relative path would be inside the job's own folder; give a "
                "URL, or the absolute path of a disk that all nodes share"
            )
    weights = config.loss.perceptual.weights
    if weights not in NAMED_WEIGHTS and not Path(weights).is_absolute():
        files.append(_within(weights, f"loss.perceptual.weights={weights}", here))
    return files


def _within(name: str, shown: str, here: Path) -> str:
    """The relative path of a file that travels with the working directory.

    Raises:
        UserError: it does not exist, or lies elsewhere.
    """
    if Path(name).is_absolute():
        raise UserError(f"{shown}: give the file as a path relative to {here}")
    relative = os.path.normpath(name)
    if relative.startswith(os.pardir):
        raise UserError(
            f"{shown}: the file is outside of {here}, the folder that travels to the cluster; "
            "submit from a folder that contains it"
        )
    if not (here / relative).is_file():
        raise UserError(f"{shown}: there is no such file in {here}")
    return relative


def job_variables(words: Sequence[str]) -> dict[str, str]:
    """The words of ``--env`` as variables.

    Raises:
        UserError: one is not KEY=VALUE.
    """
    pairs = [word.partition("=") for word in words]
    for word, (key, equals, _) in zip(words, pairs, strict=True):
        if not key or not equals:
            raise UserError(f"--env {word}: is written KEY=VALUE")
    return {key: value for key, _, value in pairs}


def report_end(job: Job, console: Console) -> int:
    """Say how a job ended; gives the exit code to end with."""
    code = exit_code(job)
    console.print(
        f"Job {job.id}: {job.status}, exit code {code}"
        + (f" · {job.message[:300]}" if code else ""),
        markup=False,
    )
    return code


def show_status(cluster: Cluster, job_id: str | None, console: Console) -> None:
    """One job, or all of a cluster."""
    jobs = [cluster.job(job_id)] if job_id else cluster.jobs()
    if not jobs:
        console.print(f"{cluster.address}: no job has been submitted")
        return
    table = Table("job", "run", "status", "exit code", "message")
    for job in jobs:
        code = "" if job.exit_code is None else str(job.exit_code)
        table.add_row(*map(escape, (job.id, job.run, job.status, code, job.message)))
    console.print(table)


def stop(cluster: Cluster, job_id: str, console: Console) -> None:
    """End a job and wait until it has saved.

    Raises:
        UserError: it has not ended in time.
    """
    cluster.stop(job_id)
    job = cluster.wait(job_id, seconds=2 * float(_SAVE_SECONDS))
    if job.status in ("PENDING", "RUNNING"):
        raise UserError(f"job {job_id} is still {job.status}; try again, or look at its logs")
    console.print(f"Job {job.id}: {job.status}")


def interrupt(cluster: Cluster, seconds: float, console: Console) -> None:
    """Let the drivers on this machine save, because it is about to go away."""
    for job in cluster.interrupt_here(seconds):
        console.print(f"Job {job.id}: {job.status}")
