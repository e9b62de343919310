"""Kubernetes' own kinds beside pods: what the API server says, and what would never work."""

import re
from collections.abc import Iterable, Mapping
from functools import cache
from typing import Any

from prioritycut_ray.kubernetes import schema
from prioritycut_ray.kubernetes.check import pods, schedules
from prioritycut_ray.kubernetes.check.findings import Findings, Object, error, warning

_ALWAYS = ("Deployment", "ReplicaSet", "StatefulSet", "DaemonSet", "ReplicationController")
_TO_END = ("Never", "OnFailure")


def check(kind: str, document: Object) -> Findings:
    """The rules of one of Kubernetes' own kinds."""
    spec = document.get("spec") or {}
    if kind in _ALWAYS:
        yield from _controller_rules(kind, spec)
    match kind:
        case "Job":
            yield from _job_rules(spec, "spec")
        case "CronJob":
            yield from schedules.check(spec)
            yield from _job_rules(
                (spec.get("jobTemplate") or {}).get("spec") or {}, "spec.jobTemplate.spec"
            )
            yield from _missed_rules(spec)
        case "Deployment":
            yield from _strategy_rules(spec)
        case "Service":
            yield from _service_rules(spec)
        case "PodDisruptionBudget":
            yield from _budget_rules(spec)
        case "NetworkPolicy":
            yield from _policy_rules(spec)
        case "Secret":
            yield from _secret_rules(document)
        case "Role" | "ClusterRole":
            yield from _role_rules(kind, document)
        case "RoleBinding" | "ClusterRoleBinding":
            yield from _binding_rules(kind, document)
        case "PersistentVolumeClaim":
            yield from _claim_rules(spec)
        case "HorizontalPodAutoscaler":
            yield from _scale_rules(spec)


def _pod_of(spec: Object) -> Object:
    return (spec.get("template") or {}).get("spec") or {}


def _job_rules(spec: Object, path: str) -> Findings:
    policy = _pod_of(spec).get("restartPolicy")
    if policy not in _TO_END:
        yield error(
            f"{path}.template.spec.restartPolicy",
            f"is {policy or 'Always'}; of a Job it is Never or OnFailure",
        )
    if spec.get("completionMode") == "Indexed" and not spec.get("completions"):
        yield error(f"{path}.completions", "is missing: completionMode Indexed needs it")


_LEAST_DELAY = 10
"""Seconds between two looks of the CronJob controller."""


def _missed_rules(spec: Object) -> Findings:
    delay = spec.get("startingDeadlineSeconds")
    if delay is not None and 0 <= delay < _LEAST_DELAY:
        yield warning(
            "spec.startingDeadlineSeconds",
            f"is {delay}: the controller looks every {_LEAST_DELAY} s, so most jobs never start",
        )


def _controller_rules(kind: str, spec: Object) -> Findings:
    policy = _pod_of(spec).get("restartPolicy") or "Always"
    if policy != "Always":
        yield error(
            "spec.template.spec.restartPolicy", f"is {policy}; of a {kind} it is Always: remove it"
        )
    labels = ((spec.get("template") or {}).get("metadata") or {}).get("labels") or {}
    selector = spec.get("selector") or {}
    wanted = selector.get("matchLabels") or {} if kind != "ReplicationController" else selector
    if not wanted and not selector.get("matchExpressions"):
        yield error("spec.selector", f"is empty: a {kind} must select its pods")
    for key, value in wanted.items():
        if labels.get(key) != value:
            has = f"have {labels[key]}" if key in labels else "have no such label"
            yield error(
                schema.within("spec.selector.matchLabels", key),
                f"is {value}, the labels of the pods {has}: make both equal",
            )


def _strategy_rules(spec: Object) -> Findings:
    strategy = spec.get("strategy") or {}
    rolling = strategy.get("rollingUpdate")
    if strategy.get("type") == "Recreate" and rolling:
        yield error("spec.strategy.rollingUpdate", "is not for type Recreate: remove it")
    if rolling and all(
        str(rolling.get(key)) in ("0", "0%") for key in ("maxSurge", "maxUnavailable")
    ):
        yield error("spec.strategy.rollingUpdate", "maxSurge and maxUnavailable cannot both be 0")


_NODE_PORTS = range(30000, 32768)


def _service_rules(spec: Object) -> Findings:
    kind, ports = spec.get("type") or "ClusterIP", spec.get("ports") or []
    if kind == "ExternalName":
        if not spec.get("externalName"):
            yield error("spec.externalName", "is missing: type ExternalName needs it")
    elif not ports and spec.get("clusterIP") != "None":
        yield error("spec.ports", "is empty: a service needs a port")
    for index, port in enumerate(ports):
        spot = f"spec.ports[{index}]"
        if len(ports) > 1 and not port.get("name"):
            yield error(f"{spot}.name", "is missing: with several ports each has a name")
        node_port = port.get("nodePort")
        if node_port and kind == "ClusterIP":
            yield error(f"{spot}.nodePort", "is for type NodePort or LoadBalancer")
        elif node_port and node_port not in _NODE_PORTS:
            yield warning(f"{spot}.nodePort", "is outside of 30000..32767, the usual range")
    taken = [(port.get("port"), port.get("protocol") or "TCP") for port in ports]
    for index, key in enumerate(taken):
        if taken.index(key) != index:
            yield error(f"spec.ports[{index}].port", f"{key[0]} is there twice: drop one")


def _budget_rules(spec: Object) -> Findings:
    if spec.get("minAvailable") is None and spec.get("maxUnavailable") is None:
        yield warning(
            "spec", "has neither minAvailable nor maxUnavailable: it protects one pod only"
        )
    if not spec.get("selector"):
        yield warning("spec.selector", "is missing: it selects no pod")


def _policy_rules(spec: Object) -> Findings:
    types, rules = spec.get("policyTypes"), spec.get("egress") or []
    if rules and "Egress" in (types or ["Egress"]) and not opens_dns(rules):
        yield warning("spec.egress", "lets no pod out to DNS: add a rule for port 53, UDP and TCP")
    for kind, field in (("Ingress", "ingress"), ("Egress", "egress")):
        if types and kind not in types and spec.get(field):
            yield error(f"spec.{field}", f"has no effect: policyTypes does not name {kind}")
        for index, rule in enumerate(spec.get(field) or []):
            spot = f"spec.{field}[{index}]"
            peers = "from" if field == "ingress" else "to"
            for number, peer in enumerate((rule or {}).get(peers) or []):
                yield from _peer_rules(peer or {}, f"{spot}.{peers}[{number}]")
            for number, port in enumerate((rule or {}).get("ports") or []):
                yield from _port_rules(port, f"{spot}.ports[{number}]")


def _peer_rules(peer: Object, spot: str) -> Findings:
    selectors = [key for key in ("podSelector", "namespaceSelector") if peer.get(key) is not None]
    if peer.get("ipBlock") and selectors:
        yield error(f"{spot}.ipBlock", f"and {selectors[0]} exclude each other: write two peers")
    if not peer.get("ipBlock") and not selectors:
        yield error(spot, "is empty: a peer has a podSelector, a namespaceSelector or an ipBlock")


def _port_rules(port: Object, spot: str) -> Findings:
    first, last = port.get("port"), port.get("endPort")
    if last is None:
        return
    if not isinstance(first, int):
        yield error(f"{spot}.endPort", "needs a port that is a number")
    elif last < first:
        yield error(f"{spot}.endPort", f"is {last}, less than port: {first}")


def opens_dns(rules: Iterable[Object]) -> bool:
    """Whether rules for egress let pods ask for names."""
    return any(
        not rule.get("ports") or any(_is_dns(port) for port in rule["ports"]) for rule in rules
    )


def _is_dns(port: Object) -> bool:
    first, last = port.get("port"), port.get("endPort")
    if isinstance(first, int) and isinstance(last, int):
        return first <= _DNS_PORT <= last
    return first in (_DNS_PORT, "dns", "domain", None)


_DNS_PORT = 53


# Secrets.

_KEYS_OF_TYPE = {
    "kubernetes.io/tls": ("tls.crt", "tls.key"),
    "kubernetes.io/dockerconfigjson": (".dockerconfigjson",),
    "kubernetes.io/dockercfg": (".dockercfg",),
    "kubernetes.io/ssh-auth": ("ssh-privatekey",),
}


def _secret_rules(document: Object) -> Findings:
    given = {**(document.get("data") or {}), **(document.get("stringData") or {})}
    for key in _KEYS_OF_TYPE.get(document.get("type") or "", ()):
        if key not in given:
            yield error("stringData", f"the key {key} is missing: type {document['type']} needs it")
    for field in ("data", "stringData"):
        for key in document.get(field) or {}:
            yield from pods.misspelt_variable(key, schema.within(field, key))


# Rights.


@cache
def _singular() -> frozenset[str]:
    kinds = {*(kind for _, kind in schema.core_kinds()), *schema.KINDS}
    return frozenset(kind.lower() for kind in kinds if not kind.endswith("s"))


_VERBS = (
    *("get", "list", "watch", "create", "update", "patch", "delete", "deletecollection", "*"),
    *("use", "bind", "escalate", "impersonate", "approve", "sign", "attest"),
)


def _role_rules(kind: str, document: Object) -> Findings:
    for index, rule in enumerate(document.get("rules") or []):
        spot = f"rules[{index}]"
        if rule.get("nonResourceURLs"):
            if kind == "Role":
                yield error(f"{spot}.nonResourceURLs", "are for a ClusterRole only")
            continue
        for field in ("apiGroups", "resources"):
            if not rule.get(field):
                way_out = ' ("" is the core group)' if field == "apiGroups" else ""
                yield error(f"{spot}.{field}", f"is empty: the rule needs one{way_out}")
        yield from _rule_rules(rule, spot)


def _rule_rules(rule: Object, spot: str) -> Findings:
    """Names that are syntactically right, and that no request will ever match."""
    for group in rule.get("apiGroups") or []:
        if "/" in group or re.fullmatch(r"v\d\w*", group):
            yield error(
                f"{spot}.apiGroups", f"{group!r} has a version: write {group.rpartition('/')[0]!r}"
            )
    for resource in rule.get("resources") or []:
        if resource != resource.lower() or resource in _singular():
            yield error(
                f"{spot}.resources", f"{resource!r} is a kind: write its plural, in lower case"
            )
    for verb in rule.get("verbs") or []:
        if verb not in _VERBS and ":" not in verb:
            hint = schema.did_you_mean(verb, _VERBS) or f": one of {', '.join(_VERBS[:9])}"
            yield warning(f"{spot}.verbs", f"{verb!r} is not a verb of Kubernetes{hint}")


_RBAC = "rbac.authorization.k8s.io"


def _binding_rules(kind: str, document: Object) -> Findings:
    reference = document.get("roleRef") or {}
    if (reference.get("apiGroup") or _RBAC) != _RBAC:
        yield error("roleRef.apiGroup", f"is {_RBAC}, or left out")
    if not reference.get("name"):
        yield error("roleRef.name", "is missing")
    if kind == "ClusterRoleBinding" and reference.get("kind") == "Role":
        yield error("roleRef.kind", "of a ClusterRoleBinding is ClusterRole")
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
            yield error(f"{spot}.apiGroup", 'of a ServiceAccount is "": remove it')
    elif group not in (None, "", _RBAC):
        yield error(f"{spot}.apiGroup", f"of a {subject.get('kind')} is {_RBAC}")
    elif subject.get("namespace"):
        yield error(f"{spot}.namespace", f"a {subject.get('kind')} has none: remove it")


# Storage and scale.


def _claim_rules(spec: Object) -> Findings:
    if not spec.get("accessModes"):
        yield error("spec.accessModes", "is empty: a claim needs one, such as ReadWriteOnce")
    requests = (spec.get("resources") or {}).get("requests") or {}
    if "storage" not in requests:
        yield error("spec.resources.requests.storage", "is missing: the size of the volume")


def _scale_rules(spec: Object) -> Findings:
    least, most = spec.get("minReplicas") or 1, spec.get("maxReplicas") or 1
    if least > most:
        yield error("spec.minReplicas", f"is {least}, more than maxReplicas: {most}")
