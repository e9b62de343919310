"""One Ray task per video or shard, because a decoder may crash or hang on a damaged file.

That costs one video, not the run. This module imports no more than a task needs: every Ray worker
imports it.
"""

import signal
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple, TypeVar

import ray
from ray.exceptions import OutOfMemoryError, RayTaskError, WorkerCrashedError

from prioritycut_ray.errors import UserError, describe
from prioritycut_ray.packing.clips import Outcome, Recipe, make_part, write_part
from prioritycut_ray.packing.entries import Entry, printable
from prioritycut_ray.ray_cluster.session import start_ray
from prioritycut_ray.video.source import VideoError

# Time for one video: a minimum, and more for large files. A decoder that takes longer hangs.
SECONDS_PER_VIDEO = 300
SECONDS_PER_MEGABYTE = 10


HowTo = TypeVar("HowTo")


def time_limit(entry: Entry) -> int:
    """Return the seconds that decoding a video may take."""
    return SECONDS_PER_VIDEO + SECONDS_PER_MEGABYTE * (entry.size >> 20)


def make_part_within(seconds: int, entry: Entry, recipe: Recipe) -> bytes:
    """Make the part of one video; runs in a Ray worker, which it may take down."""
    with watchdog(seconds):
        try:
            return make_part(entry, recipe)
        except VideoError as error:
            return write_part(Outcome(rejected=error.reason))
        except Exception as error:  # A strange file must not end the run, whatever it triggers.
            return failed_part(entry, f"cannot be packed ({printable(describe(error))})")


@contextmanager
def watchdog(seconds: int) -> Iterator[None]:
    """End this process if the body takes longer."""
    # The default action ends the process: no Python handler runs while a decoder hangs.
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)


def failed_part(entry: Entry, reason: str) -> bytes:
    """Return the part of a video that was not decoded; another run tries again."""
    return write_part(Outcome(rejected=reason, lasting=False))


def make_parts(
    entries: Sequence[Entry],
    positions: Sequence[int],
    how: HowTo,
    *,
    make: Callable[[int, Entry, HowTo], bytes],
    failed: Callable[[Entry, str], bytes] = failed_part,
    limit: Callable[[Entry], int] = time_limit,
) -> Iterator[tuple[int, bytes]]:
    """Make the parts of some entries, each in a task of its own.

    Args:
        entries: the videos or shards.
        positions: which of them to process.
        how: what the task is told.
        make: the task: seconds, entry and ``how`` to a part, whatever that is.
        failed: makes a part of an entry whose task died, and the reason.
        limit: the seconds that an entry may take.

    Yields:
        The position and the part of each entry, in any order.

    Raises:
        UserError: a task raised it.
    """
    if not positions:
        return
    start_ray()
    # Ray itself must not retry: a hanging decoder would cost its time several times.
    task = ray.remote(num_cpus=1, max_retries=0)(make)
    in_flight = 2 * max(1, int(ray.cluster_resources().get("CPU", 1)))
    waiting = deque((position, 1) for position in positions)
    running: dict[Any, _Attempt] = {}
    while waiting or running:
        while waiting and len(running) < in_flight:
            position, number = waiting.popleft()
            seconds = limit(entries[position])
            reference = task.remote(seconds, entries[position], how)
            running[reference] = _Attempt(position, seconds, time.monotonic(), number)
        [reference], _ = ray.wait([*running], num_returns=1)
        attempt = running.pop(reference)
        part = _result(reference, attempt, partial(failed, entries[attempt.position]))
        if part is None:
            waiting.append((attempt.position, attempt.number + 1))
        else:
            yield attempt.position, part


class _Attempt(NamedTuple):
    """A running task: its entry, time limit in seconds, start time, and number from 1."""

    position: int
    limit: int
    started: float
    number: int


def _result(reference: Any, attempt: _Attempt, failed: Callable[[str], bytes]) -> bytes | None:
    """Return the part that a task made, or what its death means; None to try again."""
    try:
        part: bytes = ray.get(reference)
    except OutOfMemoryError:
        reason = "ran out of memory"
    except WorkerCrashedError:
        if time.monotonic() - attempt.started >= attempt.limit:
            return failed(f"took longer than {attempt.limit} s to decode")
        reason = "decoder crashed"
    except RayTaskError as error:
        if isinstance(error.cause, UserError):
            raise error.cause from error
        raise
    else:
        return part
    # Once may be the node's fault, or that of a neighbour that took all the memory.
    return None if attempt.number == 1 else failed(f"{reason}, twice")
