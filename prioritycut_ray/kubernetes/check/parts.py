"""Access to the parts of a RayCluster's spec."""

from collections.abc import Iterator
from decimal import Decimal

from packaging.version import InvalidVersion, Version

from prioritycut_ray.kubernetes import schema
from prioritycut_ray.kubernetes.check import resources
from prioritycut_ray.kubernetes.check.findings import Findings, Object, error
from prioritycut_ray.kubernetes.syntax import parse_quantity

RAY = "template.spec.containers[0]"
"""Path of the container that runs Ray, within a group."""
AUTOSCALER_V2_VARIABLE = "RAY_enable_autoscaler_v2"
TRUE = ("1", "true")


def groups(spec: Object, path: str) -> Iterator[tuple[str, Object]]:
    """Yield the head group and the worker groups as (path, group)."""
    yield f"{path}.headGroupSpec", spec["headGroupSpec"]
    yield from worker_groups(spec, path)


def worker_groups(spec: Object, path: str) -> Iterator[tuple[str, Object]]:
    """Yield the worker groups as (path, group)."""
    for index, group in enumerate(spec.get("workerGroupSpecs") or []):
        yield f"{path}.workerGroupSpecs[{index}]", group


def ray_container(group: Object) -> Object:
    """Return the container that runs Ray in the pods of a group: the first one."""
    found = ((group["template"] or {}).get("spec") or {}).get("containers") or [{}]
    return found[0] or {}


def head_variables(spec: Object) -> dict[str, str | None]:
    """Return the environment of the head: name → value."""
    return variables_of(ray_container(spec["headGroupSpec"]))


def variables_of(container: Object) -> dict[str, str | None]:
    """Return the environment of a container: name → value, or None for a reference."""
    return {item["name"]: item.get("value") for item in container.get("env") or []}


def offered(group: Object, resource: str, option: str) -> Decimal:
    """Return how much of a resource Ray counts in a pod: by rayStartParams, or by its limits."""
    explicit = parse_quantity((group.get("rayStartParams") or {}).get(option, ""))
    if explicit is not None:
        return explicit
    by_group = {name.lower(): text for name, text in (group.get("resources") or {}).items()}
    own = parse_quantity(by_group.get({"cpu": "cpu"}.get(resource, "gpu"), ""))
    if own is not None:
        return own
    limits = resources.limits_of(ray_container(group))
    if resource == "cpu":
        return limits.get("cpu", Decimal("Infinity"))
    return resources.gpus(limits)


def autoscales(spec: Object) -> bool:
    """Return whether the cluster autoscales."""
    return bool(spec.get("enableInTreeAutoscaling"))


def autoscales_by_v2(spec: Object) -> bool:
    """Return whether the cluster is configured for autoscaler v2."""
    if not autoscales(spec):
        return False
    version = (spec.get("autoscalerOptions") or {}).get("version")
    return version == "v2" or head_variables(spec).get(AUTOSCALER_V2_VARIABLE) in TRUE


def ray_version(spec: Object) -> Version | None:
    """Return rayVersion, or None if it is not a version."""
    try:
        return Version(spec.get("rayVersion") or "")
    except InvalidVersion:
        return None


def is_at_least(spec: Object, version: Version) -> bool:
    """Return whether rayVersion is at least a version."""
    own = ray_version(spec)
    return own is not None and own >= version


def needs_ray(spec: Object, feature: str, place: str) -> Findings:
    """Check that rayVersion supports a feature."""
    needed, own = schema.kuberay().tables["since_ray"][feature], spec.get("rayVersion")
    if not own:
        yield error(place, f"needs rayVersion {needed} or later: set it")
    elif not is_at_least(spec, Version(needed)):
        yield error(place, f"needs Ray {needed} or later, but rayVersion is {own}")


def managed(names: str | list[str], variables: object, place: str) -> Findings:
    """Reject variables that only the operator may set."""
    given = {item["name"] for item in variables or []} if isinstance(variables, list) else set()
    for name in [names] if isinstance(names, str) else names:
        if name in given:
            yield error(place, f"{name} is set by the operator: remove it")
