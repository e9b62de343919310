"""Which process trains a run: only the newest attempt may write into the run's folder."""

import os
import socket
from datetime import UTC, datetime

from pydantic import BaseModel, ConfigDict

from prioritycut_ray.storage.claims import Claim, Claims
from prioritycut_ray.storage.folder import Folder


class Attempt(BaseModel):
    """One group of workers that trains, or has trained, a run; content of its claim's file.

    Attributes:
        number: from 1; a newer attempt has a higher number.
        launch: id of the command that started it, which may start several attempts in turn.
        host: host of the process that claimed the run.
        pid: id of that process.
        started: time of day there, ISO 8601.
    """

    model_config = ConfigDict(frozen=True)

    number: int
    launch: str
    host: str
    pid: int
    started: str

    def __str__(self) -> str:
        return f"host {self.host}, process {self.pid}, since {self.started}"


def claim_run(folder: Folder, launch: str, *, first: bool) -> Claim:
    """Start an attempt: from now on every older attempt is fenced off at its next write.

    Args:
        folder: the run's folder.
        launch: id of the command that trains.
        first: whether this is the command itself, which wins over whoever trains the run. If not,
            it is one of the groups of workers that the command starts, which lose to a newer one.

    Returns:
        The claim; its number is the attempt's.

    Raises:
        Superseded: if a newer command has taken the run over.
    """
    attempts = Claims(folder, "attempts", Attempt)
    while True:
        newest = attempts.newest()
        if newest and not first and attempts.read(newest).launch != launch:
            raise attempts.superseded(newest)
        attempt = Attempt(
            number=newest + 1,
            launch=launch,
            host=socket.gethostname(),
            pid=os.getpid(),
            started=datetime.now(UTC).isoformat(timespec="seconds"),
        )
        if claim := attempts.create(attempt.number, attempt):
            return claim
