"""Notifications of a retraining: a failure is a message, never an exception."""

from datetime import UTC, datetime

import pytest

from prioritycut_ray.retraining.notifications import RetrainReport, post, run_command
from tests.hosts import free_port

REPORT = RetrainReport(
    outcome="refused",
    candidate="candidate-1",
    current="first",
    compared_with="first",
    reason="worse",
    new_clips=3,
    samples=16,
    begun=datetime(2026, 1, 1, tzinfo=UTC),
    verdict=None,
    comparison=None,
)


@pytest.mark.parametrize(
    ("command", "fragment"),
    [
        ('test "$PRIORITYCUT_OUTCOME" = refused && grep -q candidate-1', ""),
        ("echo no mail today >&2; exit 3", "failed with exit code 3: no mail today"),
        ("exit 4", "failed with exit code 4: no message"),
        ("no-such-command-anywhere", "exit code 127"),
    ],
)
def test_a_command_gets_the_report_and_its_failure_is_reported(command: str, fragment: str) -> None:
    problem = run_command(command, REPORT)
    assert fragment in problem
    assert bool(problem) == bool(fragment)


def test_a_webhook_that_does_not_answer_is_reported() -> None:
    url = f"http://127.0.0.1:{free_port()}/hook"
    assert f"webhook {url}: " in post(url, REPORT, retries=0)
