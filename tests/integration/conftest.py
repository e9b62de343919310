"""Trainings in their own processes, and one that is not disturbed."""

from pathlib import Path

import pytest

from tests.runs import Start


@pytest.fixture
def start(shards: Path, tmp_path: Path) -> Start:
    return Start(shards, tmp_path)


@pytest.fixture(scope="session")
def undisturbed(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was not disturbed."""
    start = Start(shards, tmp_path_factory.mktemp("undisturbed"))
    with start() as training:
        assert training.end() == 0, training.output()
    return start.run
