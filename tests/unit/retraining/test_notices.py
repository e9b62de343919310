"""Whom a retraining tells: trouble there is a sentence, never an exception."""

from datetime import UTC, datetime

import pytest

from prioritycut_ray.retraining import notices
from prioritycut_ray.retraining.notices import RetrainReport, post, run_command
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
        ("echo no mail today >&2; exit 3", "ended with code 3: no mail today"),
        ("exit 4", "ended with code 4: no message"),
        ("no-such-command-anywhere", "code 127"),
    ],
)
def test_a_command_gets_the_report_and_its_trouble_is_told(command: str, fragment: str) -> None:
    problem = run_command(command, REPORT)
    assert fragment in problem
    assert bool(problem) == bool(fragment)


def test_a_webhook_that_nobody_answers_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(notices, "_ATTEMPTS", 0)  # they take seconds
    url = f"http://127.0.0.1:{free_port()}/hook"
    assert f"webhook {url}: " in post(url, REPORT)
