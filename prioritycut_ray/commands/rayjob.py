"""``prioritycut jobs logs --kubernetes``: follow a RayJob with kubectl, and detach from it."""

import re
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from rich.console import Console
from tenacity import Retrying, retry_if_exception_type, stop_after_delay, wait_fixed

from prioritycut_ray.commands.submit import detaching, report_end
from prioritycut_ray.errors import UserError
from prioritycut_ray.kubernetes.kubectl import Kubectl, KubectlError
from prioritycut_ray.kubernetes.options import ManifestOptions
from prioritycut_ray.kubernetes.pods import PORTS, Object
from prioritycut_ray.kubernetes.rayjobs import (
    RayJobState,
    follow_command,
    get_rayjob,
    next_commands,
    waiting_for,
)
from prioritycut_ray.ray_cluster.jobs import Cluster, Job, NoSuchJob, exit_code

_POLL_S = 2
_PATIENCE_S = 300
"""How long to retry while the API server does not respond."""
_HINT_S = 60
"""How long a job waits for the same thing before a hint is printed."""


def logs(
    name: str, namespace: str | None, context: str | None, *, is_followed: bool, console: Console
) -> int:
    """Print the log of a RayJob.

    Args:
        name: name of the RayJob.
        namespace: its namespace; None for the default of the manifests.
        context: kubectl context.
        is_followed: whether to follow the log to the end.
        console: where to print.

    Returns:
        The exit code of the driver if the log is followed, otherwise 0.

    Raises:
        UserError: the RayJob does not exist, or it has no log yet and is not followed.
        Detached: Ctrl-C was pressed; the job continues.
    """
    kubectl = Kubectl(namespace or ManifestOptions().namespace, context)
    if not is_followed:
        _show_log(kubectl, name, console)
        return 0
    get_rayjob(kubectl, name)  # fail at once if the API server has never responded
    with detaching_from(kubectl, name):
        return follow(kubectl, name, console)


def _show_log(kubectl: Kubectl, name: str, console: Console) -> None:
    state = RayJobState.of(get_rayjob(kubectl, name))
    if not state.may_have_log:
        raise UserError(
            f"RayJob {name} has no log yet: {state.phase or 'the operator has not acted on it'}; "
            f"follow it with `{follow_command(kubectl, name)}`"
        )
    with _dashboard(kubectl, state) as cluster:
        console.print(cluster.logs(state.job_id), end="", markup=False)


def detaching_from(kubectl: Kubectl, name: str) -> AbstractContextManager[None]:
    """Detach from a RayJob on Ctrl-C and SIGTERM; see :func:`detaching`."""
    return detaching(f"RayJob {name} continues: {next_commands(kubectl, name)}")


def follow(kubectl: Kubectl, name: str, console: Console) -> int:
    """Wait for a RayJob's cluster, and print the log of each attempt until the last one ends.

    Returns:
        The exit code of the last attempt's driver.

    Raises:
        UserError: the RayJob does not exist, or the API server no longer responds.
    """
    line, attempt = _StatusLine(console), AttemptLog("", console)
    for rayjob in _polled(kubectl, name, line):
        state, trouble = RayJobState.of(rayjob), ""
        if state.job_id not in ("", attempt.job_id):
            attempt = AttemptLog(state.job_id, console)
        if attempt.end is None and state.may_have_log:
            trouble = _read_log(kubectl, state, attempt)
        if attempt.end and attempt.end.status != "FAILED":
            return report_end(attempt.end._replace(id=name), console)
        if state.has_ended:
            end = attempt.end._replace(id=name) if attempt.end else _last_attempt(state, name)
            return report_end(end, console)
        line.show(*_status(kubectl, state, attempt.end, trouble))
    raise AssertionError("a RayJob has an end")


class AttemptLog:
    """The log of one attempt of a RayJob.

    Attributes:
        job_id: id of the attempt's Ray job.
        end: the Ray job, once it has ended.
    """

    def __init__(self, job_id: str, console: Console) -> None:
        self.job_id = job_id
        self.end: Job | None = None
        self._console, self._shown = console, 0

    def reader(self) -> Callable[[str], None]:
        """Return a function that is given the log from its start, and prints only what is new."""
        position = 0

        def read(text: str) -> None:
            nonlocal position
            unseen = text[max(self._shown - position, 0) :]
            position += len(text)
            self._shown = max(self._shown, position)
            self._console.print(unseen, end="", markup=False)

        return read


class _StatusLine:
    """Prints a line whenever the status changes, and a hint if it does not for a while."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._begin = self._since = time.monotonic()
        self._text, self._hinted = "", ""

    def show(self, text: str, hint: str = "") -> None:
        """Print the status if it has changed, or the hint if it has not for a minute."""
        now = time.monotonic()
        if text != self._text:
            minutes, seconds = divmod(int(now - self._begin), 60)
            self._console.print(f"{minutes:3d}:{seconds:02d}  {text}", markup=False)
            self._text, self._since = text, now
        elif hint and hint != self._hinted and now - self._since > _HINT_S:
            self._console.print(f"        {hint}", markup=False)
            self._hinted = hint


def _polled(kubectl: Kubectl, name: str, line: _StatusLine) -> Iterator[Object]:
    """Yield the RayJob again and again."""
    patient = Retrying(
        retry=retry_if_exception_type(KubectlError),
        stop=stop_after_delay(_PATIENCE_S),
        wait=wait_fixed(_POLL_S),
        before_sleep=lambda call: line.show(f"no response: {_reason(call)}"),
        reraise=True,
    )
    while True:
        try:
            rayjob = patient(get_rayjob, kubectl, name)
        except KubectlError as error:
            raise UserError(
                f"lost the connection to RayJob {name}, which continues ({error}); "
                f"{next_commands(kubectl, name)}"
            ) from error
        yield rayjob
        time.sleep(_POLL_S)


def _reason(call: Any) -> str:
    return str(call.outcome.exception())


def _read_log(kubectl: Kubectl, state: RayJobState, attempt: AttemptLog) -> str:
    """Print an attempt's log, if possible to its end; return the reason if it was not."""
    try:
        with _dashboard(kubectl, state) as cluster:
            attempt.end = cluster.follow(state.job_id, attempt.reader())
    except NoSuchJob:
        return "Running: the job is being submitted"
    except UserError as error:
        reason = re.sub(r"http://127\.0\.0\.1:\d+: ", "", str(error))  # the port changes each time
        return f"{state.phase}: the log cannot be read at the moment ({reason})"
    return ""


@contextmanager
def _dashboard(kubectl: Kubectl, state: RayJobState) -> Iterator[Cluster]:
    token = kubectl.secret(state.cluster, "auth_token")
    with kubectl.port_forward(state.service, PORTS["dashboard"]) as address:
        yield Cluster(f"http://{address}", token)


def _status(kubectl: Kubectl, state: RayJobState, end: Job | None, trouble: str) -> tuple[str, str]:
    """Return the status of a RayJob, and a hint."""
    if trouble:
        return trouble, ""
    if end:
        return f"an attempt failed with exit code {exit_code(end)}; retried if `retries` allow", ""
    return waiting_for(kubectl, state)


def _last_attempt(state: RayJobState, name: str) -> Job:
    """Return the end of the last attempt as the operator reports it, if its head is gone."""
    status = state.job_status
    if status != "SUCCEEDED":
        status = state.reason or status or state.phase
    return Job(name, "", status, state.message, state.exit_code)
