"""RayClusters, alone or in a job or a service: ``ValidateRayClusterSpec`` and what breaks later."""

import re
from collections.abc import Iterable, Iterator

from packaging.version import InvalidVersion, Version

from prioritycut_ray.kubernetes import schema
from prioritycut_ray.kubernetes.check import pods, start_params, workloads
from prioritycut_ray.kubernetes.check.findings import Findings, Object, error, warning
from prioritycut_ray.kubernetes.options import image_ray_version
from prioritycut_ray.kubernetes.syntax import is_dns_label, parse_quantity

_AUTOSCALER_V2_DEFAULT = Version("2.47.0")
_FAULT_TOLERANCE = "ray.io/ft-enabled"
_STORAGE_NAMESPACE = "ray.io/external-storage-namespace"
_V2_VARIABLE = "RAY_enable_autoscaler_v2"
_TRUE = ("1", "true")
RAY = "template.spec.containers[0]"
"""Path of the container that runs Ray, within a group."""


def check(spec: Object, path: str, metadata: Object | None, owner: str = "RayCluster") -> Findings:
    """Everything about the spec of a cluster.

    Args:
        spec: a RayClusterSpec.
        path: where it stands.
        metadata: of the object that holds it.
        owner: the kind of that object.
    """
    metadata = metadata or {}
    annotations = metadata.get("annotations") or {}
    for place, group in groups(spec, path):
        yield from _group_rules(group, place)
    yield from _worker_rules(spec, path)
    yield from _autoscaler_rules(spec, path, metadata)
    yield from _version_rules(spec, path)
    yield from _fault_tolerance_rules(spec, path, annotations)
    yield from _network_policy_rules(spec, path)
    yield from _tls_rules(spec, path)
    yield from _history_rules(spec, path)
    yield from start_params.dashboard_rules(spec, path, owner)
    if owner != "RayCluster" and (spec.get("upgradeStrategy") or {}).get("type"):
        yield error(f"{path}.upgradeStrategy", f"is not for the cluster of a {owner}: remove it")


def groups(spec: Object, path: str) -> Iterator[tuple[str, Object]]:
    """The head group and the worker groups: (path, group)."""
    yield f"{path}.headGroupSpec", spec["headGroupSpec"]
    yield from worker_groups(spec, path)


def worker_groups(spec: Object, path: str) -> Iterator[tuple[str, Object]]:
    """The worker groups: (path, group)."""
    for index, group in enumerate(spec.get("workerGroupSpecs") or []):
        yield f"{path}.workerGroupSpecs[{index}]", group


def ray_container(group: Object) -> Object:
    """The container of a group's pods that runs Ray: the first."""
    found = ((group["template"] or {}).get("spec") or {}).get("containers") or [{}]
    return found[0] or {}


def head_variables(spec: Object) -> dict[str, str | None]:
    """Environment of the head: name → value."""
    return variables_of(ray_container(spec["headGroupSpec"]))


def variables_of(container: Object) -> dict[str, str | None]:
    """Environment of a container: name → value, None where it comes from elsewhere."""
    return {item["name"]: item.get("value") for item in container.get("env") or []}


def autoscales(spec: Object) -> bool:
    """Whether the cluster grows and shrinks by itself."""
    return bool(spec.get("enableInTreeAutoscaling"))


def autoscales_by_v2(spec: Object) -> bool:
    """Whether the operator knows that it does so by the autoscaler v2."""
    if not autoscales(spec):
        return False
    version = (spec.get("autoscalerOptions") or {}).get("version")
    return version == "v2" or head_variables(spec).get(_V2_VARIABLE) in _TRUE


# Groups.


def _group_rules(group: Object, place: str) -> Findings:
    template = group["template"] or {}
    if not (template.get("spec") or {}).get("containers"):
        yield error(f"{place}.template.spec.containers", "is empty: a pod needs a container")
    parameters = group.get("rayStartParams") or {}
    if group.get("resources") and {"num-cpus", "num-gpus", "memory", "resources"} & set(parameters):
        yield error(f"{place}.resources", "and the resources of rayStartParams exclude each other")
    for name, text in (group.get("resources") or {}).items():
        if parse_quantity(text) is None:
            yield warning(
                f"{place}.resources.{name}", f"{text!r} is not a quantity: the operator skips it"
            )
    if "labels" in parameters:
        yield error(f"{place}.rayStartParams.labels", "is not supported: use the group's labels")
    yield from start_params.check(parameters, ray_container(group), template, place)
    yield from _container_rules(template, place)


def _container_rules(template: Object, place: str) -> Findings:
    """The operator starts Ray in the first container, which writes below /tmp."""
    containers = (template.get("spec") or {}).get("containers") or []
    for index, container in enumerate(containers[1:], start=1):
        if container.get("name") in ("ray-head", "ray-worker"):
            yield warning(
                f"{place}.template.spec.containers[{index}]",
                "is not the first container, and the operator starts Ray there: move it up",
            )
    own = containers[0] if containers else {}
    mounts = [mount.get("mountPath") for mount in own.get("volumeMounts") or []]
    is_read_only = (own.get("securityContext") or {}).get("readOnlyRootFilesystem")
    if is_read_only and not {"/tmp", "/tmp/ray"} & set(mounts):
        yield warning(
            f"{place}.{RAY}.securityContext.readOnlyRootFilesystem",
            "is true, and Ray writes to /tmp/ray: mount an emptyDir at /tmp",
        )


def _worker_rules(spec: Object, path: str) -> Findings:
    names = [group["groupName"] for _, group in worker_groups(spec, path)]
    for index, (place, group) in enumerate(worker_groups(spec, path)):
        name = group["groupName"]
        if names.index(name) != index:
            yield error(f"{place}.groupName", f"{name!r} is there twice: rename one")
        if not is_dns_label(name.lower()):
            yield error(f"{place}.groupName", f"{name!r} becomes part of pod names: a-z, 0-9 and -")
        yield from _size_rules(group, place)
        yield from _worker_autoscaling_rules(group, spec, place)


def _size_rules(group: Object, place: str) -> Findings:
    least, most = group.get("minReplicas") or 0, group.get("maxReplicas")
    most = 2**31 - 1 if most is None else most
    replicas = group.get("replicas")
    if least > most:
        yield error(f"{place}.minReplicas", f"is {least}, more than maxReplicas: {most}")
    elif replicas is not None and not least <= replicas <= most:
        yield warning(
            f"{place}.replicas", f"is {replicas}, not within {least}..{most}: the operator moves it"
        )


def _worker_autoscaling_rules(group: Object, spec: Object, place: str) -> Findings:
    if autoscales(spec) and group.get("suspend"):
        yield error(f"{place}.suspend", "a cluster that autoscales cannot suspend a group")
    elif group.get("suspend"):
        yield warning(f"{place}.suspend", "a suspended group has no pods: remove it")
    for field in ("idleTimeoutSeconds", "priority"):
        if not group.get(field) or autoscales_by_v2(spec):
            continue
        way_out = "set autoscalerOptions.version: v2"
        if not autoscales(spec):
            way_out = f"set enableInTreeAutoscaling: true and {way_out.removeprefix('set ')}"
        yield error(f"{place}.{field}", f"needs the autoscaler v2: {way_out}, or remove it")
    if group.get("priority"):
        yield from _needs_ray(spec, "priority", f"{place}.priority", place)


def _autoscaler_rules(spec: Object, path: str, metadata: Object) -> Findings:
    options, place = spec.get("autoscalerOptions") or {}, f"{path}.autoscalerOptions"
    given = head_variables(spec)
    yield from pods.resource_rules(options.get("resources") or {}, f"{place}.resources")
    yield from pods.environment_rules(options.get("env") or [], f"{place}.env")
    yield from _managed("KUBERAY_GEN_AUTOSCALER_START_CMD", options.get("env"), f"{place}.env")
    if not autoscales(spec):
        if given.get(_V2_VARIABLE) in _TRUE:
            yield error(
                f"{path}.headGroupSpec.{RAY}.env",
                f"{_V2_VARIABLE} needs enableInTreeAutoscaling: true; set it or drop the variable",
            )
        elif options:
            yield warning(place, "has no effect without enableInTreeAutoscaling: true")
        return
    if options.get("version") and _V2_VARIABLE in given:
        yield error(f"{place}.version", f"and {_V2_VARIABLE} of the head exclude each other")
    yield from _restart_rules(spec, path)
    head = (spec["headGroupSpec"].get("template") or {}).get("spec") or {}
    if head.get("automountServiceAccountToken") is False:
        yield error(
            f"{path}.headGroupSpec.template.spec.automountServiceAccountToken",
            "is false: the autoscaler beside the head needs the token; remove it",
        )
    labels, annotations = (metadata.get(key) or {} for key in ("labels", "annotations"))
    is_elastic = annotations.get("kueue.x-k8s.io/elastic-job") == "true"
    if "kueue.x-k8s.io/queue-name" in labels and not is_elastic:
        yield error(f"{path}.enableInTreeAutoscaling", "Kueue admits clusters of a fixed size only")


def _restart_rules(spec: Object, path: str) -> Findings:
    """The autoscaler v2 replaces pods; one that restarts by itself confuses it."""
    version = (spec.get("autoscalerOptions") or {}).get("version")
    is_v2 = autoscales_by_v2(spec)
    by_default = version is None and not is_v2 and _is_at_least(spec, _AUTOSCALER_V2_DEFAULT)
    for place, group in groups(spec, path):
        policy = ((group["template"] or {}).get("spec") or {}).get("restartPolicy") or "Never"
        if policy == "Never":
            continue
        where = f"{place}.template.spec.restartPolicy"
        if is_v2:
            yield error(where, f"is {policy}; with the autoscaler v2 it is Never")
        elif by_default:
            yield warning(
                where, f"is {policy}; Ray {spec['rayVersion']} autoscales by v2, where it is Never"
            )


# Versions.


def ray_version(spec: Object) -> Version | None:
    """rayVersion, if it is one."""
    try:
        return Version(spec.get("rayVersion") or "")
    except InvalidVersion:
        return None


def _is_at_least(spec: Object, version: Version) -> bool:
    own = ray_version(spec)
    return own is not None and own >= version


def _needs_ray(spec: Object, feature: str, place: str, path: str) -> Findings:
    needed, own = schema.facts().tables["since_ray"][feature], spec.get("rayVersion")
    if not own:
        yield error(place, f"needs rayVersion, {needed} or later: write it down")
    elif not _is_at_least(spec, Version(needed)):
        yield error(place, f"needs Ray {needed}, rayVersion is {own}")


def _version_rules(spec: Object, path: str) -> Findings:
    version, auth = spec.get("rayVersion"), spec.get("authOptions")
    if version and ray_version(spec) is None:
        yield warning(f"{path}.rayVersion", f"{version!r} is not a version, such as 2.60.0")
    yield from _image_rules(spec, path)
    by_kubernetes = bool((auth or {}).get("enableK8sTokenAuth"))
    if auth is None or (auth.get("mode") or "token") != "token":
        if by_kubernetes:
            yield error(f"{path}.authOptions", "enableK8sTokenAuth needs mode: token")
        return
    if not version:
        yield error(f"{path}.rayVersion", "is missing: authOptions.mode token needs it")
    else:
        yield from _needs_ray(spec, "tokens", f"{path}.rayVersion", path)
    if by_kubernetes and version:
        yield from _needs_ray(spec, "enableK8sTokenAuth", f"{path}.rayVersion", path)
    if by_kubernetes and auth.get("secretName"):
        yield error(f"{path}.authOptions.secretName", "and enableK8sTokenAuth exclude each other")


def _image_rules(spec: Object, path: str) -> Findings:
    """One Ray in all images: nodes of another version may not join."""
    version = spec.get("rayVersion")
    of_head = image_ray_version(ray_container(spec["headGroupSpec"]).get("image") or "")
    for place, group in groups(spec, path):
        image = ray_container(group).get("image") or ""
        own, where = image_ray_version(image), f"{place}.{RAY}.image"
        if own and of_head and own != of_head:
            yield error(where, f"{image} has Ray {own}, the head's image has {of_head}")
        elif own and version and own != version:
            yield warning(where, f"image {image} has Ray {own}, rayVersion is {version}")


# Fault tolerance, network, TLS, history.


def _fault_tolerance_rules(spec: Object, path: str, annotations: Object) -> Findings:
    options, head = spec.get("gcsFaultToleranceOptions"), spec["headGroupSpec"]
    parameters = head.get("rayStartParams") or {}
    container, place = ray_container(head), f"{path}.gcsFaultToleranceOptions"
    given = variables_of(container)
    if parameters.get("redis-username") or (options is None and "REDIS_USERNAME" in given):
        yield error(
            f"{path}.headGroupSpec",
            "must not set the user of Redis: use gcsFaultToleranceOptions.redisUsername",
        )
    if options is None:
        is_old_style = annotations.get(_FAULT_TOLERANCE) == "true"
        if "RAY_REDIS_ADDRESS" in given and not is_old_style:
            yield error(
                f"{path}.headGroupSpec.{RAY}.env",
                "RAY_REDIS_ADDRESS needs gcsFaultToleranceOptions: set its redisAddress instead",
            )
        return
    if annotations.get(_FAULT_TOLERANCE):
        yield error(place, f"and the annotation {_FAULT_TOLERANCE} exclude each other")
    if annotations.get(_STORAGE_NAMESPACE):
        yield error(
            f"metadata.annotations[{_STORAGE_NAMESPACE}]",
            "and gcsFaultToleranceOptions exclude each other: use its externalStorageNamespace",
        )
    managed = schema.facts().tables["operator_environment"]["gcsFaultToleranceOptions"]
    yield from _managed(managed, container.get("env"), f"{path}.headGroupSpec.{RAY}.env")
    if parameters.get("redis-password"):
        yield error(place, "the head must not set redis-password beside it: use redisPassword")
    if options.get("backend") == "rocksdb":
        yield from _rocksdb_rules(options, head, place, path)
    elif options.get("storage"):
        yield error(f"{place}.storage", "is for the backend rocksdb")
    elif not options.get("redisAddress"):
        yield warning(f"{place}.redisAddress", "is missing: Ray would find no Redis")
    elif not re.search(r":(\d+|\$\w+)", options["redisAddress"]):
        address = options["redisAddress"]
        yield warning(f"{place}.redisAddress", f"{address} has no port: write {address}:6379")


_ROCKSDB_GATE = "GCSFaultToleranceEmbeddedStorage"


def _rocksdb_rules(options: Object, head: Object, place: str, path: str) -> Findings:
    yield warning(
        f"{place}.backend",
        f"rocksdb needs the feature gate {_ROCKSDB_GATE}, which is off by default in KubeRay "
        f"{schema.facts().version}: turn it on in the operator",
    )
    for field in ("redisAddress", "redisUsername", "redisPassword", "externalStorageNamespace"):
        if options.get(field):
            yield error(f"{place}.{field}", "is for the backend redis: backend rocksdb has none")
    storage = options.get("storage") or {}
    for field in ("size", "storageClassName", "accessModes"):
        if storage.get("claimName") and storage.get(field):
            yield error(f"{place}.storage.{field}", "is of the claim: claimName excludes it")
    managed = schema.facts().tables["operator_environment"]["rocksdb"]
    yield from _managed(managed, ray_container(head).get("env"), f"{path}.headGroupSpec.{RAY}.env")


def _managed(names: str | list[str], variables: object, place: str) -> Findings:
    """Variables that the operator sets and nobody else may."""
    given = {item["name"] for item in variables or []} if isinstance(variables, list) else set()
    for name in [names] if isinstance(names, str) else names:
        if name in given:
            yield error(place, f"{name} is set by the operator: remove it")


def _network_policy_rules(spec: Object, path: str) -> Findings:
    policy, place = spec.get("networkPolicy"), f"{path}.networkPolicy"
    if policy is None:
        return
    mode = policy.get("mode") or "DenyAll"
    known = [group["groupName"] for _, group in worker_groups(spec, path)]
    own = [(f"{place}.{role}", policy.get(role) or {}) for role in ("head", "worker")]
    for index, rules in enumerate(policy.get("workerGroups") or []):
        own.append((f"{place}.workerGroups[{index}]", rules))
        if rules["groupName"] not in known:
            hint = schema.did_you_mean(rules["groupName"], known)
            yield error(
                f"{place}.workerGroups[{index}].groupName",
                f"there is no worker group {rules['groupName']!r}{hint}",
            )
    for spot, rules in own:
        if mode == "DenyAllEgress" and rules.get("ingressRules"):
            yield error(f"{spot}.ingressRules", "mode DenyAllEgress does not restrict ingress")
        if mode == "DenyAllIngress" and rules.get("egressRules"):
            yield error(f"{spot}.egressRules", "mode DenyAllIngress does not restrict egress")
    for spot, group in worker_groups(spec, path):
        if not is_dns_label(group["groupName"]):
            yield error(f"{spot}.groupName", "is part of the policy's name: a-z, 0-9 and -")
    if mode != "DenyAllIngress" and not any(
        rules.get("egressRules") and workloads.opens_dns(rules["egressRules"]) for _, rules in own
    ):
        yield warning(
            place,
            f"mode {mode} lets no pod out to DNS, so workers do not find the head: "
            "add egressRules for port 53",
        )


_TLS_VOLUME = "ray-tls"


def _tls_rules(spec: Object, path: str) -> Findings:
    if not (spec.get("tlsOptions") or {}).get("enabled"):
        return
    managed = schema.facts().tables["operator_environment"]["tlsOptions"]
    for place, group in groups(spec, path):
        container = ray_container(group)
        yield from _managed(managed, container.get("env"), f"{place}.{RAY}.env")
        yield from _tls_mounts(container.get("volumeMounts"), f"{place}.{RAY}.volumeMounts")
    options = spec.get("autoscalerOptions") or {}
    yield from _managed(managed, options.get("env"), f"{path}.autoscalerOptions.env")
    yield from _tls_mounts(options.get("volumeMounts"), f"{path}.autoscalerOptions.volumeMounts")


def _tls_mounts(mounts: Iterable[Object] | None, place: str) -> Findings:
    if any(mount["name"] == _TLS_VOLUME for mount in mounts or []):
        yield error(place, f"the mount {_TLS_VOLUME} is the operator's with tlsOptions: remove it")


_COLLECTOR = "collector"


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
    yield from pods.resource_rules(options.get("resources") or {}, f"{place}.resources")
    yield from pods.environment_rules(options.get("env") or [], f"{place}.env")
    tables = schema.facts().tables
    managed = tables["operator_environment"]["collectorOptions"]
    yield from _managed(managed, options.get("env"), f"{place}.env")
    given = {
        item["name"]: item.get("value") or item.get("valueFrom")
        for item in options.get("env") or []
    }
    backend = str(given.get("STORAGE_BACKEND") or "").upper()
    backends = tables["collector_environment"]
    if not backend:
        yield error(f"{place}.env", f"STORAGE_BACKEND is missing: one of {', '.join(backends)}")
    elif backend not in backends:
        yield warning(f"{place}.env", f"STORAGE_BACKEND is none of {', '.join(backends)}")
    for name in backends.get(backend, ()):
        if not given.get(name):
            yield error(f"{place}.env", f"{name} is missing: STORAGE_BACKEND {backend} needs it")
