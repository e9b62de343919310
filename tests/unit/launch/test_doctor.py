"""Findings as plain data, without a cluster."""

import pytest
from ray.exceptions import (
    AuthenticationError,
    GetTimeoutError,
    TaskUnschedulableError,
    WorkerCrashedError,
)

from prioritycut_ray.errors import UserError
from prioritycut_ray.launch.doctor import clock_check, compare_versions, skew, unanswered
from prioritycut_ray.ray_cluster.session import start_ray
from tests.hosts import free_port


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
    assert clock_check("node a", 0.2).ok
    check = clock_check("node a", 7.25)
    assert not check.ok
    assert "7.2 s" in check.found
    assert "NTP" in check.fix


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (TaskUnschedulableError("the node is gone"), "does not answer (TaskUnschedulableError"),
        (GetTimeoutError("late"), "does not answer (GetTimeoutError: late"),
        (WorkerCrashedError(), "their process died"),
    ],
)
def test_a_node_that_does_not_answer_is_a_finding(error: Exception, words: str) -> None:
    check = unanswered("node 10.0.0.3", error)
    assert not check.ok
    assert words in check.found
    assert check.fix


def test_an_address_where_nobody_listens_is_told_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    address = f"127.0.0.1:{free_port()}"
    with pytest.raises(UserError, match=rf"{address}: no Ray cluster answers .*6379"):
        start_ray(address)


@pytest.mark.parametrize(
    ("address", "words"),
    [
        ("ray://10.0.0.1:10001", "Ray's client.*prioritycut submit"),
        ("http://10.0.0.1:8265", "dashboard; submit there"),
        ("10.0.0.1", "give HOST:PORT"),
        ("10.0.0.1:70000", "give HOST:PORT"),
        ("head:port", "give HOST:PORT"),
    ],
)
def test_an_address_that_is_not_one_of_a_head_says_what_to_give(
    monkeypatch: pytest.MonkeyPatch, address: str, words: str
) -> None:
    import ray

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    with pytest.raises(UserError, match=words) as caught:
        start_ray(address)
    assert "TOKEN" not in str(caught.value)


@pytest.mark.parametrize(
    ("address", "error", "words"),
    [
        ("auto", ConnectionError("Could not find any running Ray instance."), "unset it to start"),
        (None, SystemExit(15), "head of a Ray cluster"),
        (None, AuthenticationError("no token. Set it"), "rejected the authentication token.*TOKEN"),
    ],
)
def test_what_ray_says_of_an_address_is_told_apart(
    monkeypatch: pytest.MonkeyPatch, address: str | None, error: BaseException, words: str
) -> None:
    """In Ray's place: whether `auto` finds a cluster depends on what else runs on the machine."""
    import ray

    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", fail)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with pytest.raises(UserError, match=words) as caught:
        start_ray(address)
    assert ("TOKEN" in str(caught.value)) == isinstance(error, AuthenticationError)
