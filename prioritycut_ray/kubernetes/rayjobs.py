"""The state of a RayJob, as the operator reports it."""

import re
import shlex
from typing import Any, NamedTuple

from prioritycut_ray.errors import UserError, one_line
from prioritycut_ray.kubernetes.kubectl import Kubectl, KubectlError
from prioritycut_ray.kubernetes.pods import Object


class RayJobState(NamedTuple):
    """The state of a RayJob.

    Attributes:
        phase: its jobDeploymentStatus; empty until the operator acts on it.
        job_status: status of the Ray job.
        job_id: id of the current attempt's Ray job.
        cluster: name of the RayCluster.
        service: name of the head's service.
        reason: the operator's reason for the phase.
        message: the operator's message.
        is_suspended: whether the RayJob is suspended, for example by Kueue.
    """

    phase: str
    job_status: str
    job_id: str
    cluster: str
    service: str
    reason: str
    message: str
    is_suspended: bool

    @classmethod
    def of(cls, rayjob: Object) -> "RayJobState":
        """Return the state of a RayJob."""
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
            message=one_line(status.get("message") or ""),
            is_suspended=bool((rayjob.get("spec") or {}).get("suspend")),
        )

    @property
    def has_ended(self) -> bool:
        """Whether there will be no further attempt."""
        return self.phase in ("Complete", "Failed", "ValidationFailed")

    @property
    def may_have_log(self) -> bool:
        """Whether a running head may know the Ray job."""
        return bool(self.job_id and self.cluster) and self.phase in (
            "Running",
            "Complete",
            "Failed",
        )

    @property
    def exit_code(self) -> int | None:
        """Exit code of the last attempt's driver, if the operator reports it."""
        if self.job_status == "SUCCEEDED":
            return 0
        found = re.search(r"exit code (\d+)", self.message)
        return int(found[1]) if found else None


def get_rayjob(kubectl: Kubectl, name: str) -> Object:
    """Return a RayJob.

    Raises:
        UserError: it does not exist.
    """
    rayjob = kubectl.get("rayjob", name)
    if rayjob is None:
        raise UserError(
            f"{name}: there is no such RayJob in namespace {kubectl.namespace}, or it was deleted; "
            f"list them with `{kubectl.shown('get', 'rayjobs')}`"
        )
    return rayjob


def waiting_for(kubectl: Kubectl, state: RayJobState) -> tuple[str, str]:
    """Return what a RayJob is waiting for, and a hint where to look if that takes long."""
    if state.is_suspended or state.phase in ("Suspending", "Suspended"):
        return "waiting in the queue", ""
    if not state.phase:
        return (
            "waiting for the operator",
            f"is KubeRay's operator running, and does it watch namespace {kubectl.namespace}?",
        )
    if state.phase == "Initializing":
        events = kubectl.shown("get", "events")
        return f"Initializing: {_workers(kubectl, state)}", f"`{events}` shows why pods are pending"
    return state.phase, ""


def _workers(kubectl: Kubectl, state: RayJobState) -> str:
    try:
        cluster = kubectl.get("raycluster", state.cluster) or {}
    except KubectlError:  # no permission, or no response at the moment
        return "waiting for pods"
    status = cluster.get("status") or {}
    up, wanted = (status.get(f"{kind}WorkerReplicas") or 0 for kind in ("available", "desired"))
    return f"{up} of {wanted} workers are up" if wanted else "the cluster is being created"


def next_commands(kubectl: Kubectl, name: str) -> str:
    """Return how to follow a RayJob, and how to stop it."""
    delete = kubectl.shown("delete", "rayjob", name)
    follow = follow_command(kubectl, name)
    return f"follow it with `{follow}`, or stop it with `{delete}` (it saves its state first)"


def follow_command(kubectl: Kubectl, name: str) -> str:
    """Return the command that follows a RayJob."""
    words = ["prioritycut", "jobs", "logs", name, "--follow", "--kubernetes", *kubectl.flags]
    return shlex.join(words)
