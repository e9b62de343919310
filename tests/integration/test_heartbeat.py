"""The monitor actor and the private parts of Ray that need a running cluster."""

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.util.placement_group import placement_group, placement_group_table

from prioritycut_ray.launch.heartbeat import Heartbeat, start_monitor
from prioritycut_ray.ray_cluster import compat
from tests.runs import await_truth

pytestmark = [pytest.mark.integration, pytest.mark.usefixtures("local_ray")]


def heartbeat(rank: int, step: int) -> Heartbeat:
    return Heartbeat(rank, "0" * 56, "127.0.0.1", 4711, "", 0, step, "update", 0.1, 0)


def test_heartbeats_messages_and_the_request_to_stop() -> None:
    monitor = start_monitor()
    assert monitor.has_no_workers()
    assert not monitor.report(heartbeat(0, 3))
    assert not monitor.report(heartbeat(1, 4))
    received = monitor.heartbeats()
    assert {rank: r.heartbeat.step for rank, r in received.items()} == {0: 3, 1: 4}
    assert all(0 <= r.age_s < 60 for r in received.values())
    assert not monitor.has_no_workers()
    monitor.send_message("rank 1: a warning")
    monitor.send_message({"step": 3.0})
    assert monitor.take_messages() == ["rank 1: a warning", {"step": 3.0}]
    assert monitor.take_messages() == []
    monitor.request_stop()
    assert monitor.stop_requested()
    assert monitor.report(heartbeat(0, 5))
    monitor.forget_heartbeats()
    assert monitor.has_no_workers()


def test_a_monitor_that_died_is_restarted_and_learns_from_the_next_heartbeat() -> None:
    monitor = start_monitor()
    monitor.report(heartbeat(0, 3))
    ray.kill(monitor._actor, no_restart=False)

    def is_back() -> bool:
        monitor.report(heartbeat(0, 4))  # never raises
        return {r.heartbeat.step for r in monitor.heartbeats().values()} == {4}

    await_truth(is_back, "the actor is restarted", 60)


def test_a_message_to_a_monitor_that_just_died_arrives_after_its_restart() -> None:
    monitor = start_monitor()
    os.kill(ray.get(monitor._actor.__ray_call__.remote(_pid)), signal.SIGKILL)
    monitor.send_message("rank 1: lost node")
    await_truth(lambda: monitor.take_messages() == ["rank 1: lost node"], "the message")


def _pid(actor: object) -> int:
    return os.getpid()


def test_other_processes_use_the_same_monitor() -> None:
    monitor = start_monitor()
    ray.get(ray.remote(num_cpus=0)(_report).remote(monitor))
    assert list(monitor.heartbeats()) == [5]


def _report(monitor: Any) -> None:
    monitor.report(heartbeat(5, 1))


def test_private_parts_of_ray_on_a_running_cluster() -> None:
    assert compat.draining_nodes() == set()
    assert compat.reports_autoscaler() is False
    assert compat.session_folder().is_dir()
    assert os.environ["RAY_USAGE_STATS_ENABLED"] == "0"
    folder = ray.get(ray.remote(num_cpus=0)(_session_folder).remote())
    assert folder == compat.session_folder(), "the same on every process of a node"


def _session_folder() -> Path:
    return compat.session_folder()


def test_a_placement_group_is_removed_by_its_id() -> None:
    group = placement_group([{"CPU": 0.01}])
    ray.get(group.ready(), timeout=60)
    compat.remove_placement_group_by_id(group.id.hex())
    await_truth(
        lambda: placement_group_table(group)["state"] == "REMOVED", "the group is removed", 60
    )
