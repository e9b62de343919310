"""rayStartParams: what becomes the options of ``ray start``, through a shell."""

import json
import re
import shlex
from collections.abc import Callable
from decimal import Decimal

from prioritycut_ray.kubernetes import schema
from prioritycut_ray.kubernetes.check import resources
from prioritycut_ray.kubernetes.check.findings import Finding, Findings, Object, error, warning
from prioritycut_ray.kubernetes.syntax import did_you_mean, parse_quantity

_NUMBERS = {"integer": r"\d+", "float": r"\d+(\.\d*)?|\.\d+"}
_LEAST_OBJECT_STORE = 75 * 2**20
"""Bytes; Ray refuses less."""
_DASHBOARD = 8265
_LOOPBACK = ("127.0.0.1", "localhost", "::1")


def check(parameters: Object, container: Object, template: Object, place: str) -> Findings:
    """The options of one group.

    Args:
        parameters: rayStartParams of the group.
        container: what runs Ray.
        template: the pod of the group.
        place: the path of the group.
    """
    place = f"{place}.rayStartParams"
    for name, value in parameters.items():
        yield from _option_rules(name, value, schema.within(place, name))
    if "head" in parameters and ".workerGroupSpecs[" in place:
        yield error(f"{place}.head", "makes each worker a cluster of its own: remove it")
    yield from _gpu_rules(parameters, container, place)
    yield from _memory_rules(parameters, container, template, place)


def _option_rules(name: str, value: str, spot: str) -> Findings:
    kinds = schema.facts().tables["ray_start"]
    kind = next((kind for kind, names in kinds.items() if name in names), None)
    if kind is None:
        yield from _unknown_option(name, kinds, spot)
    elif kind == "retired":
        yield warning(spot, f"`ray start` of Ray 2.60 has no option {name!r} any more: remove it")
    elif "$" in value:
        return  # the shell puts it in
    elif kind in _NUMBERS and not re.fullmatch(_NUMBERS[kind], value):
        amount = parse_quantity(value)
        way_out = f": write {int(amount)}" if amount and amount >= 1 else ""
        unit = " of bytes" if "memory" in name else ""
        yield error(spot, f"{value!r} is not a number{unit}{way_out}")
    elif kind in ("flag", "boolean") and value.lower() not in ("true", "false"):
        yield error(spot, f"{value!r} is neither 'true' nor 'false'")
    elif name == "resources":
        yield from _resources_rules(value, spot)


def _unknown_option(name: str, kinds: Object, spot: str) -> Findings:
    known = [name for kind, names in kinds.items() if kind != "retired" for name in names]
    plain = name.strip().lstrip("-").replace("_", "-").lower()
    if plain in known:
        yield error(spot, f"`ray start` has no option {name!r}: write {plain}")
        return
    hint = did_you_mean(plain, known, alike=0.75)
    if hint:
        yield error(spot, f"`ray start` has no option {name!r}{hint}")
    else:
        yield warning(spot, f"`ray start` of Ray 2.60 has no option {name!r}: remove it")


_RESOURCES_FORM = """write '"{\\"NAME\\": 1}"', with both kinds of quotes"""


def _resources_rules(value: str, spot: str) -> Findings:
    """A JSON object that is still one after the shell has read it."""
    try:
        words = shlex.split(value)
        resources = json.loads(words[0]) if len(words) == 1 else None
    except ValueError:
        resources = None
    if not isinstance(resources, dict):
        yield error(spot, f"{value!r} is not a JSON object for the shell: {_RESOURCES_FORM}")
    elif not all(isinstance(amount, int | float) for amount in resources.values()):
        yield error(spot, f"{value!r}: amounts are numbers")


# Against the pod.


def _gpu_rules(parameters: Object, container: Object, place: str) -> Findings:
    text = parameters.get("num-gpus", "0")
    if not re.fullmatch(r"\d+", text) or int(text) == 0:
        return
    gpus = resources.gpus(resources.limits_of(container))
    if int(text) > gpus and not _is_without_gpus(container.get("image") or ""):
        has = f"{gpus:f}" if gpus else "no"
        yield warning(
            f"{place}.num-gpus",
            f"is {text}, but the container has {has} GPU: add nvidia.com/gpu to its limits",
        )


def _is_without_gpus(image: str) -> bool:
    """Ray's own image for CPUs: there GPUs are a number to schedule by, as in KubeRay's samples."""
    name, _, tag = image.partition(":")
    return name == "rayproject/ray" and not re.search("gpu|cu[0-9]", tag)


def _memory_rules(parameters: Object, container: Object, template: Object, place: str) -> Findings:
    text, spot = parameters.get("object-store-memory", ""), f"{place}.object-store-memory"
    memory = resources.limits_of(container).get("memory")
    given = parameters.get("memory", "")
    if re.fullmatch(r"\d+", given) and memory and int(given) > memory:
        yield warning(f"{place}.memory", f"is {given}, more than the container's {memory:f} bytes")
    if not re.fullmatch(r"\d+", text):
        return
    size, shm = int(text), _shared_memory(container, template)
    if size < _LEAST_OBJECT_STORE:
        yield error(spot, f"is {size} bytes, Ray needs {_LEAST_OBJECT_STORE} at least")
    elif memory and size > memory:
        yield error(spot, f"is {size} bytes, more than the container's memory {memory:f}")
    elif shm and size > shm:
        yield warning(
            spot, f"is {size} bytes, more than /dev/shm with {shm:f}: Ray would use a disk"
        )


def _shared_memory(container: Object, template: Object) -> Decimal | None:
    volumes = {item["name"]: item for item in (template.get("spec") or {}).get("volumes") or []}
    for mount in container.get("volumeMounts") or []:
        if mount.get("mountPath") == "/dev/shm":
            directory = (volumes.get(mount["name"]) or {}).get("emptyDir") or {}
            return parse_quantity(directory.get("sizeLimit", ""))
    return None


# The dashboard, which the operator and the submitter talk to.


def dashboard_rules(spec: Object, path: str, owner: str) -> Findings:
    """Whether the operator reaches the head's dashboard."""
    head, place = spec["headGroupSpec"], f"{path}.headGroupSpec.rayStartParams"
    parameters = head.get("rayStartParams") or {}
    containers = ((head["template"] or {}).get("spec") or {}).get("containers") or []
    if len(containers) != 1:  # a proxy may stand before it
        return
    serious = warning if owner == "RayCluster" else error
    if parameters.get("dashboard-host") in _LOOPBACK:
        yield serious(
            f"{place}.dashboard-host",
            f"is {parameters['dashboard-host']}: neither the operator nor a submitter reaches the "
            "dashboard; write 0.0.0.0",
        )
    if parameters.get("include-dashboard", "").lower() == "false":
        yield serious(f"{place}.include-dashboard", "is false: jobs are submitted to the dashboard")
    yield from _port_rules(parameters, containers[0], place, serious)


def _port_rules(
    parameters: Object, container: Object, place: str, serious: Callable[[str, str], Finding]
) -> Findings:
    """The head's service leads to the container's ports, so Ray must listen there."""
    declared = {port.get("name"): port["containerPort"] for port in container.get("ports") or []}
    for option, name in schema.facts().tables["ports"].items():
        own, there = parameters.get(option, ""), declared.get(name)
        if there is None and option == "dashboard-port":
            there = _DASHBOARD
        if own.isdigit() and there is not None and int(own) != there:
            yield (serious if option == "dashboard-port" else warning)(
                f"{place}.{option}",
                f"is {own}, the container's port {name} is {there}: make both equal",
            )
