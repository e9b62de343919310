"""Trainings in processes of their own, and one that nothing happens to."""

from pathlib import Path

import pytest

from tests.runs import Start


@pytest.fixture
def start(shards: Path, tmp_path: Path) -> Start:
    return Start(shards, tmp_path)


@pytest.fixture(scope="session")
def quiet(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that nothing happened to."""
    start = Start(shards, tmp_path_factory.mktemp("quiet"))
    with start() as training:
        assert training.end() == 0, training.output()
    return start.run
