"""The command line, with a file beside it of what its ranks do: for tests that kill them.

``python -m tests.watched BEATS train CONFIG ...`` writes a line of JSON into BEATS for every beat,
and one with the pids of the monitor and of Ray's controller. With ``GROW_BYTES`` set, rank 1 takes
that much memory, bit by bit, after ten steps; into ``SEEDS_FOLDER`` every rank writes its samples'
seeds, a line a step.
"""

import json
import os
import sys
import threading
import time
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError

from prioritycut_ray import cli
from prioritycut_ray.launch import driver as launch


def watch(monitor: Any, path: Path, ended: threading.Event) -> None:
    """Append the beats of all ranks to a file until the run has ended."""
    with path.open("a", buffering=1) as file:
        while not ended.wait(0.3):
            try:
                heard = ray.get(monitor.heard.remote(), timeout=10)
                actors = ray._private.state.actors()
            except RayError:
                continue
            alive = {
                a["ActorClassName"]: a["Pid"] for a in actors.values() if a["State"] == "ALIVE"
            }
            pids = {"monitor": alive.get("_Monitor"), "controller": alive.get("TrainController")}
            file.write(json.dumps(pids) + "\n")
            for item in heard.values():
                file.write(json.dumps(item.beat._asdict() | {"at": time.time() - item.ago}) + "\n")


def train_and_note(arguments: dict[str, Any]) -> None:
    """As the train function; sent to the workers by value, for this is the main module there."""
    import json
    import os
    import threading
    import time
    from pathlib import Path

    import ray.train

    from prioritycut_ray.launch.worker import train_on_worker
    from prioritycut_ray.training import trainer

    rank = ray.train.get_context().get_world_rank()
    prepare, steps = trainer.prepare, []

    def note(batch: Any, *rest: Any) -> Any:
        steps.append(len(steps))
        if "SEEDS_FOLDER" in os.environ:
            with Path(os.environ["SEEDS_FOLDER"], f"rank{rank}.jsonl").open("a") as file:
                file.write(json.dumps(batch.augment_seeds.tolist()) + "\n")
        return prepare(batch, *rest)

    def grow() -> None:
        taken: list[bytes] = []
        while sum(map(len, taken)) < int(os.environ.get("GROW_BYTES", 0)):
            if len(steps) >= 10 and rank == 1:
                taken.append(os.urandom(50_000_000))
            time.sleep(0.1)

    trainer.prepare = note
    threading.Thread(target=grow, daemon=True).start()
    train_on_worker(arguments)


def main() -> None:
    path = Path(sys.argv.pop(1))
    start, ended, threads = launch.start_monitor, threading.Event(), []

    def start_watched() -> Any:
        monitor = start()
        threads.append(threading.Thread(target=watch, args=(monitor, path, ended), daemon=True))
        threads[0].start()
        return monitor

    launch.start_monitor = start_watched
    if "GROW_BYTES" in os.environ or "SEEDS_FOLDER" in os.environ:
        launch.train_on_worker = train_and_note
    try:
        cli.main()
    finally:
        ended.set()  # before Ray ends: another call would start it again
        for thread in threads:
            thread.join(30)


if __name__ == "__main__":
    main()
