"""Training under random kills, against an uninterrupted training; in Markdown.

    python benchmarks/soak.py --minutes 30 --seed 0

The networks of `quickstart` on a few synthetic puppets, two workers. The driver and either rank
receive SIGKILL or SIGTERM at random times, scheduled by the seed; after the driver has ended, the
same command starts it again. Then the same number of steps is trained without interruption: the
weights must be equal bit for bit. The growth of memory during that run is printed.
"""

import os
import random
import resource
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from command_line import run_command
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

sys.path.insert(0, str(Path(__file__).parents[1]))

from prioritycut_ray.data.puppets import render_clip
from prioritycut_ray.runs.locate import find_checkpoint
from prioritycut_ray.video.encoding import write_video
from tests.hosts import environment, prioritycut
from tests.runs import Training, assert_same_weights, await_truth

ENVIRON = environment()
BATCH, LOG_EVERY = 4, 2
WORDS = [
    "quickstart",
    "name=soak",
    f"train.batch_size={BATCH}",
    "train.workers=2",
    f"train.log_every={LOG_EVERY}",
    "train.checkpoint_every=10",
    "train.max_failures=100",
    "data.loader_workers=1",
]
VICTIMS = [("driver", signal.SIGKILL), ("driver", signal.SIGTERM)]
VICTIMS += [
    (f"rank {rank}", number) for rank in (0, 1) for number in (signal.SIGKILL, signal.SIGTERM)
]
PAUSE_S = (5.0, 30.0)


class Place:
    """The folder of one run, and how it is started."""

    def __init__(self, folder: Path, data: Path, samples: int) -> None:
        self.run = folder / "runs" / "soak"
        self._folder, self._starts = folder, 0
        self._words = [*WORDS, f"data.url={data}", f"storage={self.run.parent}"]
        self._words += [f"train.samples={samples}"]

    def start(self) -> Training:
        """Run the same command each time."""
        self._starts += 1
        return Training(self._folder / f"attempt{self._starts}", self._words, ENVIRON)


def main(minutes: float = 30, seed: int = 0) -> None:
    """Train a run under random kills and another without, and compare them."""
    with tempfile.TemporaryDirectory(prefix="soak_") as name:
        folder = Path(name)
        data = _pack(folder)
        killed = Place(folder / "killed", data, samples=100_000_000)
        kills = _train_under_kills(killed, random.Random(seed), minutes)
        steps = int(find_checkpoint(killed.run).name.removeprefix("step_"))
        undisturbed = Place(folder / "undisturbed", data, samples=BATCH * steps)
        growth = _train_undisturbed(undisturbed)
        logged = Counter(_logged_steps(killed.run))
        lost = [step for step in range(LOG_EVERY, steps + 1, LOG_EVERY) if step not in logged]
        assert_same_weights(undisturbed.run, killed.run)
    print(f"{minutes:g} minutes, seed {seed}, two workers on {os.cpu_count()} CPUs.\n")
    print("| | |\n|---|---|")
    for (victim, number), count in sorted(Counter(kills).items()):
        print(f"| {number.name} to {victim} | {count} times |")
    print(f"| steps trained | {steps} |")
    print(f"| steps missing in TensorBoard | {len(lost)} |")
    print(f"| steps logged twice in TensorBoard | {sum(count > 1 for count in logged.values())} |")
    print("| processes left behind | 0 |\n| final weights | equal bit for bit |")
    for who, megabytes in growth.items():
        print(f"| memory growth of {who} over the uninterrupted run | {megabytes:+.1f} MB |")


def _pack(folder: Path) -> Path:
    videos = folder / "videos"
    videos.mkdir()
    for seed in range(6):
        frames = render_clip(seed, size=64, frames=16).frames
        write_video(videos / f"puppet_{seed}.mp4", frames, 16)
    words = [str(videos), "--out", str(folder / "data"), "--size", "64"]
    packed = prioritycut("shard", *words, cwd=folder, environ=ENVIRON)
    assert packed.returncode == 0, packed.stderr
    return folder / "data"


def _train_under_kills(
    place: Place, rng: random.Random, minutes: float
) -> list[tuple[str, signal.Signals]]:
    """Kill processes at random until the time is over; then let the run save."""
    kills = []
    until = time.monotonic() + 60 * minutes
    training = place.start()
    try:
        while True:
            _await_progress(training)
            time.sleep(rng.uniform(*PAUSE_S))
            if time.monotonic() > until:
                break
            victim, number = rng.choice(VICTIMS)
            if not _hit(training, victim, number):
                continue
            kills.append((victim, number))
            print(f"{number.name} to {victim}", file=sys.stderr, flush=True)
            if victim == "driver":
                code = training.end()
                assert code == (-signal.SIGKILL if number == signal.SIGKILL else 75), code
                training = place.start()
        training.process.terminate()
        assert training.end() == 75, training.output()
    finally:
        training.close()
    return kills


def _hit(training: Training, victim: str, number: signal.Signals) -> bool:
    """Send a signal; return False if the victim is being replaced at the moment."""
    if victim == "driver":
        training.process.send_signal(number)
        return True
    ranks = training.ranks()
    with suppress(KeyError, ProcessLookupError):
        os.kill(ranks[int(victim.removeprefix("rank "))].pid, number)
        return True
    return False


def _await_progress(training: Training) -> None:
    """Wait until all ranks have taken a step since they were started."""

    def progress() -> bool:
        assert training.process.poll() is None, training.output()
        ranks = training.ranks().values()
        return len(ranks) == 2 and all(rank.step > rank.started_from for rank in ranks)

    await_truth(progress, "a step of all ranks", seconds=600)


def _train_undisturbed(place: Place) -> dict[str, float]:
    """Train without interruption; return the memory growth of driver and ranks in megabytes."""
    samples: dict[str, list[float]] = {}
    with place.start() as training:
        while training.process.poll() is None:
            pids = {f"rank {rank}": beat.pid for rank, beat in training.ranks().items()}
            for who, pid in {"the driver": training.process.pid, **pids}.items():
                with suppress(FileNotFoundError, ProcessLookupError):
                    samples.setdefault(who, []).append(_megabytes(pid))
            time.sleep(1)
        assert training.end() == 0, training.output()
    return {who: _growth(readings) for who, readings in samples.items()}


def _megabytes(pid: int) -> float:
    """Resident memory of a process in megabytes."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 1e6


def _growth(readings: Sequence[float]) -> float:
    """The highest reading of the last fifth of the run minus that of the second fifth."""
    fifth = max(1, len(readings) // 5)
    return max(readings[-fifth:]) - max(readings[fifth : 2 * fifth] or readings)


def _logged_steps(run: Path) -> list[int]:
    events = EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    return [event.step for event in events.Scalars("generator/perceptual")]


if __name__ == "__main__":
    run_command(main)
