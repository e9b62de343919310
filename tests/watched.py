"""The command line, with a file beside it of what its ranks do: for tests that kill them.

``python -m tests.watched BEATS train CONFIG ...`` writes a line of JSON into BEATS for every beat.
"""

import json
import sys
import threading
import time
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError

from prioritycut_ray import cli, launch


def watch(monitor: Any, path: Path) -> None:
    """Append the beats of all ranks to a file until the monitor is gone."""
    with path.open("a", buffering=1) as file:
        while True:
            try:
                heard = ray.get(monitor.heard.remote())
            except RayError:
                continue
            for item in heard.values():
                file.write(json.dumps(item.beat._asdict() | {"at": time.time() - item.ago}) + "\n")
            time.sleep(0.3)


def main() -> None:
    path = Path(sys.argv.pop(1))
    start = launch.start_monitor

    def start_watched() -> Any:
        monitor = start()
        threading.Thread(target=watch, args=(monitor, path), daemon=True).start()
        return monitor

    launch.start_monitor = start_watched
    cli.main()


if __name__ == "__main__":
    main()
