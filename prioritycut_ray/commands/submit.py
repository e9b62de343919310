"""``prioritycut submit`` and ``prioritycut jobs``."""

import shlex
import signal
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from prioritycut_ray.config import load_config
from prioritycut_ray.errors import Detached, UserError
from prioritycut_ray.ray_cluster.compat import JOB_STOP_WAIT
from prioritycut_ray.ray_cluster.jobs import Cluster, Job, NoSuchJob, exit_code
from prioritycut_ray.ray_cluster.working_directory import Package, pack, required_files

_SAVE_SECONDS = "120"
"""How long a stopped job may take to save a checkpoint; Ray's default is 3 s."""


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
    """Send the working directory and the training command to a cluster, and follow the job.

    Returns:
        The exit code of the job's driver; 0 with ``detach`` or ``dry_run``.

    Raises:
        UserError: the configuration is invalid, or the cluster cannot be reached.
        Detached: Ctrl-C was pressed; the job continues.
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
    """Print what is sent to a cluster, and what will run there."""
    count = f"{package.files} file" + "s" * (package.files != 1)
    console.print(
        f"Working directory: {here}, {count}, {package.size_bytes / 2**20:.2f} MiB packed",
        markup=False,
    )
    for name in package.left_out:
        console.print(f"Left out:          {name}", markup=False)
    console.print(f"Command:           {command}", markup=False)


def follow(cluster: Cluster, job_id: str, console: Console) -> int:
    """Print the log of a job until it ends.

    Returns:
        The exit code of the job's driver.

    Raises:
        UserError: the connection was lost; the job continues.
        Detached: Ctrl-C or SIGTERM; the job continues.
    """
    again = f"`{_jobs_line(cluster, 'logs', job_id, '--follow')}`"
    stop = f"`{_jobs_line(cluster, 'stop', job_id)}`"
    try:
        with detaching(f"job {job_id} continues: follow it with {again}, or stop it with {stop}"):
            job = cluster.follow(job_id, lambda text: console.print(text, end="", markup=False))
    except (Detached, NoSuchJob):
        raise
    except UserError as error:
        raise UserError(
            f"lost the connection to job {job_id}, which continues ({error}); follow it with "
            f"{again}"
        ) from error
    return report_end(job, console)


@contextmanager
def detaching(ways: str) -> Iterator[None]:
    """Turn Ctrl-C and SIGTERM into :class:`Detached` while the body runs.

    Args:
        ways: what continues, and the commands to follow or stop it.

    Raises:
        Detached: Ctrl-C or SIGTERM.
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


def job_variables(words: Sequence[str]) -> dict[str, str]:
    """Parse the words of ``--env``.

    Raises:
        UserError: a word is not KEY=VALUE.
    """
    pairs = [word.partition("=") for word in words]
    for word, (key, equals, _) in zip(words, pairs, strict=True):
        if not key or not equals:
            raise UserError(f"--env {word}: is not KEY=VALUE")
    return {key: value for key, _, value in pairs}


def report_end(job: Job, console: Console) -> int:
    """Print how a job ended, and return the exit code for this command."""
    code = exit_code(job)
    console.print(
        f"Job {job.id}: {job.status}, exit code {code}"
        + (f" · {job.message[:300]}" if code else ""),
        markup=False,
    )
    return code


def show_status(cluster: Cluster, job_id: str | None, console: Console) -> None:
    """Print the status of a job, or of all jobs of a cluster."""
    jobs = [cluster.job(job_id)] if job_id else cluster.jobs()
    if not jobs:
        console.print(f"{cluster.address}: no jobs have been submitted")
        return
    table = Table("job", "run", "status", "exit code", "message")
    for job in jobs:
        code = "" if job.exit_code is None else str(job.exit_code)
        table.add_row(*map(escape, (job.id, job.run, job.status, code, job.message)))
    console.print(table)


def stop(cluster: Cluster, job_id: str, console: Console) -> None:
    """Stop a job, and wait until it has saved its state.

    Raises:
        UserError: the job did not end in time.
    """
    cluster.stop(job_id)
    job = cluster.wait(job_id, seconds=2 * float(_SAVE_SECONDS))
    if job.status in ("PENDING", "RUNNING"):
        raise UserError(
            f"job {job_id} is still {job.status}; try again, or read its log with "
            f"`prioritycut jobs logs {job_id}`"
        )
    console.print(f"Job {job.id}: {job.status}")


def interrupt(cluster: Cluster, seconds: float, console: Console) -> None:
    """Let the drivers on this machine save their state before the machine terminates."""
    for job in cluster.interrupt_here(seconds):
        console.print(f"Job {job.id}: {job.status}")
