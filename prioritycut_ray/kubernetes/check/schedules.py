"""Schedules of CronJobs and RayCronJobs: both are read by robfig/cron."""

import zoneinfo
from datetime import UTC, datetime
from functools import cache

from croniter import CroniterBadDateError, CroniterError, croniter

from prioritycut_ray.kubernetes.check.findings import Findings, Object, error, warning
from prioritycut_ray.kubernetes.schema import did_you_mean
from prioritycut_ray.kubernetes.syntax import is_duration

_DESCRIPTORS = ("@yearly", "@annually", "@monthly", "@weekly", "@daily", "@midnight", "@hourly")
_FIELDS = 5
_FROM = datetime(2026, 1, 1, tzinfo=UTC)


def check(spec: Object, path: str = "spec") -> Findings:
    """The schedule and the time zone of a spec."""
    schedule, zone = spec.get("schedule") or "", spec.get("timeZone")
    yield from _schedule_rules(schedule, f"{path}.schedule")
    if zone is None:
        return
    if not zone or zone.lower() == "local" or zone not in _zones():
        yield error(
            f"{path}.timeZone",
            f"{zone!r} is not a time zone, such as Europe/Berlin or Etc/UTC"
            + did_you_mean(zone, _zones()),
        )
    elif schedule.startswith("@every"):
        yield warning(
            f"{path}.timeZone",
            "has no effect with @every, which counts from the last run: use five fields",
        )


@cache
def _zones() -> frozenset[str]:
    return frozenset(zoneinfo.available_timezones())


def _schedule_rules(schedule: str, place: str) -> Findings:
    words = schedule.split()
    if "TZ" in schedule:
        yield error(place, f"{schedule!r} names a time zone: write it under timeZone")
    elif schedule.startswith("@every "):
        if not is_duration(schedule.removeprefix("@every ")):
            yield error(place, f"{schedule!r}: after @every comes a duration, such as 24h or 1h30m")
    elif schedule.startswith("@"):
        if schedule not in _DESCRIPTORS:
            known = ", ".join((*_DESCRIPTORS, "@every 24h"))
            yield error(
                place, f"{schedule!r} is none of {known}" + did_you_mean(schedule, _DESCRIPTORS)
            )
    elif len(words) != _FIELDS:
        yield error(
            place,
            f"{schedule!r} is not a five-field cron expression: minute, hour, day, month, weekday",
        )
    else:
        yield from _field_rules(schedule, place)


_NOT_IN_GO = "LW#H"
"""What croniter understands and robfig/cron does not."""


def _field_rules(schedule: str, place: str) -> Findings:
    upper = schedule.upper()
    for name in _NAMES:
        upper = upper.replace(name, "")
    strange = set(upper) & set(_NOT_IN_GO)
    weekday = schedule.split()[4]
    try:
        times = croniter(schedule.replace("?", "*"), _FROM)
    except (CroniterError, ValueError) as reason:
        yield error(place, f"{schedule!r} is not a cron expression: {reason}")
        return
    if strange or "7" in weekday.replace("/7", ""):
        what = "weekday 7 (Sunday is 0)" if not strange else ", ".join(sorted(strange))
        yield error(place, f"{schedule!r} is not a cron expression: Kubernetes has no {what}")
        return
    try:
        times.get_next(datetime)
    except CroniterBadDateError:
        yield error(place, f"{schedule!r} never comes: there is no such day")


_NAMES = (
    *("JAN", "FEB", "MAR", "APR", "MAY", "JUN", "JUL", "AUG", "SEP", "OCT", "NOV", "DEC"),
    *("SUN", "MON", "TUE", "WED", "THU", "FRI", "SAT"),
)
