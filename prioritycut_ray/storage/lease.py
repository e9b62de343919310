"""A lock on shared storage that outlives no dead owner: lease, expiry, fencing token.

::

    lease/000007.json     owner, time of the last renewal, whether it was given back

Whoever creates the next number owns the lease; of several who try, storage lets one succeed. The
number is the fencing token: it only grows, and an owner whose number is no longer the highest may
not write any more.

Clocks of two machines differ. A clock can say that a lease is fresh; it is never believed that one
has run out: the challenger then watches the file for a whole lease's time by its own monotonic
clock, and takes over only if the owner did not renew it meanwhile.
"""

import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime

from pydantic import BaseModel, ConfigDict

from prioritycut_ray.errors import LeaseHeld, Superseded
from prioritycut_ray.storage.folder import Folder

_FOLDER = "lease"
_RENEWALS = 4
"""Renewals in a lease's time: some may be late."""


class Holder(BaseModel):
    """Content of a lease file.

    Attributes:
        owner: host, process, and a random part.
        renewed: time of day at the owner, ISO 8601.
        seconds: that it lasts without a renewal.
        renewals: grows by one with each.
        released: it was given back.
    """

    model_config = ConfigDict(frozen=True)

    owner: str
    renewed: datetime
    seconds: float
    renewals: int = 0
    released: bool = False


class Lease:
    """The lock, while it is held.

    Attributes:
        token: grows with every owner.
    """

    def __init__(self, storage: Folder, token: int, holder: Holder) -> None:
        self.token = token
        self._storage, self._holder = storage, holder
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._renew, name="lease", daemon=True)

    def check(self) -> None:
        """Make sure that the lease is still ours; to be called before every lasting write.

        Raises:
            Superseded: another process has taken over.
        """
        newest = _newest(self._storage)
        if newest != self.token:
            raise Superseded(
                f"{self._storage.url}: this process lost its lease (number {self.token}) to "
                f"another one (number {newest}) and stops without writing; see who that is in "
                f"{_FOLDER}/{newest:06d}.json"
            )

    def _renew(self) -> None:
        while not self._ended.wait(self._holder.seconds / _RENEWALS):
            try:
                if _newest(self._storage) == self.token:
                    self._write(released=False)
            except OSError:  # storage is away for a while; check() speaks up if that cost the lease
                continue

    def _write(self, *, released: bool) -> None:
        self._holder = self._holder.model_copy(
            update={
                "renewed": datetime.now(UTC),
                "renewals": self._holder.renewals + 1,
                "released": released,
            }
        )
        self._storage.write(_name(self.token), self._holder.model_dump_json().encode())

    def start(self) -> None:
        """Begin to renew it."""
        self._thread.start()

    def release(self) -> None:
        """Stop renewing, and give it back if it is still ours."""
        self._ended.set()
        self._thread.join()
        if _newest(self._storage) == self.token:
            self._write(released=True)


@contextmanager
def leased(storage: Folder, seconds: float) -> Iterator[Lease]:
    """Hold the lease while the body runs.

    Args:
        storage: folder that the lease protects.
        seconds: after which the lease of a dead owner is free.

    Raises:
        LeaseHeld: another process has it.
    """
    lease = _acquire(storage, seconds)
    lease.start()
    try:
        yield lease
    finally:
        lease.release()


def _acquire(storage: Folder, seconds: float) -> Lease:
    number = _newest(storage)
    if number:
        _wait_for_the_dead(storage, number)
    holder = Holder(
        owner=f"{socket.gethostname()}, process {os.getpid()}, {uuid.uuid4().hex[:8]}",
        renewed=datetime.now(UTC),
        seconds=seconds,
    )
    if not storage.create(_name(number + 1), holder.model_dump_json().encode()):
        raise _held(storage, number + 1)
    for old in range(max(1, number - 1), number):
        storage.remove(_name(old))
    return Lease(storage, number + 1, holder)


def _wait_for_the_dead(storage: Folder, number: int) -> None:
    """Return when the lease's owner has given it back, or has not renewed it for its whole time.

    Raises:
        LeaseHeld: it is alive.
    """
    first = _read(storage, number)
    if first.released:
        return
    age = (datetime.now(UTC) - first.renewed).total_seconds()
    if abs(age) < first.seconds:
        raise _held(storage, number)
    deadline = time.monotonic() + first.seconds
    while time.monotonic() < deadline:
        time.sleep(min(0.5, first.seconds / _RENEWALS))
        now = _read(storage, number)
        if now.released:
            return
        if now.renewals != first.renewals:  # alive, and one of the two clocks is wrong
            raise _held(storage, number)


def _held(storage: Folder, number: int) -> LeaseHeld:
    holder = _read(storage, number)
    return LeaseHeld(
        f"{storage.url}: another run is at work there ({holder.owner}, renewed "
        f"{holder.renewed:%Y-%m-%d %H:%M:%S} UTC by its clock); let it finish"
    )


def _read(storage: Folder, number: int) -> Holder:
    return Holder.model_validate_json(storage.read(_name(number)))


def _newest(storage: Folder) -> int:
    stems = (name.removesuffix(".json") for name in storage.names(_FOLDER))
    return max((int(stem) for stem in stems if stem.isdigit()), default=0)


def _name(number: int) -> str:
    return f"{_FOLDER}/{number:06d}.json"
