"""Schedules as robfig/cron reads them, which runs CronJobs and RayCronJobs alike."""

import difflib
import zoneinfo
from collections.abc import Iterable
from datetime import UTC, datetime
from functools import cache

from croniter import CroniterBadDateError, CroniterError, croniter

from prioritycut_ray.kubernetes.syntax import is_duration

_DESCRIPTORS = ("@yearly", "@annually", "@monthly", "@weekly", "@daily", "@midnight", "@hourly")
_FIELDS = 5
_FROM = datetime(2026, 1, 1, tzinfo=UTC)


def schedule_problem(schedule: str) -> str | None:
    """What is wrong with a schedule, to follow its value; None if nothing is."""
    if "TZ" in schedule:
        return "names a time zone: write it under timeZone"
    if schedule.startswith("@every "):
        if is_duration(schedule.removeprefix("@every ")):
            return None
        return "is not valid: after @every comes a duration, such as 24h or 1h30m"
    if schedule.startswith("@"):
        if schedule in _DESCRIPTORS:
            return None
        known = ", ".join((*_DESCRIPTORS, "@every 24h"))
        return f"is none of {known}{_did_you_mean(schedule, _DESCRIPTORS)}"
    if len(schedule.split()) != _FIELDS:
        return "is not a five-field cron expression: minute, hour, day, month, weekday"
    return _field_problem(schedule)


def time_zone_problem(zone: str) -> str | None:
    """What is wrong with a time zone, to follow its value; None if nothing is."""
    if zone.lower() != "local" and zone in _zones():
        return None
    return f"is not a time zone, such as Europe/Berlin or Etc/UTC{_did_you_mean(zone, _zones())}"


@cache
def _zones() -> frozenset[str]:
    return frozenset(zoneinfo.available_timezones())


_NOT_IN_GO = "LW#H"
"""What croniter understands and robfig/cron does not."""
_NAMES = (
    *("JAN", "FEB", "MAR", "APR", "MAY", "JUN", "JUL", "AUG", "SEP", "OCT", "NOV", "DEC"),
    *("SUN", "MON", "TUE", "WED", "THU", "FRI", "SAT"),
)


def _field_problem(schedule: str) -> str | None:
    upper = schedule.upper()
    for name in _NAMES:
        upper = upper.replace(name, "")
    strange = set(upper) & set(_NOT_IN_GO)
    weekday = schedule.split()[4]
    try:
        times = croniter(schedule.replace("?", "*"), _FROM)
    except (CroniterError, ValueError) as reason:
        return f"is not a cron expression: {reason}"
    if strange or "7" in weekday.replace("/7", ""):
        what = "weekday 7 (Sunday is 0)" if not strange else ", ".join(sorted(strange))
        return f"is not a cron expression: Kubernetes has no {what}"
    try:
        times.get_next(datetime)
    except CroniterBadDateError:
        return "never comes: there is no such day"
    return None


def _did_you_mean(word: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.65)
    return f"; did you mean {near[0]!r}?" if near else ""
