"""Which processes keep a node busy."""

import subprocess

import pytest

from prioritycut_ray.launch.drain import busy_workers
from tests.conftest import Prioritycut, assert_one_line
from tests.hosts import free_port
from tests.runs import await_truth


@pytest.mark.parametrize(
    ("title", "busy"),
    [
        ("ray::TrainWorker.run", True),
        ("ray::render_clip", True),
        ("ray::IDLE", False),
        ("ray::DashboardAgent", False),
        ("ray::RuntimeEnvAgent", False),
        ("ray::_AutoscalingCoordinatorActor", False),
        ("raylet", False),
    ],
)
def test_only_processes_with_tasks_or_actors_are_busy(title: str, busy: bool) -> None:
    mark = f"{title} of-this-test"
    process = subprocess.Popen([mark, "60"], executable="/bin/sleep")
    try:
        command = f"/proc/{process.pid}/cmdline"

        def started() -> bool:
            with open(command, "rb") as file:
                return file.read().startswith(mark.encode())

        await_truth(started, "the process has its title", 10)
        assert any(found.startswith(mark) for found in busy_workers()) is busy
    finally:
        process.kill()
        process.wait(10)
    assert not any(found.startswith(mark) for found in busy_workers())


def test_a_node_without_a_head_ends_at_once(
    prioritycut: Prioritycut, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`ray drain-node` alone tries for minutes, and a machine with GPUs waits for it."""
    address = f"127.0.0.1:{free_port()}"
    monkeypatch.setenv("RAY_ADDRESS", address)
    assert_one_line(prioritycut("jobs", "drain", "--seconds", "600"), address, "no Ray cluster")
