"""Requests and limits of containers."""

from collections.abc import Mapping
from decimal import Decimal
from typing import Any

from prioritycut_ray.kubernetes import schema
from prioritycut_ray.kubernetes.check.findings import Findings, Object, error, warning
from prioritycut_ray.kubernetes.syntax import did_you_mean, parse_quantity

_GPUS = ("nvidia.com/gpu", "amd.com/gpu", "google.com/tpu")
_LEAST_MEMORY = Decimal(4 * 2**20)
"""In bytes; a container cannot start with less."""


def check(resources: Object, place: str) -> Findings:
    """Compare requests and limits."""
    requests, limits = (amounts(resources.get(side)) for side in ("requests", "limits"))
    for name, request in requests.items():
        spot, limit = schema.within(f"{place}.requests", name), limits.get(name)
        if limit is not None and request > limit:
            yield error(spot, f"is {plain(request)}, greater than its limit {plain(limit)}")
        elif limit is None and _is_device(name):
            yield error(spot, "needs an equal limit: devices are not overcommitted")
        elif limit is not None and request != limit and _is_device(name):
            yield error(
                spot,
                f"is {plain(request)}, its limit is {plain(limit)}: devices need equal values",
            )
    for side, parsed in (("requests", requests), ("limits", limits)):
        for name, amount in parsed.items():
            yield from _amount_rules(name, amount, schema.within(f"{place}.{side}", name))


def _amount_rules(name: str, amount: Decimal | None, spot: str) -> Findings:
    if amount is None:
        return
    if _is_device(name) and amount != int(amount):
        yield error(spot, "is not an integer: devices cannot be shared by fractions")
    if name == "cpu" and 0 < amount < Decimal("0.001"):
        yield error(spot, "is less than 1m")
    if name == "memory" and amount != int(amount):
        yield warning(spot, "is a fraction of a byte: the suffix m means thousandths; use Mi")
    elif name == "memory" and 0 < amount < _LEAST_MEMORY:
        yield warning(
            spot, f"is {plain(amount)} bytes, too little to start: add a unit such as Mi or Gi"
        )
    is_one = any(name == known or name.startswith(f"{known}.") for known in _GPUS)
    hint = "" if is_one else did_you_mean(name, _GPUS, alike=0.8)
    if hint:
        yield warning(spot, f"{name} is not a known device resource{hint}")


def amounts(side: Any) -> dict[str, Decimal]:
    """Return the valid quantities by resource."""
    parsed = {name: parse_quantity(text) for name, text in (side or {}).items()}
    return {name: amount for name, amount in parsed.items() if amount is not None}


def limits_of(container: Object) -> dict[str, Decimal]:
    """Return the limits of a container, or its requests if it has no limits."""
    resources = container.get("resources") or {}
    return amounts(resources.get("limits") or resources.get("requests"))


def gpus(limits: Mapping[str, Decimal]) -> Decimal:
    """Return the number of GPUs in the limits, as the operator counts them."""
    return sum(
        (
            amount
            for name, amount in limits.items()
            if name.endswith("gpu") or name.startswith("nvidia.com/mig-")
        ),
        Decimal(0),
    )


def _is_device(name: str) -> bool:
    return name.startswith("hugepages-") or (
        "/" in name and not name.split("/")[0].endswith("kubernetes.io")
    )


def plain(amount: Decimal) -> str:
    """Format an amount without an exponent."""
    return f"{amount.normalize():f}"
