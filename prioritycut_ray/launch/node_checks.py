"""Checks of the node that this process runs on, for ``prioritycut doctor``."""

import importlib.metadata
import io
import os
import platform
import shutil
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import ray
import torch
import torch.distributed as dist

from prioritycut_ray.data.index import read_index
from prioritycut_ray.data.shards import read_clip
from prioritycut_ray.errors import describe
from prioritycut_ray.ray_cluster.compat import node_memory, session_folder
from prioritycut_ray.storage.probe import NOT_SHARED, SHARE, check_writable, has_marker
from prioritycut_ray.video.encoding import write_video
from prioritycut_ray.video.random_access import read_frames

PACKAGES = (
    "prioritycut_ray",
    "ray",
    "torch",
    "torchvision",
    "timm",
    "numpy",
    "safetensors",
    "fsspec",
    "s3fs",
    "decord",
    "av",
)
"""Packages whose versions must be the same on all nodes."""
MIN_SHM_BYTES = 512 * 2**20
"""Ray's objects and the batches of data loaders are in /dev/shm."""
MIN_FREE_DISK = 0.05
"""Share of the disk; Ray stores no objects on a disk with less."""
MAX_USED_MEMORY = 0.9
"""Share of the memory; Ray kills workers at 0.95."""


class CheckResult(NamedTuple):
    """Result of one check.

    Attributes:
        place: ``driver`` or ``node ADDRESS``.
        name: of the check.
        ok: whether it passed.
        found: what was measured.
        fix: what to do if it failed, else empty.
    """

    place: str
    name: str
    ok: bool
    found: str
    fix: str = ""


class NodeReport(NamedTuple):
    """Versions and results of one process; the results have no place yet."""

    versions: dict[str, str]
    results: list[CheckResult]


class _CheckFailed(Exception):
    """Raised by a check with what was found, and the fix."""


def check_this_node(storage: str | None, data: str | None, marker: str | None = None) -> NodeReport:
    """Run all checks in this process; a check that fails does not stop the others.

    Args:
        storage: see :func:`~prioritycut_ray.launch.doctor.check_cluster`.
        data: see :func:`~prioritycut_ray.launch.doctor.check_cluster`.
        marker: name of a file in ``storage`` that the driver has written.
    """
    checks: dict[str, tuple[Callable[[], str], str]] = {
        "torch": (_torch, "reinstall torch; for GPUs, a build for the driver's CUDA version"),
        "decoder": (_decoder, "reinstall decord and av"),
        "/dev/shm": (_shm, "mount a tmpfs on /dev/shm"),
        "disk": (_disk, "free space on Ray's disk"),
        "memory": (_memory, "see `free -m`"),
        "CPUs": (_cpus, "start the node with fewer --num-cpus"),
    }
    if storage is not None:
        fix = "check the path or URL, its permissions and its credentials, on all nodes"
        checks["storage"] = (lambda: _storage(storage, marker), fix)
    if data is not None:
        checks["data"] = (lambda: _data(data), "make it readable from here, or pack it again")
    return NodeReport(_versions(), [_run(name, *check) for name, check in checks.items()])


def _run(name: str, check: Callable[[], str], fix: str) -> CheckResult:
    try:
        return CheckResult("", name, True, check())
    except _CheckFailed as failed:
        found, fix = failed.args
        return CheckResult("", name, False, found, fix)
    except Exception as error:  # whatever it is, it is a finding
        return CheckResult("", name, False, describe(error), fix)


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "missing"
    return versions


def _resource(name: str) -> float:
    """Return how much of a resource Ray counts on this node."""
    here = ray.get_runtime_context().get_node_id()
    nodes = {node["NodeID"]: node["Resources"] for node in ray.nodes()}
    return float(nodes.get(here, {}).get(name, 0))


def _torch() -> str:
    counted, seen = _resource("GPU"), torch.cuda.device_count()
    found = f"torch {torch.__version__}, CUDA {torch.version.cuda or 'none'}"
    if seen < counted:
        raise _CheckFailed(
            f"{found}: Ray counts {counted:g} GPUs, torch sees {seen}",
            "install a build of torch for the driver's CUDA version (see nvidia-smi), and give the "
            "container its GPUs",
        )
    if not seen:
        if not dist.is_gloo_available():
            raise _CheckFailed(f"{found}, without gloo", "install an official build of torch")
        return f"{found}, gloo"
    if seen > counted:
        raise _CheckFailed(
            f"{found}: torch sees {seen} GPUs, Ray counts {counted:g}",
            f"start the node with --num-gpus={seen}, or hide them with CUDA_VISIBLE_DEVICES",
        )
    if not dist.is_nccl_available():
        raise _CheckFailed(f"{found}, without NCCL", "install an official build of torch for Linux")
    for number in range(seen):
        torch.ones(8, device=f"cuda:{number}").sum().item()
    nccl = ".".join(map(str, torch.cuda.nccl.version()))
    return f"{found}, NCCL {nccl}, {seen} × {torch.cuda.get_device_name(0)}"


def _decoder() -> str:
    buffer, gray = io.BytesIO(), np.full((2, 32, 32, 3), 128, np.uint8)
    write_video(buffer, gray, 25.0)
    error = np.abs(read_frames(buffer.getvalue(), [1], 32).astype(float) - 128).max()
    if error > 8:
        raise _CheckFailed(f"a frame is off by {error:.0f} of 255", "reinstall decord and av")
    return "a frame was encoded and decoded"


def _shm() -> str:
    usage = shutil.disk_usage("/dev/shm")
    found = f"{usage.free / 2**20:.0f} MiB free of {usage.total / 2**20:.0f}"
    if usage.free < MIN_SHM_BYTES:
        raise _CheckFailed(
            f"{found}, {MIN_SHM_BYTES / 2**20:.0f} are needed",
            "Docker: --shm-size=2g; Kubernetes: an emptyDir with medium: Memory on /dev/shm",
        )
    return found


def _disk() -> str:
    session = session_folder()
    usage = shutil.disk_usage(session)
    found = f"{usage.free / 1e9:.1f} GB free of {usage.total / 1e9:.1f} at {session.parent}"
    if usage.free < MIN_FREE_DISK * usage.total:
        raise _CheckFailed(
            f"{found}: Ray stops at 5 %", "free space, or start Ray with --temp-dir on another disk"
        )
    return found


def _memory() -> str:
    used, total = node_memory()
    found = f"{(total - used) / 2**30:.1f} GiB free of {total / 2**30:.1f}"
    if used > MAX_USED_MEMORY * total:
        raise _CheckFailed(f"{found}: Ray kills workers at 95 %", "stop other programs on the node")
    return found


def _cpus() -> str:
    counted, usable = _resource("CPU"), len(os.sched_getaffinity(0))
    if counted > usable:
        raise _CheckFailed(
            f"Ray counts {counted:g}, {usable} are usable",
            f"start the node with --num-cpus={usable}",
        )
    return f"{counted:g} for Ray, {usable} usable"


def _storage(storage: str, marker: str | None) -> str:
    if marker is not None and not has_marker(storage, marker):
        raise _CheckFailed(f"{storage}: {NOT_SHARED}", SHARE)
    check_writable(storage)
    return f"{storage}: written, read and deleted"


def _data(url: str) -> str:
    index = read_index(url)
    clip = index.clips[0]
    read_frames(read_clip(url, clip), [0], 64)
    return f"{url}: {len(index.clips)} clips, a frame of {clip.key} decoded"
