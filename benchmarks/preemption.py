"""Ray's protocol of a preempted run at CPU size: steps that are wasted; in Markdown.

    python benchmarks/preemption.py --out results             # all ways, twenty minutes or so
    python benchmarks/preemption.py undisturbed --out results # one at a time

Ray's release test (github.com/ray-project/ray/pull/65047) trains 1600 steps with a checkpoint every
400 on 8 workers, and preempts them four times, so that five attempts run: 517 steps were wasted
with periodic checkpoints alone, 91 with a checkpoint just in time. Here, the same fractions of a
run of 400 steps with two workers, each on a Ray node of its own; networks of tests/data/tiny.yaml;
synthetic clips.

- undisturbed: no preemption; its weights are the reference.
- periodic: both workers die at the steps at which Ray's run was preempted, so only periodic
  checkpoints help.
- ours: at the same steps, the node of one worker is drained with a notice, and killed once it was
  left (1 and 2), or killed at once, before anything was saved (3 and 4).

A step counts as wasted if it was begun and had to be begun again, as every rank records itself.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

import typer
from command_line import run_command

sys.path.insert(0, str(Path(__file__).parents[1]))

from prioritycut_ray.runs.locate import find_checkpoint
from tests.clip_sets import write_set
from tests.hosts import BIN, Cluster, environment
from tests.places import TINY
from tests.runs import Rank, Training, assert_same_weights, await_truth

ENVIRON = environment()
WAYS = ("undisturbed", "periodic", "ours")
RAYS_STEPS, RAYS_INTERVAL = 1600, 400
RAYS_PREEMPTIONS = (696, 867, 1396, 1548)
"""Where Ray's own run was preempted, from its published ``resumed_from_steps``."""
BATCH = 4

Preempt = Callable[[int, Cluster, Training, dict[int, Rank]], None]


def main(
    ways: Annotated[list[str] | None, typer.Argument(help="Some of: " + ", ".join(WAYS))] = None,
    out: Annotated[Path, typer.Option(help="Folder of the runs and of what was measured.")] = Path(
        "preemption"
    ),
    steps: int = 400,
) -> None:
    """Train the named ways, or all of them, and print what is known of all."""
    out.mkdir(parents=True, exist_ok=True)
    data = out / "data"
    if not data.exists():
        write_set(str(data))
    for way in ways or WAYS:
        result = _train(way, out.absolute(), data.absolute(), steps)
        (out / f"{way}.json").write_text(json.dumps(result))
    _print_table(out.absolute(), steps)


def _train(way: str, out: Path, data: Path, steps: int) -> dict[str, Any]:
    """Train one run, and return its steps and times."""
    seeds = out / f"{way}-seeds"
    seeds.mkdir()
    words = [
        str(TINY),
        f"data.url={data}",
        f"storage={out / way}",
        f"train.samples={BATCH * steps}",
        "train.workers=2",
        f"train.checkpoint_every={steps * RAYS_INTERVAL // RAYS_STEPS}",
        "train.log_every=50",
        "train.image_every=100000",
        "train.max_failures=10",
    ]
    begin = time.monotonic()
    environ = {**ENVIRON, "SEEDS_FOLDER": str(seeds)}  # of the nodes, hence of the workers
    with Cluster(environ) as cluster:
        cluster.add()
        cluster.add()
        environ = {**environ, "RAY_ADDRESS": cluster.address}
        with Training(out / f"{way}-output", words, environ) as training:
            for number, place in enumerate(RAYS_PREEMPTIONS if way != "undisturbed" else ()):
                if way == "ours":
                    cluster.add()  # the next node, before the run can end
                ranks = training.at_step(place * steps // RAYS_STEPS)
                (_kill_all if way == "periodic" else _preempt)(number, cluster, training, ranks)
            assert training.end(600) == 0, training.output()
            starts, attempts = training.starts(), len(training.pids()) // 2
    begun = max(len(file.read_text().splitlines()) for file in seeds.iterdir())
    return {
        "seconds": time.monotonic() - begin,
        "begun": begun,
        "wasted": begun - steps,
        "attempts": attempts,
        "starts": starts,
    }


def _kill_all(number: int, cluster: Cluster, training: Training, ranks: dict[int, Rank]) -> None:
    for rank in ranks.values():
        with suppress(ProcessLookupError):
            os.kill(rank.pid, signal.SIGKILL)
    _await_new(training, ranks)


def _preempt(number: int, cluster: Cluster, training: Training, ranks: dict[int, Rank]) -> None:
    """Take the node of a worker away, with a notice the first two times."""
    victim = max(ranks.values(), key=lambda rank: int(rank.address.rpartition(".")[2]))
    if number < 2:
        words = ["--reason=DRAIN_NODE_REASON_PREEMPTION", "--reason-message=benchmark"]
        words += [f"--node-id={victim.node_id}", "--deadline-remaining-seconds=60"]
        command = [str(BIN / "ray"), "drain-node", f"--address={cluster.address}", *words]
        subprocess.run(command, env=ENVIRON, check=True, capture_output=True, timeout=120)
        _await_new(training, ranks)
        cluster.node(victim.address).kill()
        return
    cluster.node(victim.address).kill()
    with suppress(ProcessLookupError):
        os.kill(victim.pid, signal.SIGKILL)
    _await_new(training, ranks)


def _await_new(training: Training, ranks: dict[int, Rank]) -> None:
    """Wait until the run has begun again with other processes."""
    old = {rank.pid for rank in ranks.values()}

    def begun() -> bool:
        now = training.ranks()
        return len(now) == len(ranks) and not old & {rank.pid for rank in now.values()}

    await_truth(begun, "new workers")


def _print_table(out: Path, steps: int) -> None:
    print(
        f"{steps} steps, a checkpoint every {steps * RAYS_INTERVAL // RAYS_STEPS}, two workers.\n"
    )
    print("| | attempts | wasted steps | of a run | started from | seconds | final weights |")
    print("|---|---|---|---|---|---|---|")
    print(
        "| Ray's published run: periodic | 5 | 517 | 32.3% | 0, 401, 401, 801, 1201 | | |\n"
        "| Ray's published run: just in time | 5 | 91 | 5.7% | 0, 696, 867, 1396, 1548 | | |"
    )
    for way in WAYS:
        path = out / f"{way}.json"
        if path.exists():
            found = json.loads(path.read_text())
            cells = [
                f"here: {way}",
                str(found["attempts"]),
                str(found["wasted"]),
                f"{found['wasted'] / steps:.1%}",
                ", ".join(map(str, found["starts"])),
                f"{found['seconds']:.0f}",
                _weights(out, way),
            ]
            print(f"| {' | '.join(cells)} |")


def _weights(out: Path, way: str) -> str:
    runs: Sequence[Path] = [out / name / "tiny" for name in ("undisturbed", way)]
    if way == "undisturbed" or not (out / "undisturbed.json").exists():
        return "the reference" if way == "undisturbed" else "not compared"
    find_checkpoint(runs[1])
    assert_same_weights(*runs)
    return "equal bit for bit"


if __name__ == "__main__":
    run_command(main)
