"""``prioritycut doctor``."""

import json

from rich.console import Console

from prioritycut_ray.errors import UserError
from prioritycut_ray.launch.doctor import check_cluster
from prioritycut_ray.launch.node_checks import CheckResult
from prioritycut_ray.storage.paths import resolved


def doctor(
    *, address: str | None, storage: str | None, data: str | None, as_json: bool, console: Console
) -> None:
    """Check the driver and every node, and print the results.

    Raises:
        UserError: a check failed.
    """
    checks = check_cluster(
        address,
        None if storage is None else resolved(storage),
        None if data is None else resolved(data),
    )
    if as_json:
        console.print(json.dumps([check._asdict() for check in checks], indent=1), markup=False)
    else:
        for check in checks:
            _show(check, console)
    findings = [check for check in checks if not check.ok]
    if findings:
        names = ", ".join(f"{check.name} ({check.place})" for check in findings)
        raise UserError(f"{len(findings)} of {len(checks)} checks failed: {names}; see their fixes")


def _show(check: CheckResult, console: Console) -> None:
    mark = "ok     " if check.ok else "FINDING"
    console.print(f"{mark}  {check.place:<20}  {check.name:<8}  {check.found}", markup=False)
    if check.fix:
        console.print(f"         fix: {check.fix}", markup=False)
