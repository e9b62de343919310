"""The findings of a check."""

from collections.abc import Iterable, Iterator, Mapping
from enum import StrEnum
from typing import Any, NamedTuple

Object = Mapping[str, Any]


class Severity(StrEnum):
    """The severity of a finding."""

    ERROR = "error"
    """The API server or the operator rejects it, or it cannot run."""
    WARNING = "warning"
    """It may be intended, or is correct on some clusters only."""
    NOTE = "note"
    """Something that was not checked."""


class Finding(NamedTuple):
    """A problem at a path within an object."""

    path: str
    message: str
    severity: Severity = Severity.ERROR


Findings = Iterator[Finding]


class Problem(NamedTuple):
    """A problem at a place within a file."""

    where: str
    """The object and the path, such as ``RayJob/train spec.entrypoint``."""
    message: str
    severity: Severity = Severity.ERROR

    def __str__(self) -> str:
        return f"{self.severity}: {self.where}: {self.message}"


def errors_of(problems: Iterable[Problem]) -> list[Problem]:
    """Return the problems that are errors."""
    return [problem for problem in problems if problem.severity is Severity.ERROR]


def error(path: str, message: str) -> Finding:
    """Return an error."""
    return Finding(path, message)


def warning(path: str, message: str) -> Finding:
    """Return a warning."""
    return Finding(path, message, Severity.WARNING)


def note(path: str, message: str) -> Finding:
    """Return a note on something that was not checked."""
    return Finding(path, message, Severity.NOTE)
