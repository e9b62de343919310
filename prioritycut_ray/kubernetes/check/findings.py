"""What a check finds."""

from collections.abc import Iterable, Iterator, Mapping
from enum import StrEnum
from typing import Any, NamedTuple

Object = Mapping[str, Any]


class Severity(StrEnum):
    """How bad it is."""

    ERROR = "error"
    """The API server or the operator refuses it, or it cannot run."""
    WARNING = "warning"
    """It may be meant, or is right on some clusters only."""
    NOTE = "note"
    """Something that was not checked."""


class Finding(NamedTuple):
    """Something wrong at one path of an object."""

    path: str
    message: str
    severity: Severity = Severity.ERROR


Findings = Iterator[Finding]


class Problem(NamedTuple):
    """Something wrong at one place of a file."""

    where: str
    """Object and path, such as ``RayJob/train spec.entrypoint``."""
    message: str
    severity: Severity = Severity.ERROR

    def __str__(self) -> str:
        return f"{self.severity}: {self.where}: {self.message}"


def errors_of(problems: Iterable[Problem]) -> list[Problem]:
    """The problems that are errors."""
    return [problem for problem in problems if problem.severity is Severity.ERROR]


def error(path: str, message: str) -> Finding:
    """What is refused, or cannot run."""
    return Finding(path, message)


def warning(path: str, message: str) -> Finding:
    """What may be meant."""
    return Finding(path, message, Severity.WARNING)


def note(path: str, message: str) -> Finding:
    """What was not checked."""
    return Finding(path, message, Severity.NOTE)
