"""Training in this process gives the weights of one worker of Ray Train."""

from pathlib import Path

import pytest

from prioritycut_ray.config import load_config
from prioritycut_ray.launch.driver import launch
from prioritycut_ray.launch.in_process import train_in_process
from tests.places import TINY, TINY_TPS
from tests.runs import assert_same_weights

pytestmark = [pytest.mark.integration, pytest.mark.usefixtures("local_ray")]


@pytest.mark.parametrize(
    "source",
    [
        pytest.param(TINY, id="first_order"),
        pytest.param(TINY_TPS, id="thin_plate", marks=pytest.mark.slow),
    ],
)
def test_the_weights_are_those_of_one_worker(shards: Path, tmp_path: Path, source: Path) -> None:
    """In the thin-plate family the background's motion begins in the third of four steps."""
    runs = []
    for workers, train in (1, launch), (0, train_in_process):
        words = [f"data.url={shards}", f"storage={tmp_path}", f"train.workers={workers}"]
        words += ["train.samples=16", "train.checkpoint_every=100"]
        config = load_config(str(source), [*words, f"name=workers-{workers}"])
        runs.append(Path(train(config, lambda metrics: None, print)))
    assert_same_weights(*runs)
