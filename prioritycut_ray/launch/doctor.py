"""What a run needs of its surroundings, looked at from the driver and from every node."""

import importlib.metadata
import io
import os
import platform
import shutil
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any, NamedTuple

import numpy as np
import ray
import torch
import torch.distributed as dist
from ray.exceptions import RayTaskError, WorkerCrashedError

from prioritycut_ray.data.shards import read_clip, read_index
from prioritycut_ray.errors import describe
from prioritycut_ray.ray_cluster.compat import node_memory, session_folder
from prioritycut_ray.ray_cluster.nodes import Node, on_every_node
from prioritycut_ray.ray_cluster.session import start_ray
from prioritycut_ray.storage.probe import NOT_SHARED, SHARE, check_writable, has_marker, marker
from prioritycut_ray.video.decoding import read_frames
from prioritycut_ray.video.encoding import write_video

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
"""Whose versions must be equal on all nodes."""
SMALLEST_SHM_BYTES = 512 * 2**20
"""Ray's objects and the loaders' batches travel through /dev/shm."""
SMALLEST_FREE_SHARE = 0.05
"""Ray stops storing objects on a disk with less."""
MOST_MEMORY_SHARE = 0.9
"""Ray kills workers at 0.95."""
MOST_SKEW_S = 1.0
_ANSWER_SECONDS = 180.0
"""Importing torch takes a minute on a busy node."""


class Check(NamedTuple):
    """One thing that was looked at.

    Attributes:
        place: ``driver`` or ``node ADDRESS``.
        name: of the thing.
        ok: whether it is as it should be.
        found: what was seen.
        fix: what to do if it is not ok, else empty.
    """

    place: str
    name: str
    ok: bool
    found: str
    fix: str = ""


class Seen(NamedTuple):
    """What one process has seen of its surroundings; ``checks`` have no place yet."""

    versions: dict[str, str]
    checks: list[Check]


class _Wrong(Exception):
    """Raised by a check: what was found, and the fix."""


def examine_cluster(address: str | None, storage: str | None, data: str | None) -> list[Check]:
    """Look at everything, from this process and from every node at once.

    Args:
        address: HOST:PORT of a cluster's head; joins RAY_ADDRESS or starts Ray here if None.
        storage: folder or URL that runs would be written to, looked at if given.
        data: folder or URL of a data set, looked at if given.

    Raises:
        UserError: the cluster cannot be joined.
    """
    start_ray(address)
    here = inspect(storage, data)
    checks = [check._replace(place="driver") for check in here.checks]
    seen_by_driver = all(check.ok for check in here.checks if check.name == "storage")
    with marker(storage) if storage and seen_by_driver else nullcontext() as name:
        answers = on_every_node(inspect, storage, data, name, seconds=_ANSWER_SECONDS)
    for node, answer in answers.items():
        checks += _of_node(f"node {node.address}", answer, here.versions)
    return checks + _clocks({node for node, answer in answers.items() if isinstance(answer, Seen)})


def _of_node(place: str, answer: Any, expected: Mapping[str, str]) -> list[Check]:
    if isinstance(answer, Seen):
        versions = compare_versions(place, answer.versions, expected)
        return [*(check._replace(place=place) for check in answer.checks), versions]
    return [unanswered(place, answer)]


def unanswered(place: str, error: BaseException) -> Check:
    """A finding on a node where the checks could not run."""
    words = describe(error)
    if isinstance(error, WorkerCrashedError):
        fix = "run there: python -c 'import torch, decord, av'; reinstall the one that crashes"
        return Check(place, "checks", False, f"their process died ({words})", fix)
    if isinstance(error, RayTaskError):
        fix = "install the same version of prioritycut_ray there, or use one image for all nodes"
        return Check(place, "checks", False, f"they cannot run there ({words})", fix)
    fix = "see `ray status`; if the node has just left the cluster, run this again"
    return Check(place, "checks", False, f"it does not answer ({words})", fix)


def compare_versions(place: str, versions: Mapping[str, str], expected: Mapping[str, str]) -> Check:
    """Compare a node's versions with the driver's."""
    different = [
        f"{name} {versions.get(name)}, not {expected.get(name)}"
        for name in sorted({*versions, *expected})
        if versions.get(name) != expected.get(name)
    ]
    if not different:
        return Check(place, "versions", True, "as the driver's")
    fix = "install the driver's versions there, or use one image for all nodes"
    return Check(place, "versions", False, "; ".join(different), fix)


def skew(sent: float, there: float, received: float) -> float:
    """By how many seconds a clock is off at least, if it was read between two times of another."""
    return max(0.0, sent - there, there - received)


def inspect(storage: str | None, data: str | None, marker_name: str | None = None) -> Seen:
    """Look at the surroundings of this process; no check stops another one.

    Args:
        storage: see :func:`examine_cluster`.
        data: see :func:`examine_cluster`.
        marker_name: name of a file in ``storage`` that the driver has written.
    """
    looks: dict[str, tuple[Callable[[], str], str]] = {
        "torch": (_torch, "install torch anew; for GPUs one built for the driver's CUDA"),
        "decoder": (_decoder, "install decord and av anew"),
        "/dev/shm": (_shm, "mount a tmpfs on /dev/shm"),
        "disk": (_disk, "free space on Ray's disk"),
        "memory": (_memory, "see `free -m`"),
        "CPUs": (_cpus, "start the node with fewer --num-cpus"),
    }
    if storage is not None:
        fix = "check the place, its permissions and its credentials (the same on all nodes)"
        looks["storage"] = (lambda: _storage(storage, marker_name), fix)
    if data is not None:
        looks["data"] = (lambda: _data(data), "make it readable from here, or pack it anew")
    return Seen(_versions(), [_look(name, *look) for name, look in looks.items()])


def _look(name: str, look: Callable[[], str], fix: str) -> Check:
    try:
        return Check("", name, True, look())
    except _Wrong as wrong:
        found, fix = wrong.args
        return Check("", name, False, found, fix)
    except Exception as error:  # Whatever it is, it is what the user wants to know.
        return Check("", name, False, describe(error), fix)


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "missing"
    return versions


def _resource(name: str) -> float:
    """How much of a resource Ray counts on this node."""
    here = ray.get_runtime_context().get_node_id()
    nodes = {node["NodeID"]: node["Resources"] for node in ray.nodes()}
    return float(nodes.get(here, {}).get(name, 0))


def _torch() -> str:
    counted, seen = _resource("GPU"), torch.cuda.device_count()
    found = f"torch {torch.__version__}, CUDA {torch.version.cuda or 'none'}"
    if seen < counted:
        raise _Wrong(
            f"{found}: Ray counts {counted:g} GPUs, torch sees {seen}",
            "install torch built for the driver's CUDA (see nvidia-smi), and give the container "
            "its GPUs",
        )
    if not seen:
        if not dist.is_gloo_available():
            raise _Wrong(f"{found}, without gloo", "install an official build of torch")
        return f"{found}, gloo"
    if seen > counted:
        raise _Wrong(
            f"{found}: torch sees {seen} GPUs, Ray counts {counted:g}",
            f"start the node with --num-gpus={seen}, or hide them by CUDA_VISIBLE_DEVICES",
        )
    if not dist.is_nccl_available():
        raise _Wrong(f"{found}, without NCCL", "install an official build of torch for Linux")
    for number in range(seen):
        torch.ones(8, device=f"cuda:{number}").sum().item()
    nccl = ".".join(map(str, torch.cuda.nccl.version()))
    return f"{found}, NCCL {nccl}, {seen} × {torch.cuda.get_device_name(0)}"


def _decoder() -> str:
    buffer, gray = io.BytesIO(), np.full((2, 32, 32, 3), 128, np.uint8)
    write_video(buffer, gray, 25.0)
    error = np.abs(read_frames(buffer.getvalue(), [1], 32).astype(float) - 128).max()
    if error > 8:
        raise _Wrong(f"a frame is off by {error:.0f} of 255", "install decord and av anew")
    return "a frame was encoded and decoded"


def _shm() -> str:
    usage = shutil.disk_usage("/dev/shm")
    found = f"{usage.free / 2**20:.0f} MiB free of {usage.total / 2**20:.0f}"
    if usage.free < SMALLEST_SHM_BYTES:
        raise _Wrong(
            f"{found}, {SMALLEST_SHM_BYTES / 2**20:.0f} are wanted",
            "Docker: --shm-size=2g; Kubernetes: an emptyDir with medium: Memory on /dev/shm",
        )
    return found


def _disk() -> str:
    session = session_folder()
    usage = shutil.disk_usage(session)
    found = f"{usage.free / 1e9:.1f} GB free of {usage.total / 1e9:.1f} at {session.parent}"
    if usage.free < SMALLEST_FREE_SHARE * usage.total:
        raise _Wrong(
            f"{found}: Ray stops at 5 %", "free space, or `ray start --temp-dir` elsewhere"
        )
    return found


def _memory() -> str:
    used, total = node_memory()
    found = f"{(total - used) / 2**30:.1f} GiB free of {total / 2**30:.1f}"
    if used > MOST_MEMORY_SHARE * total:
        raise _Wrong(f"{found}: Ray kills workers at 95 %", "end other programs on the node")
    return found


def _cpus() -> str:
    counted, usable = _resource("CPU"), len(os.sched_getaffinity(0))
    if counted > usable:
        raise _Wrong(
            f"Ray counts {counted:g}, {usable} are usable",
            f"start the node with --num-cpus={usable}",
        )
    return f"{counted:g} for Ray, {usable} usable"


def _storage(storage: str, marker_name: str | None) -> str:
    if marker_name is not None and not has_marker(storage, marker_name):
        raise _Wrong(f"{storage}: {NOT_SHARED}", SHARE)
    check_writable(storage)
    return f"{storage}: written, read and deleted"


def _data(url: str) -> str:
    index = read_index(url)
    clip = index.clips[0]
    read_frames(read_clip(url, clip), [0], 64)
    return f"{url}: {len(index.clips)} clips, a frame of {clip.key} decoded"


def _clocks(nodes: set[Node]) -> list[Check]:
    """Read the clock of every node between two readings of this one."""
    checks = []
    for _ in range(2):  # Again with processes that are warm: the bounds are close then.
        sent = time.time()
        readings = on_every_node(time_there, seconds=_ANSWER_SECONDS)
        received = time.time()
    for node, there in readings.items():
        if node in nodes and isinstance(there, float):
            checks.append(clock_check(f"node {node.address}", skew(sent, there, received)))
    return checks


def time_there() -> float:
    """This node's clock, in seconds since 1970."""
    return time.time()


def clock_check(place: str, seconds: float) -> Check:
    """Judge a skew against the driver's clock."""
    if seconds <= MOST_SKEW_S:
        return Check(place, "clock", True, "as the driver's")
    found = f"off by {seconds:.1f} s or more from the driver's"
    return Check(place, "clock", False, found, "run chronyd or another NTP client on that node")
