"""A RayJob that exists: followed by the user's kubectl, left, and followed again."""

import re
import shlex
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, NamedTuple

from rich.console import Console
from tenacity import Retrying, retry_if_exception_type, stop_after_delay, wait_fixed

from prioritycut_ray.commands.submit import detaching, report_end
from prioritycut_ray.errors import UserError
from prioritycut_ray.kubernetes.kubectl import Kubectl, KubectlError
from prioritycut_ray.kubernetes.options import ManifestOptions
from prioritycut_ray.kubernetes.pods import PORTS, Object
from prioritycut_ray.ray_cluster.jobs import Cluster, Job, NoSuchJob, exit_code

_POLL_S = 2
_PATIENCE_S = 300
"""For an API server that does not answer, while the job goes on."""
_HINT_S = 60
"""Without a change, after which it is said where to look."""


# Leaving, and coming back.


def detaching_from(kubectl: Kubectl, name: str) -> AbstractContextManager[None]:
    """Ctrl-C and SIGTERM leave a RayJob alone; see :func:`detaching`."""
    return detaching(f"RayJob {name} goes on: {ways(kubectl, name)}")


def ways(kubectl: Kubectl, name: str) -> str:
    """How to follow a RayJob, and how to stop it."""
    delete = kubectl.shown("delete", "rayjob", name)
    follow = follow_line(kubectl, name)
    return f"follow it with `{follow}`, or stop it with `{delete}` (it saves first)"


def follow_line(kubectl: Kubectl, name: str) -> str:
    """The command that follows a RayJob."""
    words = ["prioritycut", "jobs", "logs", name, "--follow", "--kubernetes", *kubectl.flags]
    return shlex.join(words)


# Following.


class State(NamedTuple):
    """What the operator says of a RayJob."""

    phase: str
    """Its jobDeploymentStatus; empty until the operator has taken it up."""
    job_status: str
    job_id: str
    """Of the attempt; another one after a retry."""
    cluster: str
    service: str
    """Of the cluster's head."""
    reason: str
    message: str
    is_suspended: bool

    @classmethod
    def of(cls, rayjob: Object) -> "State":
        """The state of a RayJob."""
        status: dict[str, Any] = rayjob.get("status") or {}
        cluster = status.get("rayClusterName") or ""
        host = (status.get("dashboardURL") or "").partition(":")[0]
        return cls(
            phase=status.get("jobDeploymentStatus") or "",
            job_status=status.get("jobStatus") or "",
            job_id=status.get("jobId") or "",
            cluster=cluster,
            service=host.partition(".")[0] or f"{cluster}-head-svc",
            reason=status.get("reason") or "",
            message=" ".join((status.get("message") or "").split()),
            is_suspended=bool((rayjob.get("spec") or {}).get("suspend")),
        )

    @property
    def has_ended(self) -> bool:
        """Whether no further attempt comes."""
        return self.phase in ("Complete", "Failed", "ValidationFailed")

    @property
    def may_have_log(self) -> bool:
        """Whether its Ray job may be known to a head that runs."""
        return bool(self.job_id and self.cluster) and self.phase in (
            "Running",
            "Complete",
            "Failed",
        )

    def as_job(self, name: str) -> Job:
        """The end of the last attempt, where its head is gone and cannot say more."""
        status = self.reason or self.job_status or self.phase
        found = re.search(r"exit code (\d+)", self.message)
        if self.job_status == "SUCCEEDED":
            return Job(name, "", self.job_status, self.message, 0)
        return Job(name, "", status, self.message, int(found[1]) if found else None)


class Attempt:
    """One attempt of a RayJob.

    Attributes:
        job_id: of its Ray job.
        end: the Ray job, once it has ended.
    """

    def __init__(self, job_id: str, console: Console) -> None:
        self.job_id = job_id
        self.end: Job | None = None
        self._console, self._shown = console, 0

    def reader(self) -> Callable[[str], None]:
        """Takes the log from its beginning, again and again, and shows each character once."""
        position = 0

        def read(text: str) -> None:
            nonlocal position
            unseen = text[max(self._shown - position, 0) :]
            position += len(text)
            self._shown = max(self._shown, position)
            self._console.print(unseen, end="", markup=False)

        return read


class _Progress:
    """One line for each change of what a job waits for, and after a while a hint."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._begin = self._since = time.monotonic()
        self._text, self._hinted = "", ""

    def show(self, text: str, hint: str = "") -> None:
        """Say what the job waits for, and after a minute of it where to look."""
        now = time.monotonic()
        if text != self._text:
            minutes, seconds = divmod(int(now - self._begin), 60)
            self._console.print(f"{minutes:3d}:{seconds:02d}  {text}", markup=False)
            self._text, self._since = text, now
        elif hint and hint != self._hinted and now - self._since > _HINT_S:
            self._console.print(f"        {hint}", markup=False)
            self._hinted = hint


def follow(kubectl: Kubectl, name: str, console: Console) -> int:
    """Wait for a RayJob's cluster, and show the log of each attempt until the last one ends.

    Returns:
        The exit code of the last attempt's driver.

    Raises:
        UserError: there is no such RayJob, or the API server does not answer any more.
    """
    progress, attempt = _Progress(console), Attempt("", console)
    for rayjob in _versions(kubectl, name, progress):
        state, trouble = State.of(rayjob), ""
        if state.job_id not in ("", attempt.job_id):
            attempt = Attempt(state.job_id, console)
        if attempt.end is None and state.may_have_log:
            trouble = _read_log(kubectl, state, attempt, console)
        if attempt.end and attempt.end.status != "FAILED":
            return report_end(attempt.end._replace(id=name), console)
        if state.has_ended:
            end = attempt.end._replace(id=name) if attempt.end else state.as_job(name)
            return report_end(end, console)
        progress.show(*_waits_for(kubectl, state, attempt.end, trouble))
    raise AssertionError("a RayJob has an end")


def _versions(kubectl: Kubectl, name: str, progress: _Progress) -> Iterator[Object]:
    """The RayJob as it is now, again and again."""
    patient = Retrying(
        retry=retry_if_exception_type(KubectlError),
        stop=stop_after_delay(_PATIENCE_S),
        wait=wait_fixed(_POLL_S),
        before_sleep=lambda call: progress.show(f"no answer: {_reason(call)}"),
        reraise=True,
    )
    while True:
        try:
            rayjob = patient(existing, kubectl, name)
        except KubectlError as error:
            raise UserError(
                f"lost sight of RayJob {name}, it goes on ({error}); {ways(kubectl, name)}"
            ) from error
        yield rayjob
        time.sleep(_POLL_S)


def _reason(call: Any) -> str:
    return str(call.outcome.exception())


def existing(kubectl: Kubectl, name: str) -> Object:
    """A RayJob.

    Raises:
        UserError: there is none of this name.
    """
    rayjob = kubectl.get("rayjob", name)
    if rayjob is None:
        raise UserError(
            f"{name}: there is no such RayJob in namespace {kubectl.namespace}, or it was deleted; "
            f"`{kubectl.shown('get', 'rayjobs')}` lists them"
        )
    return rayjob


def _read_log(kubectl: Kubectl, state: State, attempt: Attempt, console: Console) -> str:
    """Show an attempt's log, if possible to its end; gives what stood in the way."""
    try:
        with _dashboard(kubectl, state) as cluster:
            attempt.end = cluster.follow(state.job_id, attempt.reader())
    except NoSuchJob:
        return "Running: the job is being submitted"
    except UserError as error:
        reason = re.sub(r"http://127\.0\.0\.1:\d+: ", "", str(error))  # another port each time
        return f"{state.phase}: the log cannot be read now ({reason})"
    return ""


@contextmanager
def _dashboard(kubectl: Kubectl, state: State) -> Iterator[Cluster]:
    token = kubectl.secret(state.cluster, "auth_token")
    with kubectl.port_forward(state.service, PORTS["dashboard"]) as address:
        yield Cluster(f"http://{address}", token)


def _waits_for(kubectl: Kubectl, state: State, end: Job | None, trouble: str) -> tuple[str, str]:
    """What a job waits for, and where to look if that takes long."""
    if trouble:
        return trouble, ""
    if end:
        return f"an attempt ended with exit code {exit_code(end)}; retried if `retries` allow", ""
    if state.is_suspended or state.phase in ("Suspending", "Suspended"):
        return "waiting in the queue", ""
    if not state.phase:
        return (
            "waiting for the operator",
            f"is KubeRay's operator running, and does it watch namespace {kubectl.namespace}?",
        )
    if state.phase == "Initializing":
        events = kubectl.shown("get", "events")
        return f"Initializing: {_workers(kubectl, state)}", f"`{events}` says what pods wait for"
    return state.phase, ""


def _workers(kubectl: Kubectl, state: State) -> str:
    try:
        cluster = kubectl.get("raycluster", state.cluster) or {}
    except KubectlError:  # no right to look, or no answer now
        return "waiting for pods"
    status = cluster.get("status") or {}
    up, wanted = (status.get(f"{kind}WorkerReplicas") or 0 for kind in ("available", "desired"))
    return f"{up} of {wanted} workers are up" if wanted else "the cluster is being created"


def logs(
    name: str, namespace: str | None, context: str | None, *, is_followed: bool, console: Console
) -> int:
    """Show the log of a RayJob that was submitted before.

    Args:
        name: of the RayJob.
        namespace: the manifests' own if None.
        context: of kubectl.
        is_followed: show it to the end, and give the exit code of the driver.
        console: where it is shown.

    Raises:
        UserError: there is no such RayJob, or it has no log yet and is not followed.
        Detached: Ctrl-C; the job goes on.
    """
    kubectl = Kubectl(namespace or ManifestOptions().namespace, context)
    if not is_followed:
        _show_log(kubectl, name, console)
        return 0
    existing(kubectl, name)  # without patience for an API server that nobody has reached yet
    with detaching_from(kubectl, name):
        return follow(kubectl, name, console)


def _show_log(kubectl: Kubectl, name: str, console: Console) -> None:
    state = State.of(existing(kubectl, name))
    if not state.may_have_log:
        raise UserError(
            f"RayJob {name} has no log yet: it is {state.phase or 'not taken up by the operator'}; "
            f"follow it with `{follow_line(kubectl, name)}`"
        )
    with _dashboard(kubectl, state) as cluster:
        console.print(cluster.logs(state.job_id), end="", markup=False)
