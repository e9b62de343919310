"""Optional parts of a RayCluster: fault tolerance, network policy, TLS, history server."""

import re
from collections.abc import Iterable

from prioritycut_ray.kubernetes import schema
from prioritycut_ray.kubernetes.check import parts, pods, resources, workloads
from prioritycut_ray.kubernetes.check.findings import Findings, Object, error, warning
from prioritycut_ray.kubernetes.syntax import did_you_mean, is_dns_label

_FAULT_TOLERANCE = "ray.io/ft-enabled"
_STORAGE_NAMESPACE = "ray.io/external-storage-namespace"


def check(spec: Object, path: str, annotations: Object) -> Findings:
    """Check the optional parts of a RayClusterSpec."""
    yield from _fault_tolerance_rules(spec, path, annotations)
    yield from _network_policy_rules(spec, path)
    yield from _tls_rules(spec, path)
    yield from _history_rules(spec, path)


def _fault_tolerance_rules(spec: Object, path: str, annotations: Object) -> Findings:
    options, head = spec.get("gcsFaultToleranceOptions"), spec["headGroupSpec"]
    parameters = head.get("rayStartParams") or {}
    container, place = parts.ray_container(head), f"{path}.gcsFaultToleranceOptions"
    given = parts.variables_of(container)
    if parameters.get("redis-username") or (options is None and "REDIS_USERNAME" in given):
        yield error(
            f"{path}.headGroupSpec",
            "must not set the Redis user: use gcsFaultToleranceOptions.redisUsername",
        )
    if options is None:
        is_old_style = annotations.get(_FAULT_TOLERANCE) == "true"
        if "RAY_REDIS_ADDRESS" in given and not is_old_style:
            yield error(
                f"{path}.headGroupSpec.{parts.RAY}.env",
                "RAY_REDIS_ADDRESS needs gcsFaultToleranceOptions: set its redisAddress instead",
            )
        return
    if annotations.get(_FAULT_TOLERANCE):
        yield error(
            place,
            f"cannot be combined with the annotation {_FAULT_TOLERANCE}: remove it",
        )
    if annotations.get(_STORAGE_NAMESPACE):
        yield error(
            f"metadata.annotations[{_STORAGE_NAMESPACE}]",
            "cannot be combined with gcsFaultToleranceOptions: use its externalStorageNamespace",
        )
    managed = schema.kuberay().tables["operator_environment"]["gcsFaultToleranceOptions"]
    yield from parts.managed(managed, container.get("env"), f"{path}.headGroupSpec.{parts.RAY}.env")
    if parameters.get("redis-password"):
        yield error(place, "the head must not set redis-password: use redisPassword")
    if options.get("backend") == "rocksdb":
        yield from _rocksdb_rules(options, head, place, path)
    elif options.get("storage"):
        yield error(f"{place}.storage", "is for the backend rocksdb only")
    elif not options.get("redisAddress"):
        yield warning(f"{place}.redisAddress", "is missing: Ray cannot find Redis without it")
    elif not re.search(r":(\d+|\$\w+)", options["redisAddress"]):
        address = options["redisAddress"]
        yield warning(f"{place}.redisAddress", f"{address} has no port: use {address}:6379")


_ROCKSDB_GATE = "GCSFaultToleranceEmbeddedStorage"


def _rocksdb_rules(options: Object, head: Object, place: str, path: str) -> Findings:
    yield warning(f"{place}.backend", f"rocksdb {schema.needs_gate(_ROCKSDB_GATE)}")
    for field in ("redisAddress", "redisUsername", "redisPassword", "externalStorageNamespace"):
        if options.get(field):
            yield error(f"{place}.{field}", "is for the backend redis only: remove it")
    storage = options.get("storage") or {}
    for field in ("size", "storageClassName", "accessModes"):
        if storage.get("claimName") and storage.get(field):
            yield error(f"{place}.storage.{field}", "cannot be combined with claimName: remove one")
    managed = schema.kuberay().tables["operator_environment"]["rocksdb"]
    yield from parts.managed(
        managed, parts.ray_container(head).get("env"), f"{path}.headGroupSpec.{parts.RAY}.env"
    )


def _network_policy_rules(spec: Object, path: str) -> Findings:
    policy, place = spec.get("networkPolicy"), f"{path}.networkPolicy"
    if policy is None:
        return
    mode = policy.get("mode") or "DenyAll"
    known = [group["groupName"] for _, group in parts.worker_groups(spec, path)]
    own = [(f"{place}.{role}", policy.get(role) or {}) for role in ("head", "worker")]
    for index, rules in enumerate(policy.get("workerGroups") or []):
        own.append((f"{place}.workerGroups[{index}]", rules))
        if rules["groupName"] not in known:
            hint = did_you_mean(rules["groupName"], known)
            yield error(
                f"{place}.workerGroups[{index}].groupName",
                f"there is no worker group {rules['groupName']!r}{hint}",
            )
    for spot, rules in own:
        if mode == "DenyAllEgress" and rules.get("ingressRules"):
            yield error(f"{spot}.ingressRules", "mode DenyAllEgress does not restrict ingress")
        if mode == "DenyAllIngress" and rules.get("egressRules"):
            yield error(f"{spot}.egressRules", "mode DenyAllIngress does not restrict egress")
    for spot, group in parts.worker_groups(spec, path):
        if not is_dns_label(group["groupName"]):
            yield error(
                f"{spot}.groupName", "becomes part of the policy's name; use a-z, 0-9 and -"
            )
    if mode != "DenyAllIngress" and not any(
        rules.get("egressRules") and workloads.opens_dns(rules["egressRules"]) for _, rules in own
    ):
        yield warning(
            place,
            f"mode {mode} does not allow DNS, so workers cannot find the head: "
            "add egressRules for port 53",
        )


_TLS_VOLUME = "ray-tls"


def _tls_rules(spec: Object, path: str) -> Findings:
    if not (spec.get("tlsOptions") or {}).get("enabled"):
        return
    managed = schema.kuberay().tables["operator_environment"]["tlsOptions"]
    for place, group in parts.groups(spec, path):
        container = parts.ray_container(group)
        yield from parts.managed(managed, container.get("env"), f"{place}.{parts.RAY}.env")
        yield from _tls_mounts(container.get("volumeMounts"), f"{place}.{parts.RAY}.volumeMounts")
    options = spec.get("autoscalerOptions") or {}
    yield from parts.managed(managed, options.get("env"), f"{path}.autoscalerOptions.env")
    yield from _tls_mounts(options.get("volumeMounts"), f"{path}.autoscalerOptions.volumeMounts")


def _tls_mounts(mounts: Iterable[Object] | None, place: str) -> Findings:
    if any(mount["name"] == _TLS_VOLUME for mount in mounts or []):
        yield error(
            place, f"the mount {_TLS_VOLUME} is added by the operator with tlsOptions: remove it"
        )


def _history_rules(spec: Object, path: str) -> Findings:
    if spec.get("historyServerOptions") is None:
        return
    place = f"{path}.historyServerOptions.collectorOptions"
    options = spec["historyServerOptions"].get("collectorOptions")
    if options is None:
        yield error(place, "is missing")
        return
    if not options.get("image"):
        yield error(f"{place}.image", "is missing")
    yield from resources.check(options.get("resources") or {}, f"{place}.resources")
    yield from pods.environment_rules(options.get("env") or [], f"{place}.env")
    tables = schema.kuberay().tables
    managed = tables["operator_environment"]["collectorOptions"]
    yield from parts.managed(managed, options.get("env"), f"{place}.env")
    given = {
        item["name"]: item.get("value") or item.get("valueFrom")
        for item in options.get("env") or []
    }
    backend = given.get("STORAGE_BACKEND")
    backend = backend.upper() if isinstance(backend, str) else None
    backends = tables["collector_environment"]
    if not backend:
        known = ", ".join(backends)
        yield error(f"{place}.env", f"STORAGE_BACKEND is missing; set its value to one of {known}")
    elif backend not in backends:
        yield warning(f"{place}.env", f"STORAGE_BACKEND is not one of {', '.join(backends)}")
    for names in backends.get(backend, ()):
        if not any(given.get(name) for name in names.split("|")):
            wanted = names.replace("|", " or ")
            yield error(f"{place}.env", f"{wanted} is missing: STORAGE_BACKEND {backend} needs it")
