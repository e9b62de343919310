"""Numbered claims to a folder: the newest wins, and every older one is fenced off.

::

    attempts/000003.json     who holds the claim, and since when

Of several processes that create the next number, storage lets one succeed. The number is a fencing
token: it only grows, and a process whose number is not the newest stops at its next write.
"""

from typing import Any, Generic, NamedTuple, TypeVar

from pydantic import BaseModel

from prioritycut_ray.errors import Superseded
from prioritycut_ray.storage.folder import Folder

Record = TypeVar("Record", bound=BaseModel)


class Claims(Generic[Record]):
    """The claims to one folder.

    Args:
        folder: the folder that is claimed.
        name: name of the subfolder that holds the claims.
        record: content of a claim's file; ``str(record)`` names the process that holds it.
    """

    def __init__(self, folder: Folder, name: str, record: type[Record]) -> None:
        self.folder = folder
        self._name, self._record = name, record

    def newest(self) -> int:
        """Return the highest number, or 0 if there are no claims."""
        stems = (name.removesuffix(".json") for name in self.folder.names(self._name))
        return max((int(stem) for stem in stems if stem.isdigit()), default=0)

    def file(self, number: int) -> str:
        """Return the name of a claim's file below the folder."""
        return f"{self._name}/{number:06d}.json"

    def read(self, number: int) -> Record:
        """Read a claim."""
        return self._record.model_validate_json(self.folder.read(self.file(number)))

    def write(self, number: int, record: Record) -> None:
        """Replace a claim; only its holder may."""
        self.folder.write(self.file(number), record.model_dump_json().encode())

    def create(self, number: int, record: Record) -> "Claim | None":
        """Create a claim; return None if another process was faster."""
        content = record.model_dump_json().encode()
        return Claim(self, number) if self.folder.create(self.file(number), content) else None

    def superseded(self, newest: int) -> Superseded:
        """Return the error of a process that lost the folder to the newest claim."""
        return Superseded(
            f"{self.folder.url}: this process was superseded by a newer one "
            f"({self.file(newest)}: {self.read(newest)}) and stops without writing; let the newer "
            "one finish, or stop it before you start this one again"
        )


class Claim(NamedTuple):
    """The right to write into a folder, until a newer claim exists.

    Attributes:
        claims: all claims to the folder.
        number: number of this one.
    """

    claims: Claims[Any]
    number: int

    @property
    def folder(self) -> Folder:
        """The folder that is claimed."""
        return self.claims.folder

    def is_newest(self) -> bool:
        """Return whether this process still holds the folder."""
        return self.claims.newest() == self.number

    def check(self) -> None:
        """Check that this process still holds the folder; to be called before every write.

        Raises:
            Superseded: if a newer claim exists, or this one was removed.
        """
        newest = self.claims.newest()
        if newest == 0:
            raise Superseded(
                f"{self.folder.url}: the claim of this process ({self.claims.file(self.number)}) "
                "was removed; it stops without writing; start it again"
            )
        if newest != self.number:
            raise self.claims.superseded(newest)
