"""Checks of everything that a run needs, from the driver and from every node."""

import time
from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

from ray.exceptions import RayTaskError, WorkerCrashedError

from prioritycut_ray.errors import describe
from prioritycut_ray.launch.node_checks import CheckResult, NodeReport, check_this_node
from prioritycut_ray.ray_cluster.nodes import Node, on_every_node
from prioritycut_ray.ray_cluster.session import start_ray
from prioritycut_ray.storage.probe import marker

MAX_CLOCK_SKEW_S = 1.0
_ANSWER_SECONDS = 180.0
"""Importing torch takes a minute on a busy node."""


def check_cluster(address: str | None, storage: str | None, data: str | None) -> list[CheckResult]:
    """Run all checks in this process and on every node.

    Args:
        address: HOST:PORT of a cluster's head; defaults to RAY_ADDRESS, else starts Ray here.
        storage: folder or URL for runs; checked if given.
        data: folder or URL of a data set; checked if given.

    Raises:
        UserError: the cluster cannot be joined.
    """
    start_ray(address)
    here = check_this_node(storage, data)
    results = [result._replace(place="driver") for result in here.results]
    is_usable = all(result.ok for result in here.results if result.name == "storage")
    with marker(storage) if storage and is_usable else nullcontext() as name:
        answers = on_every_node(check_this_node, storage, data, name, seconds=_ANSWER_SECONDS)
    for node, answer in answers.items():
        results += _results_of(f"node {node.address}", answer, here.versions)
    answered = {node for node, answer in answers.items() if isinstance(answer, NodeReport)}
    return results + _check_clocks(answered)


def _results_of(place: str, answer: Any, expected: Mapping[str, str]) -> list[CheckResult]:
    if isinstance(answer, NodeReport):
        versions = compare_versions(place, answer.versions, expected)
        return [*(result._replace(place=place) for result in answer.results), versions]
    return [checks_failed(place, answer)]


def checks_failed(place: str, error: BaseException) -> CheckResult:
    """Return the result for a node where the checks could not run."""
    reason = describe(error)
    if isinstance(error, WorkerCrashedError):
        fix = "run there: python -c 'import torch, decord, av'; reinstall the one that crashes"
        return CheckResult(place, "checks", False, f"their process died ({reason})", fix)
    if isinstance(error, RayTaskError):
        fix = "install the same version of prioritycut_ray there, or use one image for all nodes"
        return CheckResult(place, "checks", False, f"they cannot run there ({reason})", fix)
    fix = "see `ray status`; if the node has just left the cluster, run this again"
    return CheckResult(place, "checks", False, f"the node does not respond ({reason})", fix)


def compare_versions(
    place: str, versions: Mapping[str, str], expected: Mapping[str, str]
) -> CheckResult:
    """Compare a node's versions with the driver's."""
    different = [
        f"{name} {versions.get(name)}, not {expected.get(name)}"
        for name in sorted({*versions, *expected})
        if versions.get(name) != expected.get(name)
    ]
    if not different:
        return CheckResult(place, "versions", True, "same as the driver's")
    fix = "install the driver's versions there, or use one image for all nodes"
    return CheckResult(place, "versions", False, "; ".join(different), fix)


def skew(sent: float, there: float, received: float) -> float:
    """Return the least skew of a clock in seconds, read between two readings of another."""
    return max(0.0, sent - there, there - received)


def _check_clocks(nodes: set[Node]) -> list[CheckResult]:
    """Read the clock of every node between two readings of this one."""
    for _ in range(2):  # the second time with warm processes, so that the bounds are tight
        sent = time.time()
        readings = on_every_node(read_clock, seconds=_ANSWER_SECONDS)
        received = time.time()
    return [
        check_clock(f"node {node.address}", skew(sent, there, received))
        for node, there in readings.items()
        if node in nodes and isinstance(there, float)
    ]


def read_clock() -> float:
    """Return this node's clock, in seconds since 1970."""
    return time.time()


def check_clock(place: str, skew_s: float) -> CheckResult:
    """Compare a skew with the largest one that is harmless."""
    if skew_s <= MAX_CLOCK_SKEW_S:
        return CheckResult(place, "clock", True, "same as the driver's")
    found = f"off by {skew_s:.1f} s or more from the driver's"
    return CheckResult(place, "clock", False, found, "run chronyd or another NTP client there")
