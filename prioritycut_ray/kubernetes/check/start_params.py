"""rayStartParams, which become options of ``ray start`` in a shell."""

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
"""In bytes: the minimum that Ray accepts."""
_DASHBOARD = 8265
_LOOPBACK = ("127.0.0.1", "localhost", "::1")


def check(parameters: Object, container: Object, template: Object, place: str) -> Findings:
    """Check the options of a group.

    Args:
        parameters: rayStartParams of the group.
        container: the container that runs Ray.
        template: pod template of the group.
        place: path of the group.
    """
    place = f"{place}.rayStartParams"
    for name, value in parameters.items():
        yield from _option_rules(name, value, schema.within(place, name))
    if "head" in parameters and ".workerGroupSpecs[" in place:
        yield error(f"{place}.head", "makes each worker the head of its own cluster: remove it")
    yield from _gpu_rules(parameters, container, place)
    yield from _memory_rules(parameters, container, template, place)


def _option_rules(name: str, value: str, spot: str) -> Findings:
    kinds = schema.kuberay().tables["ray_start"]
    kind = next((kind for kind, names in kinds.items() if name in names), None)
    if kind is None:
        yield from _unknown_option(name, kinds, spot)
    elif kind == "retired":
        yield warning(spot, f"`ray start` of Ray 2.60 no longer has the option {name!r}: remove it")
    elif "$" in value:
        return  # the shell expands it
    elif kind in _NUMBERS and not re.fullmatch(_NUMBERS[kind], value):
        amount = parse_quantity(value)
        way_out = f": use {int(amount)}" if amount and amount >= 1 else ""
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
        yield error(spot, f"`ray start` has no option {name!r}: use {plain}")
        return
    hint = did_you_mean(plain, known, alike=0.75)
    if hint:
        yield error(spot, f"`ray start` has no option {name!r}{hint}")
    else:
        yield warning(spot, f"`ray start` of Ray 2.60 has no option {name!r}: remove it")


_RESOURCES_FORM = """use '"{\\"NAME\\": 1}"', with both kinds of quotes"""


def _resources_rules(value: str, spot: str) -> Findings:
    """Check for a JSON object that is still one after the shell has parsed it."""
    try:
        words = shlex.split(value)
        resources = json.loads(words[0]) if len(words) == 1 else None
    except ValueError:
        resources = None
    if not isinstance(resources, dict):
        yield error(spot, f"{value!r} is not a JSON object in a shell: {_RESOURCES_FORM}")
    elif not all(isinstance(amount, int | float) for amount in resources.values()):
        yield error(spot, f"{value!r}: amounts must be numbers")


# Compared with the pod.


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
    """Return whether it is Ray's CPU image, where KubeRay's samples use num-gpus for scheduling."""
    name, _, tag = image.partition(":")
    return name == "rayproject/ray" and not re.search("gpu|cu[0-9]", tag)


def _memory_rules(parameters: Object, container: Object, template: Object, place: str) -> Findings:
    text, spot = parameters.get("object-store-memory", ""), f"{place}.object-store-memory"
    memory = resources.limits_of(container).get("memory")
    given = parameters.get("memory", "")
    if re.fullmatch(r"\d+", given) and memory and int(given) > memory:
        yield warning(
            f"{place}.memory", f"is {given}, greater than the container's {memory:f} bytes"
        )
    if not re.fullmatch(r"\d+", text):
        return
    size, shm = int(text), _shared_memory(container, template)
    if size < _LEAST_OBJECT_STORE:
        yield error(spot, f"is {size} bytes; Ray needs at least {_LEAST_OBJECT_STORE}")
    elif memory and size > memory:
        yield error(spot, f"is {size} bytes, greater than the container's memory {memory:f}")
    elif shm and size > shm:
        yield warning(
            spot, f"is {size} bytes, greater than /dev/shm with {shm:f}: Ray would use a disk"
        )


def _shared_memory(container: Object, template: Object) -> Decimal | None:
    volumes = {item["name"]: item for item in (template.get("spec") or {}).get("volumes") or []}
    for mount in container.get("volumeMounts") or []:
        if mount.get("mountPath") == "/dev/shm":
            directory = (volumes.get(mount["name"]) or {}).get("emptyDir") or {}
            return parse_quantity(directory.get("sizeLimit", ""))
    return None


# The dashboard, which the operator and the submitter connect to.


def dashboard_rules(spec: Object, path: str, owner: str) -> Findings:
    """Check that the operator can reach the head's dashboard."""
    head, place = spec["headGroupSpec"], f"{path}.headGroupSpec.rayStartParams"
    parameters = head.get("rayStartParams") or {}
    containers = ((head["template"] or {}).get("spec") or {}).get("containers") or []
    if len(containers) != 1:  # there may be a proxy
        return
    serious = warning if owner == "RayCluster" else error
    if parameters.get("dashboard-host") in _LOOPBACK:
        yield serious(
            f"{place}.dashboard-host",
            f"is {parameters['dashboard-host']}: neither the operator nor a submitter can reach "
            "the dashboard; use 0.0.0.0",
        )
    if parameters.get("include-dashboard", "").lower() == "false":
        yield serious(
            f"{place}.include-dashboard",
            "is false, but jobs are submitted through the dashboard: remove it",
        )
    yield from _port_rules(parameters, containers[0], place, serious)


def _port_rules(
    parameters: Object, container: Object, place: str, serious: Callable[[str, str], Finding]
) -> Findings:
    """Check that Ray listens on the container's ports, to which the head's service forwards."""
    declared = {port.get("name"): port["containerPort"] for port in container.get("ports") or []}
    for option, name in schema.kuberay().tables["ports"].items():
        own, there = parameters.get(option, ""), declared.get(name)
        if there is None and option == "dashboard-port":
            there = _DASHBOARD
        if own.isdigit() and there is not None and int(own) != there:
            yield (serious if option == "dashboard-port" else warning)(
                f"{place}.{option}",
                f"is {own}, but the container's port {name} is {there}: make them equal",
            )
