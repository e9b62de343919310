"""Pods and pod templates: rules of the API server and the kubelet.

Single fields are checked by ``core.yaml``; these rules concern several fields.
Source: ``pkg/apis/core/validation`` of Kubernetes 1.36.
"""

import re
from collections import Counter
from collections.abc import Iterator
from typing import Any

from prioritycut_ray.kubernetes import schema
from prioritycut_ray.kubernetes.check import resources
from prioritycut_ray.kubernetes.check.findings import Finding, Findings, Object, error, warning
from prioritycut_ray.kubernetes.syntax import did_you_mean, parse_quantity


def check(kind: str, document: Object) -> Findings:
    """Check all pod templates and selectors of an object."""
    provided = _provided_volumes(kind, document)
    for path, template in templates(document):
        yield from _template_rules(template, path, provided)
    yield from _expression_rules(document, "")


def templates(tree: Any, path: str = "") -> Iterator[tuple[str, Object]]:
    """Yield all pod templates of an object: mappings whose spec has containers."""
    if isinstance(tree, dict):
        pod = tree.get("spec")
        if isinstance(pod, dict) and "containers" in pod:
            yield path, tree
        for key, value in tree.items():
            yield from templates(value, f"{path}.{key}".lstrip("."))
    elif isinstance(tree, list):
        for index, item in enumerate(tree):
            yield from templates(item, f"{path}[{index}]")


def containers(pod: Object) -> Iterator[tuple[str, Object]]:
    """Yield the init containers and containers of a pod as (path, container)."""
    for kind in ("initContainers", "containers"):
        for index, container in enumerate(pod.get(kind) or []):
            yield f"{kind}[{index}]", container


def _provided_volumes(kind: str, document: Object) -> set[str]:
    """Return the volumes that a controller adds to the pods of an object."""
    spec = document.get("spec") or {}
    if kind == "StatefulSet":
        claims = spec.get("volumeClaimTemplates") or []
        return {str((claim.get("metadata") or {}).get("name")) for claim in claims}
    job = spec.get("jobTemplate") or spec
    cluster = job.get("rayClusterSpec") or job.get("rayClusterConfig") or job
    volumes = schema.kuberay().tables["operator_volumes"].items()
    return {name for name, field in volumes if kind in schema.KINDS and cluster.get(field)}


def _template_rules(template: Object, path: str, provided: set[str]) -> Findings:
    pod, place = template["spec"], f"{path}.spec".lstrip(".")
    if not pod.get("containers"):
        yield error(f"{place}.containers", "is empty: a pod needs a container")
    yield from _name_rules(pod, place)
    yield from _toleration_rules(pod, place)
    yield from _host_rules(pod, place)
    volumes = {volume.get("name"): volume for volume in pod.get("volumes") or []}
    for spot, container in containers(pod):
        spot = f"{place}.{spot}"
        if not container.get("image"):
            yield error(f"{spot}.image", "is missing")
        yield from resources.check(container.get("resources") or {}, f"{spot}.resources")
        yield from environment_rules(container.get("env") or [], f"{spot}.env")
        yield from _mount_rules(container, volumes, provided, spot)
        yield from _security_rules(container, pod, spot)
        yield from _port_rules(container, spot)
        yield from _probe_rules(container, spot)
        yield from _grace_rules(container, pod, spot)


def _name_rules(pod: Object, place: str) -> Findings:
    names = Counter(container.get("name") for container in pod.get("containers") or [])
    for index, container in enumerate(pod.get("initContainers") or []):
        if names[container.get("name")]:
            yield error(
                f"{place}.initContainers[{index}].name",
                f"{container['name']!r} is also the name of a container: rename one",
            )


# Environment.

_STRICT_NAME = re.compile("[-._a-zA-Z][-._a-zA-Z0-9]*")


def environment_rules(variables: Any, place: str) -> Findings:
    """Check the names of environment variables, and that they are unique."""
    seen = Counter(variable.get("name") for variable in variables)
    for index, variable in enumerate(variables):
        name, spot = str(variable.get("name")), f"{place}[{index}].name"
        if not name or "=" in name or not name.isprintable() or not name.isascii():
            yield error(spot, f"{name!r} is not a variable name: letters, digits and _")
        elif not _STRICT_NAME.fullmatch(name):
            yield warning(
                spot,
                f"shells cannot read {name!r}, and Kubernetes before 1.34 rejects it: use A-Z, 0-9 "
                "and _",
            )
        if seen[name] > 1:
            seen[name] = 0
            yield warning(spot, f"{name!r} appears twice, and the last one is used: remove one")
        yield from misspelt_variable(name, spot)


_AWS = (
    *("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_ENDPOINT_URL"),
    *("AWS_ENDPOINT_URL_S3", "AWS_REGION", "AWS_DEFAULT_REGION", "AWS_PROFILE", "AWS_CA_BUNDLE"),
    *("AWS_ROLE_ARN", "AWS_WEB_IDENTITY_TOKEN_FILE", "AWS_SHARED_CREDENTIALS_FILE"),
)


def misspelt_variable(name: str, spot: str) -> Findings:
    """Find misspelt AWS variables."""
    if name.startswith("AWS") and name not in _AWS:
        hint = did_you_mean(name, _AWS, alike=0.85)
        if hint:
            yield warning(spot, f"{name} is not a variable that S3 clients read{hint}")


# Volumes.


def _mount_rules(
    container: Object, volumes: dict[str, Object], provided: set[str], spot: str
) -> Findings:
    limit = resources.limits_of(container).get("memory")
    for index, mount in enumerate(container.get("volumeMounts") or []):
        name = mount["name"]
        if name not in volumes and name not in provided:
            hint = did_you_mean(name, volumes) or ": add it to volumes"
            yield error(
                f"{spot}.volumeMounts[{index}].name", f"the pod has no volume {name!r}{hint}"
            )
            continue
        directory = (volumes.get(name) or {}).get("emptyDir") or {}
        size = parse_quantity(directory.get("sizeLimit", ""))
        is_shm = mount.get("mountPath") == "/dev/shm" and "emptyDir" in (volumes.get(name) or {})
        if is_shm and directory.get("medium") != "Memory":
            yield warning(
                f"{spot}.volumeMounts[{index}]",
                f"/dev/shm is on the node's disk: add medium: Memory to the emptyDir {name}",
            )
        if directory.get("medium") == "Memory" and size and limit and size > limit:
            yield warning(
                f"{spot}.volumeMounts[{index}]",
                f"{name} in memory has {resources.plain(size)} bytes, more than the container's "
                f"{resources.plain(limit)}: it counts as memory, so decrease its sizeLimit",
            )


# Security.


def _security_rules(container: Object, pod: Object, spot: str) -> Findings:
    own = container.get("securityContext") or {}
    both = {**(pod.get("securityContext") or {}), **own}
    if both.get("runAsNonRoot") and both.get("runAsUser") == 0:
        place = spot if "runAsUser" in own else re.sub(r"\.\w+\[\d+\]$", "", spot)
        yield error(
            f"{place}.securityContext.runAsUser",
            "is 0 with runAsNonRoot, so the kubelet does not start it: use another user",
        )
    if own.get("allowPrivilegeEscalation") is False:
        added = (own.get("capabilities") or {}).get("add") or []
        if own.get("privileged"):
            yield error(
                f"{spot}.securityContext.privileged", "contradicts allowPrivilegeEscalation: false"
            )
        if {"SYS_ADMIN", "CAP_SYS_ADMIN"} & set(added):
            yield error(
                f"{spot}.securityContext.capabilities.add",
                "SYS_ADMIN contradicts allowPrivilegeEscalation: false",
            )
    for profile in ("seccompProfile", "appArmorProfile"):
        given = both.get(profile) or {}
        is_local = given.get("type") == "Localhost"
        if given and is_local != bool(given.get("localhostProfile")):
            yield error(
                f"{spot}.securityContext.{profile}",
                "localhostProfile is required for type Localhost, and only for it",
            )


# Nodes.


def _toleration_rules(pod: Object, place: str) -> Findings:
    for index, toleration in enumerate(pod.get("tolerations") or []):
        spot = f"{place}.tolerations[{index}]"
        operator = toleration.get("operator") or "Equal"
        if operator == "Exists" and toleration.get("value"):
            yield error(f"{spot}.value", "is not allowed with the operator Exists: remove one")
        if operator != "Exists" and not toleration.get("key"):
            yield error(f"{spot}.operator", "must be Exists without a key")
        if (
            toleration.get("tolerationSeconds") is not None
            and toleration.get("effect") != "NoExecute"
        ):
            yield error(f"{spot}.effect", "must be NoExecute with tolerationSeconds")


def _port_rules(container: Object, spot: str) -> Findings:
    taken = [
        (port.get("containerPort"), port.get("protocol") or "TCP")
        for port in container.get("ports") or []
    ]
    for index, key in enumerate(taken):
        if taken.index(key) != index:
            yield warning(
                f"{spot}.ports[{index}].containerPort", f"{key[0]} appears twice: remove one"
            )


def _host_rules(pod: Object, place: str) -> Findings:
    taken: set[tuple[Any, ...]] = set()
    for spot, container in containers(pod):
        for index, port in enumerate(container.get("ports") or []):
            number = port.get("hostPort")
            if not number:
                continue
            where = f"{place}.{spot}.ports[{index}].hostPort"
            key = (number, port.get("protocol") or "TCP", port.get("hostIP") or "")
            if key in taken and spot.startswith("containers"):
                yield error(where, f"{number} is already used by another port of the pod")
            taken.add(key)
            if pod.get("hostNetwork") and number != port.get("containerPort"):
                yield error(where, f"is {number}; with hostNetwork it must equal containerPort")


_EXPRESSIONS = ("matchExpressions", "matchFields")


def _expression_rules(tree: Any, path: str) -> Findings:
    """Check whether the operators of selector expressions take values."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree)
    for key, value in items:
        place = schema.within(path, key)
        if key in _EXPRESSIONS and isinstance(value, list):
            for index, expression in enumerate(value):
                yield from _expression(expression, f"{place}[{index}]")
        elif isinstance(value, dict | list):
            yield from _expression_rules(value, place)


def _expression(expression: Any, place: str) -> Findings:
    if not isinstance(expression, dict):
        return
    operator, values = expression.get("operator"), expression.get("values") or []
    if operator in ("In", "NotIn") and not values:
        yield error(f"{place}.values", f"is empty: the operator {operator} needs values")
    elif operator in ("Exists", "DoesNotExist") and values:
        yield error(f"{place}.values", f"is not allowed with the operator {operator}: remove it")
    elif operator in ("Gt", "Lt") and not (len(values) == 1 and _is_integer(values[0])):
        yield error(f"{place}.values", f"must be a single integer for the operator {operator}")


def _is_integer(text: Any) -> bool:
    return re.fullmatch("-?[0-9]+", str(text)) is not None


# Probes and hooks.


def _probe_rules(container: Object, spot: str) -> Findings:
    names = {port.get("name") for port in container.get("ports") or []}
    is_init = ".initContainers[" in spot and container.get("restartPolicy") != "Always"
    for kind in ("livenessProbe", "readinessProbe", "startupProbe"):
        probe = container.get(kind)
        if not probe:
            continue
        if is_init:
            yield error(f"{spot}.{kind}", "is not supported by init containers: remove it")
        if kind != "readinessProbe" and probe.get("successThreshold", 1) not in (0, 1, None):
            yield error(f"{spot}.{kind}.successThreshold", "must be 1 for this probe")
        for action in ("httpGet", "tcpSocket"):
            port = (probe.get(action) or {}).get("port")
            if isinstance(port, str) and not port.isdigit() and port not in names:
                hint = did_you_mean(port, filter(None, names))
                yield error(
                    f"{spot}.{kind}.{action}.port", f"the container has no port {port!r}{hint}"
                )
    if is_init and container.get("lifecycle"):
        yield error(f"{spot}.lifecycle", "is not supported by init containers: remove it")


_SECONDS = re.compile(r"(?:\bsleep|--seconds|--deadline-remaining-seconds)[ =](\d+)")


def _grace_rules(container: Object, pod: Object, place: str) -> Iterator[Finding]:
    """Check that the grace period is long enough for the preStop hook to save a checkpoint."""
    stop = (container.get("lifecycle") or {}).get("preStop") or {}
    words = " ".join(word or "" for word in (stop.get("exec") or {}).get("command") or [])
    slept = (stop.get("sleep") or {}).get("seconds") or 0
    needed = max((int(seconds) for seconds in _SECONDS.findall(words)), default=slept)
    grace = pod.get("terminationGracePeriodSeconds")
    grace = 30 if grace is None else grace
    if needed >= grace:
        yield error(
            f"{place}.lifecycle.preStop",
            f"takes {needed} s, but the pod's grace period is {grace} s: increase "
            "terminationGracePeriodSeconds",
        )
