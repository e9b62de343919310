"""Who trains a run: the newest attempt alone may write, every older one is fenced off."""

import os
import socket
import uuid
from datetime import UTC, datetime
from typing import NamedTuple

from pydantic import BaseModel, ConfigDict

from prioritycut_ray.config import Config
from prioritycut_ray.errors import Superseded
from prioritycut_ray.storage.folder import Folder


class Attempt(BaseModel):
    """One group of workers that trains, or has trained, a run.

    Attributes:
        number: from 1; a newer attempt has a higher one.
        launch: id of the command that started it; that may start several groups in turn.
        host: of the process that took the run over.
        pid: of that process.
        started: time of day there, ISO 8601.
    """

    model_config = ConfigDict(frozen=True)

    number: int
    launch: str
    host: str
    pid: int
    started: str


class Lease(NamedTuple):
    """The right to write into a run's folder, until a newer attempt takes it."""

    storage: Folder
    attempt: Attempt

    def check(self) -> None:
        """Make sure that no newer attempt has taken the run over.

        Raises:
            Superseded: one has.
        """
        newer = _attempt_name(self.attempt.number + 1)
        if self.storage.exists(newer):
            other = Attempt.model_validate_json(self.storage.read(newer))
            raise _superseded(self.storage, self.attempt.number, other)


def claim(storage: Folder, launch: str, *, first: bool) -> Lease:
    """Take a run over: from now on every older attempt loses at its next write.

    Args:
        storage: the run's folder.
        launch: id of the command that trains.
        first: this is the launch itself, which wins over whoever trains the run; otherwise it is
            one of the groups of workers that the launch starts, and loses to a newer launch.

    Raises:
        Superseded: another launch has taken the run over.
    """
    while True:
        number = _newest_attempt(storage)
        if number and not first:
            newest = Attempt.model_validate_json(storage.read(_attempt_name(number)))
            if newest.launch != launch:
                raise _superseded(storage, None, newest)
        attempt = Attempt(
            number=number + 1,
            launch=launch,
            host=socket.gethostname(),
            pid=os.getpid(),
            started=datetime.now(UTC).isoformat(timespec="seconds"),
        )
        if storage.create(_attempt_name(attempt.number), attempt.model_dump_json().encode()):
            return Lease(storage, attempt)


def _newest_attempt(storage: Folder) -> int:
    stems = (name.removesuffix(".json") for name in storage.names("attempts"))
    return max((int(stem) for stem in stems if stem.isdigit()), default=0)


def _attempt_name(number: int) -> str:
    return f"attempts/{number:06d}.json"


def _superseded(storage: Folder, mine: int | None, other: Attempt) -> Superseded:
    who = "this attempt" if mine is None else f"attempt {mine}"
    return Superseded(
        f"{storage.url}: {who} was superseded by attempt {other.number} (host {other.host}, "
        f"process {other.pid}, since {other.started}) and stops, so that the two do not mix; let "
        "the newer one go on, or stop it before you start the run again"
    )


def take_over(config: Config) -> str:
    """Make an older attempt that still trains this run stop; gives the id of this launch."""
    launch = uuid.uuid4().hex
    claim(Folder(config.run), launch, first=True)
    return launch
