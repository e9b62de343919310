"""Loader workers: processes that read batches ahead, in order, and any of which may die.

A video decoder can die of a damaged file (a segfault) or hang, which is ended by an alarm, and a
process can die of too little memory. None ends the training: the work goes on in new processes at
the first batch that was not delivered. A clip that a worker dies of twice in a row is treated like
a damaged one, which is the same on every rank, for it would die there too.
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
# So many deaths in a row, with nothing delivered and no clip to blame, end the run.
MOST_DEATHS = 5
# A decoder that takes longer over the frames of one clip hangs.
PATIENCE_S = 120
# What a decoder dies of, or is ended by. Others come from outside: no clip is to blame for them.
CRASHES = (
    signal.SIGSEGV,
    signal.SIGBUS,
    signal.SIGABRT,
    signal.SIGFPE,
    signal.SIGILL,
    signal.SIGALRM,
)
IDLE = -1
# A worker that broke a connection has ended by then, core dump included.
DEATH_WAIT_S = 10

T = TypeVar("T")


Decoding = Callable[[int], AbstractContextManager[object]]
"""Within it, the clip at a position is decoded."""
Read = Callable[[Sequence[int], Mapping[int, str], Decoding], T]
"""Reads a batch: sample numbers, clips to avoid (position → reason), and what to decode within."""


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
        read: reads one batch; runs in the workers. Errors for users are passed on as they are.
        shares: the sample numbers of each batch.
        workers: number of processes, forked; 0 reads in this one, where nothing survives a crash.
        name_of: names a clip by its position, for messages.
        patience_s: how long a worker may decode one clip.
        pin_for: the GPU that the tensors go to; with workers they lie in pinned memory then.

    Yields:
        What ``read`` gives for each batch.

    Raises:
        UserError: that of ``read``, or if workers die again and again.
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
            # Once may be bad luck, and then it must not change what is read.
            blamed = {d.clip: f"its decoder dies ({d.how})" for d in died if crashes[d.clip] > 1}
            avoid |= blamed
            deaths = 0 if blamed else deaths + 1
            _tell_or_give_up(died, deaths, name_of)


def unwatched(clip: int) -> AbstractContextManager[object]:
    """Decoding in this very process, which a crash takes with it."""
    return nullcontext()


class _Death(NamedTuple):
    how: str
    is_crash: bool
    clip: int


class _Answer(NamedTuple):
    result: Any
    error: UserError | None
    records: list[logging.LogRecord]


def _tell_or_give_up(died: Sequence[_Death], deaths: int, name_of: Callable[[int], str]) -> None:
    how = ", ".join(
        death.how if death.clip == IDLE else f"{death.how} at clip {name_of(death.clip)}"
        for death in died
    )
    if deaths > MOST_DEATHS:
        raise UserError(
            f"loader workers died {deaths} times in a row ({how}); if it was for want of memory, "
            "lower data.loader_workers or train.batch_size"
        )
    log.warning("a loader worker died (%s); its batch is read again by a new one", how)


class _Work(Dataset[_Answer], Generic[T]):
    """One item is one batch. Also the board on which each worker notes the clip it has open."""

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
        # For each worker its process id and its clip, in memory that all share.
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
        """Look up what a process had open last."""
        clips: dict[int | None, int] = dict(zip(self._board[::2], self._board[1::2], strict=True))
        return clips.get(pid, IDLE)


class _Team:
    """A set of workers that ends with its first death."""

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
            # Its own generator: else each iterator would draw from, and so shift, the global one.
            generator=torch.Generator(),
            # Fork: the package need not be imported again, which takes seconds in every process.
            multiprocessing_context="fork",
        )
        before = set(multiprocessing.active_children())
        self._iterator: Iterator[_Answer] = _begin(loader, pin_for)
        self._processes: set[BaseProcess] = set(multiprocessing.active_children()) - before

    def answers(self) -> Iterator[_Answer]:
        """Yield what the workers give, in order, until all is done or one of them dies."""
        while True:
            try:
                answer = next(self._iterator)
            except StopIteration:
                return
            except (RuntimeError, OSError, EOFError):
                # torch's word for a death, or a broken connection: a worker can also die while
                # this process takes over the memory of a batch that it had finished.
                self._wait_for_death()
                if not self.deaths():
                    raise
                return
            yield answer

    def _wait_for_death(self) -> None:
        """Wait until a worker has ended: its connections close before its exit code is there."""
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
            # torch's pinning thread takes the device of this one, or else opens the first GPU.
            torch.cuda.set_device(pin_for)
        return iter(loader)

    if threading.current_thread() is not threading.main_thread():
        return begin()
    # Begun in the main thread, torch would raise for a death in the middle of whatever that
    # thread does then, and not when the batch is asked for.
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(begin).result()


def _how(exitcode: int) -> str:
    return signal.Signals(-exitcode).name if exitcode < 0 else f"exit code {exitcode}"


def _same(answer: Any) -> Any:
    return answer


_records: queue.SimpleQueue[logging.LogRecord] = queue.SimpleQueue()


def _begin_worker(worker: int) -> None:
    """Keep what this worker logs, to go with its answer: handlers may not outlive a fork."""
    # Ends the process: no Python handler runs while a decoder hangs.
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    package = logging.getLogger(PACKAGE_LOG)
    package.handlers, package.propagate = [QueueHandler(_records)], False


def _drain() -> list[logging.LogRecord]:
    return [_records.get() for _ in range(_records.qsize())]
