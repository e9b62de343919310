"""Jobs on a remote Ray cluster, through its Jobs API (HTTP)."""

import asyncio
import logging
import os
import secrets
import shlex
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple

import aiohttp
import ray
import requests
from ray.exceptions import AuthenticationError
from ray.job_submission import JobSubmissionClient

from prioritycut_ray.errors import ExitCode, UserError, one_line
from prioritycut_ray.ray_cluster.compat import JOB_LOGGER, is_not_found
from prioritycut_ray.ray_cluster.working_directory import Package

RUN_KEY = "prioritycut_run"
"""Key in a job's metadata: the run that it trains."""
_ENDED = ("SUCCEEDED", "FAILED", "STOPPED")


class Job(NamedTuple):
    """State of a job, as its cluster reports it."""

    id: str
    run: str
    status: str
    """PENDING, RUNNING, SUCCEEDED, FAILED or STOPPED."""
    message: str
    exit_code: int | None
    """Exit code of the driver, once it has ended."""

    @property
    def has_ended(self) -> bool:
        """Whether the job is no longer running."""
        return self.status in _ENDED


class NoSuchJob(UserError):
    """Raised when a cluster has no job with this id."""


class Cluster:
    """The Jobs API of one cluster.

    Args:
        address: http(s)://host:port of the head's dashboard.
        token: of the cluster; defaults to Ray's own settings: ``RAY_AUTH_MODE``,
            ``RAY_AUTH_TOKEN``, ``RAY_AUTH_TOKEN_PATH``.

    Raises:
        UserError: nothing answers there, or the token is missing or wrong.
    """

    def __init__(self, address: str, token: str | None = None) -> None:
        if not address.startswith(("http://", "https://")):
            raise UserError(f"--address {address}: give http://HOST:8265, the head's dashboard")
        self.address = address
        with self._explained():
            headers = {"Authorization": f"Bearer {token}"} if token else None
            self._client = JobSubmissionClient(address, headers=headers)
        logging.getLogger(JOB_LOGGER).setLevel(logging.WARNING)

    def submit(
        self,
        run: str,
        command: Sequence[str],
        *,
        package: Package | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> str:
        """Start a job and return its id.

        Raises:
            UserError: another job of this run has not ended yet.
        """
        for job in self.jobs():
            if job.run == run and not job.has_ended:
                raise UserError(
                    f"run {run!r} is being trained by job {job.id}: follow it with `prioritycut "
                    f"jobs logs {job.id}`, or stop it with `prioritycut jobs stop {job.id}`"
                )
        runtime_env: dict[str, Any] = {"env_vars": dict(environment or {})}
        if package is not None:
            runtime_env["working_dir"] = str(package.file)
        with self._explained():
            return str(
                self._client.submit_job(
                    entrypoint=shlex.join(command),
                    submission_id=f"{run}-{secrets.token_hex(4)}",
                    runtime_env=runtime_env,
                    metadata={RUN_KEY: run},
                )
            )

    def jobs(self) -> list[Job]:
        """Return the jobs that were submitted to the cluster, oldest first."""
        with self._explained():
            details = self._client.list_jobs()
        submitted = [item for item in details if item.submission_id]
        return [_job(item) for item in sorted(submitted, key=lambda item: item.start_time or 0)]

    def job(self, job_id: str) -> Job:
        """Return one job.

        Raises:
            NoSuchJob: the cluster has no job with this id.
        """
        with self._explained(job_id):
            return _job(self._client.get_job_info(job_id))

    def logs(self, job_id: str) -> str:
        """Return the output of a job so far."""
        with self._explained(job_id):
            return str(self._client.get_job_logs(job_id))

    def follow(self, job_id: str, show: Callable[[str], None]) -> Job:
        """Show the output of a job, from its first line, until it ends.

        Raises:
            UserError: the connection was lost; the job continues.
        """

        async def tail() -> None:
            async for text in self._client.tail_job_logs(job_id):
                show(text)

        with self._explained(job_id):
            asyncio.run(tail())
        job = self.wait(job_id, seconds=60)
        if not job.has_ended:
            raise UserError(f"{self.address}: the log ended, but the job is {job.status}")
        return job

    def stop(self, job_id: str) -> None:
        """Send SIGTERM to the driver of a job, which saves and stops."""
        with self._explained(job_id):
            self._client.stop_job(job_id)

    def wait(self, job_id: str, seconds: float) -> Job:
        """Return the job when it has ended, or its state after the given time."""
        deadline = time.monotonic() + seconds
        while True:
            job = self.job(job_id)
            if job.has_ended or time.monotonic() > deadline:
                return job
            time.sleep(0.5)

    def interrupt_here(self, seconds: float) -> list[Job]:
        """Send SIGTERM to the drivers on this machine, which is being removed; wait for them.

        Unlike :meth:`stop`, the driver's exit code decides the job's status, so that an
        orchestrator sees a failed attempt and retries it.

        Returns:
            The jobs, ended or not.
        """
        here = ray.util.get_node_ip_address()
        with self._explained():
            details = self._client.list_jobs()
        interrupted = []
        for item in details:
            driver = item.driver_info
            if item.status in _ENDED or driver is None or not item.submission_id:
                continue
            if driver.node_ip_address in (here, "127.0.0.1"):
                with suppress(ProcessLookupError):  # it has ended meanwhile
                    os.kill(int(driver.pid), signal.SIGTERM)
                interrupted.append(item.submission_id)
        deadline = time.monotonic() + seconds
        return [self.wait(job_id, deadline - time.monotonic()) for job_id in interrupted]

    @contextmanager
    def _explained(self, job_id: str | None = None) -> Iterator[None]:
        """Turn Ray's errors into a ``UserError``."""
        try:
            yield
        except AuthenticationError as error:
            raise UserError(
                f"{self.address}: the cluster requires a token: set RAY_AUTH_MODE=token and "
                "RAY_AUTH_TOKEN to what `ray get-auth-token` prints on its head (KubeRay keeps it "
                "in the secret with the cluster's name, key auth_token)"
            ) from error
        except (ConnectionError, requests.RequestException, aiohttp.ClientError) as error:
            raise UserError(
                f"{self.address}: no Ray dashboard answers; is the cluster running and the port "
                "forwarded (kubectl port-forward service/HEAD-SVC 8265)?"
            ) from error
        except RuntimeError as error:
            reason = one_line(str(error))
            if job_id and is_not_found(error):
                raise NoSuchJob(
                    f"{job_id}: the cluster has no such job; `prioritycut jobs status` lists all"
                ) from error
            raise UserError(f"{self.address}: {reason[:300]}") from error


def _job(details: Any) -> Job:
    return Job(
        id=details.submission_id or details.job_id,
        run=(details.metadata or {}).get(RUN_KEY, ""),
        status=str(getattr(details.status, "value", details.status)),
        message=one_line(details.message or ""),
        exit_code=details.driver_exit_code,
    )


def exit_code(job: Job) -> int:
    """Return the exit code of the command line after a job: the driver's own if there is one."""
    if job.status == "SUCCEEDED":
        return ExitCode.OK
    return job.exit_code or ExitCode.USER_ERROR
