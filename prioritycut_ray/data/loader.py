"""Loader workers: processes that prefetch batches in order, any of which may die.

A video decoder can crash on a damaged file (a segfault) or hang, which an alarm ends, and a process
can run out of memory. None of these ends the training: new processes continue at the first batch
that was not delivered. A clip that kills a worker twice in a row is treated like a damaged one, on
every rank alike, since it would kill a worker there too.
"""

import logging
import multiprocessing
import multiprocessing.connection
import os
import queue
import signal
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from logging.handlers import QueueHandler
from multiprocessing.process import BaseProcess
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from torch.utils.data import DataLoader, Dataset, get_worker_info

from prioritycut_ray.errors import UserError

log = logging.getLogger(__name__)

PACKAGE_LOG = "prioritycut_ray"
# More deaths in a row, with no batch delivered and no clip to blame, end the run.
MOST_DEATHS = 5
# A decoder that takes longer over the frames of one clip hangs.
PATIENCE_S = 120
# Signals of a crash or of the alarm. Others come from outside: no clip is to blame for them.
CRASHES = (
    signal.SIGSEGV,
    signal.SIGBUS,
    signal.SIGABRT,
    signal.SIGFPE,
    signal.SIGILL,
    signal.SIGALRM,
)
IDLE = -1
# A worker that broke a connection has exited by then, including its core dump.
DEATH_WAIT_S = 10

T = TypeVar("T")

Decoding = Callable[[int], AbstractContextManager[object]]
"""The context in which the clip at a position is decoded."""
Read = Callable[[Sequence[int], Mapping[int, str], Decoding], T]
"""Reads a batch, given sample numbers, clips to avoid (position → reason), and the context."""


def load(
    read: Read[T],
    shares: Sequence[Sequence[int]],
    workers: int,
    name_of: Callable[[int], str],
    patience_s: int = PATIENCE_S,
    pin_for: torch.device | None = None,
) -> Iterator[T]:
    """Read batches in order.

    Args:
        read: reads one batch; runs in the workers. Its :class:`UserError` is raised here.
        shares: the sample numbers of each batch.
        workers: number of forked processes; 0 reads in this process, which a crash ends.
        name_of: returns the name of the clip at a position, for messages.
        patience_s: seconds that a worker may decode one clip.
        pin_for: the GPU to which the tensors go; workers then use pinned memory.

    Yields:
        The result of ``read`` for each batch.

    Raises:
        UserError: from ``read``, or workers die repeatedly.
    """
    if workers == 0:
        yield from (read(share, {}, unwatched) for share in shares)
        return
    avoid: dict[int, str] = {}
    crashes: Counter[int] = Counter()
    deaths, done = 0, 0
    while done < len(shares):
        work = _Work(read, shares, dict(avoid), workers, patience_s)
        team = _Team(work, range(done, len(shares)), workers, pin_for)
        for answer in team.answers():
            for record in answer.records:
                logging.getLogger(record.name).handle(record)
            if answer.error is not None:
                raise answer.error
            crashes.clear()
            deaths, done = 0, done + 1
            yield answer.result
        if done < len(shares):
            died = team.deaths()
            del team  # Before the next one starts: its workers hold memory.
            crashes.update(death.clip for death in died if death.is_crash and death.clip != IDLE)
            # A first death may be bad luck, which must not change what is read.
            blamed = {d.clip: f"its decoder dies ({d.how})" for d in died if crashes[d.clip] > 1}
            avoid |= blamed
            deaths = 0 if blamed else deaths + 1
            _report_deaths(died, deaths, name_of)


def unwatched(clip: int) -> AbstractContextManager[object]:
    """Decode in this process, which a crash ends."""
    return nullcontext()


class _Death(NamedTuple):
    how: str
    is_crash: bool
    clip: int


class _Answer(NamedTuple):
    result: Any
    error: UserError | None
    records: list[logging.LogRecord]


def _report_deaths(died: Sequence[_Death], deaths: int, name_of: Callable[[int], str]) -> None:
    """Log deaths.

    Raises:
        UserError: there were too many in a row.
    """
    how = ", ".join(
        death.how if death.clip == IDLE else f"{death.how} at clip {name_of(death.clip)}"
        for death in died
    )
    if deaths > MOST_DEATHS:
        raise UserError(
            f"loader workers died {deaths} times in a row ({how}); if they ran out of memory, "
            "lower data.loader_workers or train.batch_size"
        )
    log.warning("a loader worker died (%s); its batch is read again by a new one", how)


class _Work(Dataset[_Answer], Generic[T]):
    """A data set whose items are batches, and the shared record of each worker's open clip."""

    def __init__(
        self,
        read: Read[T],
        shares: Sequence[Sequence[int]],
        avoid: Mapping[int, str],
        workers: int,
        patience_s: int,
    ) -> None:
        self._read, self._shares, self._avoid = read, shares, avoid
        self._patience_s = patience_s
        # Each worker's process id and clip, in shared memory.
        self._board = multiprocessing.get_context("fork").RawArray("q", [0, IDLE] * workers)

    def __getitem__(self, place: int) -> _Answer:
        result, error = None, None
        try:
            result = self._read(self._shares[place], self._avoid, self._decoding)
        except UserError as caught:
            error = caught
        return _Answer(result, error, _drain())

    @contextmanager
    def _decoding(self, clip: int) -> Iterator[None]:
        self._note(clip)
        signal.alarm(self._patience_s)
        try:
            yield
        finally:
            signal.alarm(0)
            self._note(IDLE)

    def _note(self, clip: int) -> None:
        worker = get_worker_info()
        assert worker is not None
        self._board[2 * worker.id : 2 * worker.id + 2] = [os.getpid(), clip]

    def clip_of(self, pid: int | None) -> int:
        """Return the clip that a process had open last."""
        clips: dict[int | None, int] = dict(zip(self._board[::2], self._board[1::2], strict=True))
        return clips.get(pid, IDLE)


class _Team:
    """A set of workers that ends when the first of them dies."""

    def __init__(
        self, work: _Work[Any], places: range, workers: int, pin_for: torch.device | None
    ) -> None:
        self._work = work
        loader = DataLoader(
            work,
            batch_size=None,
            sampler=places,
            num_workers=workers,
            collate_fn=_same,
            worker_init_fn=_begin_worker,
            pin_memory=pin_for is not None,
            # Otherwise each iterator would draw from the global generator and so shift it.
            generator=torch.Generator(),
            # Fork: importing the package again would take seconds in every process.
            multiprocessing_context="fork",
        )
        before = set(multiprocessing.active_children())
        self._iterator: Iterator[_Answer] = _begin(loader, pin_for)
        self._processes: set[BaseProcess] = set(multiprocessing.active_children()) - before

    def answers(self) -> Iterator[_Answer]:
        """Yield the workers' answers in order, until all are done or a worker dies."""
        while True:
            try:
                answer = next(self._iterator)
            except StopIteration:
                return
            except (RuntimeError, OSError, EOFError):
                # torch reports a death, or a connection broke: a worker can also die while this
                # process takes over the memory of a finished batch.
                self._wait_for_death()
                if not self.deaths():
                    raise
                return
            yield answer

    def _wait_for_death(self) -> None:
        """Wait until a worker has exited: its connections close before its exit code is known."""
        by_sentinel = {process.sentinel: process for process in self._processes}
        for ended in multiprocessing.connection.wait([*by_sentinel], timeout=DEATH_WAIT_S):
            assert isinstance(ended, int)
            by_sentinel[ended].join()

    def deaths(self) -> list[_Death]:
        """List the workers that died."""
        return [
            _Death(_how(process.exitcode), -process.exitcode in CRASHES, self._work.clip_of(pid))
            for process in self._processes
            if process.exitcode and (pid := process.pid)
        ]


def _begin(loader: DataLoader[_Answer], pin_for: torch.device | None) -> Iterator[_Answer]:
    """Start the workers."""

    def begin() -> Iterator[_Answer]:
        if pin_for is not None:
            # torch's pinning thread uses this thread's device, and would open the first GPU.
            torch.cuda.set_device(pin_for)
        return iter(loader)

    if threading.current_thread() is not threading.main_thread():
        return begin()
    # If started in the main thread, torch would raise for a death in the middle of whatever that
    # thread is doing, not when the batch is requested.
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(begin).result()


def _how(exitcode: int) -> str:
    return signal.Signals(-exitcode).name if exitcode < 0 else f"exit code {exitcode}"


def _same(answer: Any) -> Any:
    return answer


_records: queue.SimpleQueue[logging.LogRecord] = queue.SimpleQueue()


def _begin_worker(worker: int) -> None:
    """Queue this worker's log records for its answer: handlers may not survive a fork."""
    # The default action ends the process: no Python handler runs while a decoder hangs.
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    package = logging.getLogger(PACKAGE_LOG)
    package.handlers, package.propagate = [QueueHandler(_records)], False


def _drain() -> list[logging.LogRecord]:
    return [_records.get() for _ in range(_records.qsize())]
