"""Names of objects."""

import re

from prioritycut_ray.kubernetes import schema
from prioritycut_ray.kubernetes.check.findings import Findings, Object, error
from prioritycut_ray.kubernetes.syntax import FORMATS, is_dns_label_1035

_GENERATED = 5
"""Characters that the API server appends to a generateName."""
_ANY_NAME = ("Role", "ClusterRole", "RoleBinding", "ClusterRoleBinding")
_LABELS = ("Namespace", "Service")


def title(document: Object) -> str:
    """Return the name of an object in messages: ``RayJob/train``."""
    metadata = document.get("metadata")
    name = None
    if isinstance(metadata, dict):
        name = metadata.get("name") or metadata.get("generateName")
    return f"{document.get('kind')}/{name}"


def check(kind: str, document: Object) -> Findings:
    """Check the name of an object."""
    metadata = document.get("metadata") or {}
    name, prefix = metadata.get("name"), metadata.get("generateName")
    if not name and not prefix:
        if kind not in schema.KINDS and not _is_object(kind):
            return
        yield error("metadata.name", "is missing: an object needs a name")
        return
    place = "metadata.name" if name else "metadata.generateName"
    text = name or f"{prefix}{'x' * _GENERATED}"
    longest = schema.kuberay().tables["longest_name"].get(kind, 253)
    if len(text) > longest:
        rest = "" if name else f", including the {_GENERATED} that are appended"
        yield error(
            place, f"has {len(text)} characters{rest}; the maximum for a {kind} is {longest}"
        )
    if kind in _ANY_NAME:
        if re.search("[/%]", text) or text in (".", ".."):
            yield error(
                place, f"{name or prefix!r} contains a character that is not allowed: / or %"
            )
    elif kind in schema.KINDS:
        if len(text) <= longest and not is_dns_label_1035(text):
            yield error(
                place,
                f"{name or prefix!r} is not a DNS label: a-z, 0-9 and -, starting with a letter",
            )
    else:
        wanted = FORMATS["dns-label" if kind in _LABELS else "dns-subdomain"]
        if not wanted.matches(text):
            yield error(place, f"{name or prefix!r} is not {wanted.expected}")


def _is_object(kind: str) -> bool:
    return not kind.endswith(("Review", "List"))
