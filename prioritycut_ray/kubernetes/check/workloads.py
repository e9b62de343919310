"""Kubernetes' own kinds other than pods: rules of the API server, and what cannot work."""

from collections.abc import Iterable

from prioritycut_ray.kubernetes import schema
from prioritycut_ray.kubernetes.check import pods, rights, schedules
from prioritycut_ray.kubernetes.check.findings import Findings, Object, error, warning

_ALWAYS = ("Deployment", "ReplicaSet", "StatefulSet", "DaemonSet", "ReplicationController")
_TO_END = ("Never", "OnFailure")


def check(kind: str, document: Object) -> Findings:
    """Check an object of one of Kubernetes' own kinds."""
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
            yield from rights.check_role(kind, document)
        case "RoleBinding" | "ClusterRoleBinding":
            yield from rights.check_binding(kind, document)
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
            f"is {policy or 'Always'}; for a Job it must be Never or OnFailure",
        )
    if spec.get("completionMode") == "Indexed" and not spec.get("completions"):
        yield error(f"{path}.completions", "is missing: completionMode Indexed needs it")


_LEAST_DELAY = 10
"""Seconds between two syncs of the CronJob controller."""


def _missed_rules(spec: Object) -> Findings:
    delay = spec.get("startingDeadlineSeconds")
    if delay is not None and 0 <= delay < _LEAST_DELAY:
        yield warning(
            "spec.startingDeadlineSeconds",
            f"is {delay}: the controller syncs every {_LEAST_DELAY} s, so most jobs never start",
        )


def _controller_rules(kind: str, spec: Object) -> Findings:
    policy = _pod_of(spec).get("restartPolicy") or "Always"
    if policy != "Always":
        yield error(
            "spec.template.spec.restartPolicy",
            f"is {policy}; for a {kind} it must be Always: remove it",
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
                f"is {value}, but the labels of the pods {has}: make them equal",
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
            yield error(f"{spot}.name", "is missing: each of several ports needs a name")
        node_port = port.get("nodePort")
        if node_port and kind == "ClusterIP":
            yield error(f"{spot}.nodePort", "is for type NodePort or LoadBalancer only")
        elif node_port and node_port not in _NODE_PORTS:
            yield warning(f"{spot}.nodePort", "is outside the default range 30000..32767")
    taken = [(port.get("port"), port.get("protocol") or "TCP") for port in ports]
    for index, key in enumerate(taken):
        if taken.index(key) != index:
            yield error(f"spec.ports[{index}].port", f"{key[0]} appears twice: remove one")


def _budget_rules(spec: Object) -> Findings:
    if spec.get("minAvailable") is None and spec.get("maxUnavailable") is None:
        yield warning(
            "spec",
            "has neither minAvailable nor maxUnavailable: only one pod is protected",
        )
    if not spec.get("selector"):
        yield warning("spec.selector", "is missing, so no pod is selected")


def _policy_rules(spec: Object) -> Findings:
    types, rules = spec.get("policyTypes"), spec.get("egress") or []
    if rules and "Egress" in (types or ["Egress"]) and not opens_dns(rules):
        yield warning("spec.egress", "does not allow DNS: add a rule for port 53, UDP and TCP")
    for kind, field in (("Ingress", "ingress"), ("Egress", "egress")):
        if types and kind not in types and spec.get(field):
            yield error(f"spec.{field}", f"has no effect: policyTypes does not include {kind}")
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
        yield error(f"{spot}.ipBlock", f"cannot be combined with {selectors[0]}: use two peers")
    if not peer.get("ipBlock") and not selectors:
        yield error(spot, "is empty: a peer needs a podSelector, a namespaceSelector or an ipBlock")


def _port_rules(port: Object, spot: str) -> Findings:
    first, last = port.get("port"), port.get("endPort")
    if last is None:
        return
    if not isinstance(first, int):
        yield error(f"{spot}.endPort", "needs a numeric port")
    elif last < first:
        yield error(f"{spot}.endPort", f"is {last}, less than port: {first}")


def opens_dns(rules: Iterable[Object]) -> bool:
    """Return whether egress rules allow DNS."""
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
        yield error("spec.minReplicas", f"is {least}, greater than maxReplicas: {most}")
