"""A lock on shared storage that does not outlive its holder: a claim that is renewed or expires.

::

    lease/000007.json     holder, time of the last renewal, whether it was released

The clocks of two machines differ. A challenger trusts a clock that says a lease is fresh, but
never one that says it has expired: it then watches the file for the whole duration of the lease by
its own monotonic clock, and takes over only if the holder did not renew the lease meanwhile.
"""

import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime

from pydantic import BaseModel, ConfigDict

from prioritycut_ray.errors import LeaseHeld
from prioritycut_ray.storage.claims import Claim, Claims
from prioritycut_ray.storage.folder import Folder

_RENEWALS = 4
"""Renewals during the duration of a lease, so that some may be late."""

Clock = Callable[[], datetime]


class LeaseRecord(BaseModel):
    """Content of a lease file.

    Attributes:
        owner: host, process, and a random part.
        renewed: the holder's time of day at the last renewal, ISO 8601.
        seconds: how long the lease lasts without renewal.
        renewals: number of renewals.
        released: whether the holder released it.
    """

    model_config = ConfigDict(frozen=True)

    owner: str
    renewed: datetime
    seconds: float
    renewals: int = 0
    released: bool = False

    def __str__(self) -> str:
        return f"{self.owner}, renewed {self.renewed:%Y-%m-%d %H:%M:%S} UTC by its clock"


class Lease:
    """A lease that this process holds, renewed by a thread.

    Args:
        claim: the claim that the lease keeps alive.
        record: content of its file.
        clock: gives the time of day.
    """

    def __init__(self, claim: Claim, record: LeaseRecord, clock: Clock) -> None:
        self._claim, self._record, self._clock = claim, record, clock
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._renew, name="lease", daemon=True)
        self._thread.start()

    @property
    def token(self) -> int:
        """Fencing token: it grows with every holder."""
        return self._claim.number

    def check(self) -> None:
        """Check that this process still holds the lease; to be called before every lasting write.

        Raises:
            Superseded: if another process has taken over.
        """
        self._claim.check()

    def release(self) -> None:
        """Stop the renewal, and release the lease unless another process has taken over."""
        self._ended.set()
        self._thread.join()
        if self._claim.is_newest():
            self._write(released=True)

    def _renew(self) -> None:
        while not self._ended.wait(self._record.seconds / _RENEWALS):
            try:
                if self._claim.is_newest():
                    self._write(released=False)
            except OSError:  # An outage: check() reports it if that cost the lease.
                continue

    def _write(self, *, released: bool) -> None:
        self._record = self._record.model_copy(
            update={
                "renewed": self._clock(),
                "renewals": self._record.renewals + 1,
                "released": released,
            }
        )
        self._claim.claims.write(self._claim.number, self._record)


def utc_now() -> datetime:
    """Return the time of day of this machine."""
    return datetime.now(UTC)


@contextmanager
def leased(folder: Folder, seconds: float, clock: Clock = utc_now) -> Iterator[Lease]:
    """Hold the lease of a folder while the body runs.

    Args:
        folder: the folder that the lease protects.
        seconds: time after which the lease of a dead holder expires.
        clock: gives the time of day.

    Raises:
        LeaseHeld: if another process holds it.
    """
    lease = _acquire(folder, seconds, clock)
    try:
        yield lease
    finally:
        lease.release()


def _acquire(folder: Folder, seconds: float, clock: Clock) -> Lease:
    leases = Claims(folder, "lease", LeaseRecord)
    number = leases.newest()
    if number:
        _await_expiry(leases, number, clock)
    record = LeaseRecord(
        owner=f"{socket.gethostname()}, process {os.getpid()}, {uuid.uuid4().hex[:8]}",
        renewed=clock(),
        seconds=seconds,
    )
    claim = leases.create(number + 1, record)
    if claim is None:
        raise _held(folder, leases.read(number + 1))
    if number > 1:
        folder.remove(leases.file(number - 1))
    return Lease(claim, record, clock)


def _await_expiry(leases: Claims[LeaseRecord], number: int, clock: Clock) -> None:
    """Return once the lease was released, or was not renewed for its whole duration.

    Raises:
        LeaseHeld: if its holder is alive.
    """
    first = leases.read(number)
    if first.released:
        return
    age = (clock() - first.renewed).total_seconds()
    if abs(age) < first.seconds:
        raise _held(leases.folder, first)
    deadline = time.monotonic() + first.seconds
    while time.monotonic() < deadline:
        time.sleep(min(0.5, first.seconds / _RENEWALS))
        now = leases.read(number)
        if now.released:
            return
        if now.renewals != first.renewals:  # Alive: one of the two clocks is wrong.
            raise _held(leases.folder, now)


def _held(folder: Folder, record: LeaseRecord) -> LeaseHeld:
    return LeaseHeld(f"{folder.url}: another process is working there ({record}); let it finish")
