"""Roles and role bindings."""

import re
from collections.abc import Mapping
from functools import cache
from typing import Any

from prioritycut_ray.kubernetes import schema
from prioritycut_ray.kubernetes.check.findings import Findings, Object, error, warning
from prioritycut_ray.kubernetes.syntax import did_you_mean


@cache
def _singular() -> frozenset[str]:
    kinds = {*(kind for _, kind in schema.core_kinds()), *schema.KINDS}
    return frozenset(kind.lower() for kind in kinds if not kind.endswith("s"))


_VERBS = (
    *("get", "list", "watch", "create", "update", "patch", "delete", "deletecollection", "*"),
    *("use", "bind", "escalate", "impersonate", "approve", "sign", "attest"),
)


def check_role(kind: str, document: Object) -> Findings:
    """Check the rules of a Role or a ClusterRole."""
    for index, rule in enumerate(document.get("rules") or []):
        spot = f"rules[{index}]"
        if rule.get("nonResourceURLs"):
            if kind == "Role":
                yield error(f"{spot}.nonResourceURLs", "are allowed in a ClusterRole only")
            continue
        for field in ("apiGroups", "resources"):
            if not rule.get(field):
                way_out = ' ("" is the core group)' if field == "apiGroups" else ""
                yield error(f"{spot}.{field}", f"is empty: the rule needs one{way_out}")
        yield from _rule_rules(rule, spot)


def _rule_rules(rule: Object, spot: str) -> Findings:
    """Find names that are syntactically valid but never match a request."""
    for group in rule.get("apiGroups") or []:
        if "/" in group or re.fullmatch(r"v\d\w*", group):
            yield error(
                f"{spot}.apiGroups",
                f"{group!r} contains a version: use {group.rpartition('/')[0]!r}",
            )
    for resource in rule.get("resources") or []:
        if resource != resource.lower() or resource in _singular():
            yield error(
                f"{spot}.resources", f"{resource!r} is a kind: use its plural, in lower case"
            )
    for verb in rule.get("verbs") or []:
        if verb not in _VERBS and ":" not in verb:
            hint = did_you_mean(verb, _VERBS) or f"; use one of {', '.join(_VERBS[:9])}"
            yield warning(f"{spot}.verbs", f"{verb!r} is not a Kubernetes verb{hint}")


_RBAC = "rbac.authorization.k8s.io"


def check_binding(kind: str, document: Object) -> Findings:
    """Check the role and the subjects of a binding."""
    reference = document.get("roleRef") or {}
    if (reference.get("apiGroup") or _RBAC) != _RBAC:
        yield error("roleRef.apiGroup", f"must be {_RBAC}, or omitted")
    if not reference.get("name"):
        yield error("roleRef.name", "is missing")
    if kind == "ClusterRoleBinding" and reference.get("kind") == "Role":
        yield error("roleRef.kind", "must be ClusterRole for a ClusterRoleBinding")
    for index, subject in enumerate(document.get("subjects") or []):
        yield from _subject_rules(subject, f"subjects[{index}]")


def _subject_rules(subject: Mapping[str, Any], spot: str) -> Findings:
    group = subject.get("apiGroup")
    if not subject.get("name"):
        yield error(f"{spot}.name", "is missing")
    if subject.get("kind") == "ServiceAccount":
        if not subject.get("namespace"):
            yield error(f"{spot}.namespace", "is missing: a ServiceAccount needs it here")
        if group:
            yield error(f"{spot}.apiGroup", 'must be "" for a ServiceAccount: remove it')
    elif group not in (None, "", _RBAC):
        yield error(f"{spot}.apiGroup", f"must be {_RBAC} for a {subject.get('kind')}")
    elif subject.get("namespace"):
        yield error(f"{spot}.namespace", f"does not apply to a {subject.get('kind')}: remove it")
