"""Schedules of CronJobs and RayCronJobs."""

from prioritycut_ray.kubernetes.check.findings import Findings, Object, error, warning
from prioritycut_ray.kubernetes.cron import schedule_problem, time_zone_problem


def check(spec: Object, path: str = "spec") -> Findings:
    """Check the schedule and the time zone of a spec."""
    schedule, zone = spec.get("schedule") or "", spec.get("timeZone")
    problem = schedule_problem(schedule)
    if problem:
        yield error(f"{path}.schedule", f"{schedule!r} {problem}")
    if zone is None:
        return
    problem = time_zone_problem(zone)
    if problem:
        yield error(f"{path}.timeZone", f"{zone!r} {problem}")
    elif schedule.startswith("@every"):
        yield warning(
            f"{path}.timeZone",
            "has no effect with @every, which counts from the last run; use five fields",
        )
