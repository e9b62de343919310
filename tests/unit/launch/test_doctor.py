"""Results of checks, without a cluster."""

import pytest
from ray.exceptions import GetTimeoutError, TaskUnschedulableError, WorkerCrashedError

from prioritycut_ray.launch.doctor import check_clock, checks_failed, compare_versions, skew


def test_versions_are_equal_or_named() -> None:
    ours = {"python": "3.11.7", "ray": "2.60.0", "av": "14.0"}
    assert compare_versions("node a", dict(ours), ours).ok
    check = compare_versions("node a", {**ours, "av": "missing", "numpy": "2.0"}, ours)
    assert not check.ok
    assert check.found == "av missing, not 14.0; numpy 2.0, not None"
    assert "image" in check.fix


def test_a_clock_is_off_only_if_it_reads_outside_of_the_drivers_two_readings() -> None:
    assert skew(10.0, 10.5, 11.0) == 0
    assert skew(10.0, 7.0, 11.0) == 3
    assert skew(10.0, 13.0, 11.0) == 2
    assert check_clock("node a", 0.2).ok
    check = check_clock("node a", 7.25)
    assert not check.ok
    assert "7.2 s" in check.found
    assert "NTP" in check.fix


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (TaskUnschedulableError("the node is gone"), "does not respond (TaskUnschedulableError"),
        (GetTimeoutError("late"), "does not respond (GetTimeoutError: late"),
        (WorkerCrashedError(), "their process died"),
    ],
)
def test_a_node_that_does_not_respond_is_a_finding(error: Exception, words: str) -> None:
    check = checks_failed("node 10.0.0.3", error)
    assert not check.ok
    assert words in check.found
    assert check.fix
