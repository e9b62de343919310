"""The command line with a log of its heartbeats, for tests that kill its processes.

``python -m tests.watched LOG train CONFIG ...`` appends a line of JSON to LOG for every heartbeat,
and one with the pids of the monitor and of Ray's controller. With ``GROW_BYTES``, rank 1 allocates
that much memory, bit by bit, after ten steps. Into ``SEEDS_FOLDER`` every rank writes the seeds of
its samples, one line per step.
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
from prioritycut_ray.launch import driver
from prioritycut_ray.launch.heartbeat import HeartbeatMonitor


def watch(monitor: HeartbeatMonitor, path: Path, ended: threading.Event) -> None:
    """Append the heartbeats of all ranks to a file until the run has ended."""
    with path.open("a", buffering=1) as file:
        while not ended.wait(0.3):
            received = monitor.heartbeats()
            try:
                actors = ray._private.state.actors()
            except RayError:
                continue
            alive = {
                a["ActorClassName"]: a["Pid"] for a in actors.values() if a["State"] == "ALIVE"
            }
            pids = {
                "monitor": alive.get("_MonitorActor"),
                "controller": alive.get("TrainController"),
            }
            file.write(json.dumps(pids) + "\n")
            for heartbeat, age_s in received.values():
                file.write(json.dumps(heartbeat._asdict() | {"at": time.time() - age_s}) + "\n")


def train_and_record(arguments: dict[str, Any]) -> None:
    """The train function; pickled by value, because it is defined in the main module."""
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

    def recorded(batch: Any, *rest: Any) -> Any:
        steps.append(len(steps))
        if "SEEDS_FOLDER" in os.environ:
            with Path(os.environ["SEEDS_FOLDER"], f"rank{rank}.jsonl").open("a") as file:
                file.write(json.dumps(batch.augment_seeds.tolist()) + "\n")
        return prepare(batch, *rest)

    def grow() -> None:
        taken: list[bytes] = []
        deadline = time.monotonic() + 240
        while sum(map(len, taken)) < int(os.environ["GROW_BYTES"]) and time.monotonic() < deadline:
            if len(steps) >= 10:
                taken.append(os.urandom(50_000_000))
            time.sleep(0.1)

    trainer.prepare = recorded
    if rank == 1 and "GROW_BYTES" in os.environ:
        threading.Thread(target=grow, daemon=True).start()
    train_on_worker(arguments)


def main() -> None:
    path = Path(sys.argv.pop(1))
    start, ended, threads = driver.start_monitor, threading.Event(), []

    def start_watched() -> HeartbeatMonitor:
        monitor = start()
        threads.append(threading.Thread(target=watch, args=(monitor, path, ended), daemon=True))
        threads[0].start()
        return monitor

    driver.start_monitor = start_watched
    if "GROW_BYTES" in os.environ or "SEEDS_FOLDER" in os.environ:
        driver.train_on_worker = train_and_record
    try:
        cli.main()
    finally:
        ended.set()  # before Ray ends: another call would start Ray again
        for thread in threads:
            thread.join(30)


if __name__ == "__main__":
    main()
