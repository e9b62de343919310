"""Schedules as robfig/cron, which runs both CronJobs and RayCronJobs, parses them."""

import re
import zoneinfo
from datetime import UTC, datetime
from functools import cache

from croniter import CroniterBadDateError, CroniterError, croniter

from prioritycut_ray.kubernetes.syntax import did_you_mean, is_duration

_DESCRIPTORS = ("@yearly", "@annually", "@monthly", "@weekly", "@daily", "@midnight", "@hourly")
_FIELDS = 5
_FROM = datetime(2026, 1, 1, tzinfo=UTC)


def schedule_problem(schedule: str) -> str | None:
    """Return what is wrong with a schedule, or None. The message follows the value."""
    if "TZ" in schedule:
        return "contains a time zone: set timeZone instead"
    if schedule.startswith("@every "):
        if is_duration(schedule.removeprefix("@every ")):
            return None
        return "is invalid: @every takes a duration, such as 24h or 1h30m"
    if schedule.startswith("@"):
        if schedule in _DESCRIPTORS:
            return None
        known = ", ".join((*_DESCRIPTORS, "@every 24h"))
        return f"is not one of {known}{did_you_mean(schedule, _DESCRIPTORS)}"
    if len(schedule.split()) != _FIELDS:
        return "is not a five-field cron expression: minute, hour, day, month, weekday"
    return _field_problem(schedule)


def time_zone_problem(zone: str) -> str | None:
    """Return what is wrong with a time zone, or None. The message follows the value."""
    if zone.lower() != "local" and zone in _zones():
        return None
    return f"is not a time zone, such as Europe/Berlin or Etc/UTC{did_you_mean(zone, _zones())}"


@cache
def _zones() -> frozenset[str]:
    return frozenset(zoneinfo.available_timezones())


_NAMES = {
    name: str(number)
    for names in (
        ("JAN", "FEB", "MAR", "APR", "MAY", "JUN", "JUL", "AUG", "SEP", "OCT", "NOV", "DEC"),
        ("SUN", "MON", "TUE", "WED", "THU", "FRI", "SAT"),
    )
    for number, name in enumerate(names, start=len(names) == 12)
}
_NUMBERS_ONLY = re.compile(r"[0-9*?,/-]+")


def _field_problem(schedule: str) -> str | None:
    plain = re.sub("[A-Za-z]{3}", lambda match: _NAMES.get(match[0].upper(), match[0]), schedule)
    reason = _robfig_problem(plain)
    try:
        times = croniter(plain.replace("?", "*"), _FROM)
    except (CroniterError, ValueError) as refusal:
        reason = reason or str(refusal)
    if reason:
        return f"is not a cron expression: {reason}"
    try:
        times.get_next(datetime)
    except CroniterBadDateError:
        return "never occurs: there is no such day"
    return None


def _robfig_problem(schedule: str) -> str | None:
    """Return what robfig/cron rejects although croniter accepts it, or None."""
    words = schedule.split()
    strange = [word for word in words if not _NUMBERS_ONLY.fullmatch(word)]
    if strange:
        return f"Kubernetes does not support {strange[0]}"
    for first, last in re.findall(r"(\d+)-(\d+)", schedule):
        if int(first) > int(last):
            return f"the range {first}-{last} ends before it begins: use two ranges"
    if re.search(r"(?<![/\d])7(?!\d)", words[4]):
        return "Sunday is 0, not 7"
    return None
