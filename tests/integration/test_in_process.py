"""Training in this process gives the weights of one worker of Ray Train."""

from pathlib import Path

import pytest

from prioritycut_ray.config import load_config
from prioritycut_ray.launch.driver import launch
from prioritycut_ray.launch.in_process import train_in_process
from tests.places import TINY
from tests.runs import assert_same_weights

pytestmark = [pytest.mark.integration, pytest.mark.usefixtures("local_ray")]


def test_the_weights_are_those_of_one_worker(shards: Path, tmp_path: Path) -> None:
    runs = []
    for workers, train in (1, launch), (0, train_in_process):
        words = [f"data.url={shards}", f"storage={tmp_path}", f"train.workers={workers}"]
        config = load_config(str(TINY), [*words, f"name=workers-{workers}"])
        runs.append(Path(train(config, lambda metrics: None, print)))
    assert_same_weights(*runs)
