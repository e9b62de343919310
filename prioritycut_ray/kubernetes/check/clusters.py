"""RayClusters, alone or in a job or service: ``ValidateRayClusterSpec``, and run-time failures."""

from packaging.version import Version

from prioritycut_ray.kubernetes.check import cluster_options, parts, pods, resources, start_params
from prioritycut_ray.kubernetes.check.findings import Findings, Object, error, warning
from prioritycut_ray.kubernetes.options import image_ray_version
from prioritycut_ray.kubernetes.syntax import is_dns_label, parse_quantity

_AUTOSCALER_V2_DEFAULT = Version("2.47.0")


def check(spec: Object, path: str, metadata: Object | None, owner: str = "RayCluster") -> Findings:
    """Check the spec of a cluster.

    Args:
        spec: a RayClusterSpec.
        path: path of the spec.
        metadata: metadata of the object that contains it.
        owner: kind of that object.
    """
    metadata = metadata or {}
    for place, group in parts.groups(spec, path):
        yield from _group_rules(group, place)
    yield from _worker_rules(spec, path)
    yield from _autoscaler_rules(spec, path, metadata)
    yield from _version_rules(spec, path)
    yield from cluster_options.check(spec, path, metadata.get("annotations") or {})
    yield from start_params.dashboard_rules(spec, path, owner)
    if owner != "RayCluster" and (spec.get("upgradeStrategy") or {}).get("type"):
        yield error(
            f"{path}.upgradeStrategy", f"is not supported for the cluster of a {owner}: remove it"
        )


# Groups.


def _group_rules(group: Object, place: str) -> Findings:
    template = group["template"] or {}
    if not (template.get("spec") or {}).get("containers"):
        yield error(f"{place}.template.spec.containers", "is empty: a pod needs a container")
    parameters = group.get("rayStartParams") or {}
    if group.get("resources") and {"num-cpus", "num-gpus", "memory", "resources"} & set(parameters):
        yield error(
            f"{place}.resources",
            "cannot be combined with the resources of rayStartParams: keep one",
        )
    for name, text in (group.get("resources") or {}).items():
        if parse_quantity(text) is None:
            yield warning(
                f"{place}.resources.{name}", f"{text!r} is not a quantity: the operator skips it"
            )
    if "labels" in parameters:
        yield error(f"{place}.rayStartParams.labels", "is not supported: use the group's labels")
    yield from start_params.check(parameters, parts.ray_container(group), template, place)
    yield from _container_rules(template, place)


def _container_rules(template: Object, place: str) -> Findings:
    """Check the first container: the operator starts Ray there, and Ray writes to /tmp."""
    containers = (template.get("spec") or {}).get("containers") or []
    for index, container in enumerate(containers[1:], start=1):
        if container.get("name") in ("ray-head", "ray-worker"):
            yield warning(
                f"{place}.template.spec.containers[{index}]",
                "is not the first container, where the operator starts Ray: move it up",
            )
    own = containers[0] if containers else {}
    mounts = [mount.get("mountPath") for mount in own.get("volumeMounts") or []]
    is_read_only = (own.get("securityContext") or {}).get("readOnlyRootFilesystem")
    if is_read_only and not {"/tmp", "/tmp/ray"} & set(mounts):
        yield warning(
            f"{place}.{parts.RAY}.securityContext.readOnlyRootFilesystem",
            "is true, but Ray writes to /tmp/ray: mount an emptyDir at /tmp",
        )


def _worker_rules(spec: Object, path: str) -> Findings:
    names = [group["groupName"] for _, group in parts.worker_groups(spec, path)]
    for index, (place, group) in enumerate(parts.worker_groups(spec, path)):
        name = group["groupName"]
        if names.index(name) != index:
            yield error(f"{place}.groupName", f"{name!r} appears twice: rename one")
        if not is_dns_label(name.lower()):
            yield error(
                f"{place}.groupName", f"{name!r} becomes part of pod names; use a-z, 0-9 and -"
            )
        yield from _size_rules(group, place)
        yield from _worker_autoscaling_rules(group, spec, place)


def _size_rules(group: Object, place: str) -> Findings:
    least, most = group.get("minReplicas") or 0, group.get("maxReplicas")
    most = 2**31 - 1 if most is None else most
    replicas = group.get("replicas")
    if least > most:
        yield error(f"{place}.minReplicas", f"is {least}, greater than maxReplicas: {most}")
    elif replicas is not None and not least <= replicas <= most:
        yield warning(
            f"{place}.replicas", f"is {replicas}, outside {least}..{most}: the operator changes it"
        )


def _worker_autoscaling_rules(group: Object, spec: Object, place: str) -> Findings:
    if parts.autoscales(spec) and group.get("suspend"):
        yield error(f"{place}.suspend", "is not supported by an autoscaling cluster: remove it")
    elif group.get("suspend"):
        yield warning(f"{place}.suspend", "is true, so the group has no pods: remove it")
    for field in ("idleTimeoutSeconds", "priority"):
        is_given = bool(group.get(field)) or (field != "priority" and field in group)
        if not is_given or parts.autoscales_by_v2(spec):
            continue
        way_out = "set autoscalerOptions.version: v2"
        if not parts.autoscales(spec):
            way_out = f"set enableInTreeAutoscaling: true and {way_out.removeprefix('set ')}"
        yield error(f"{place}.{field}", f"requires autoscaler v2: {way_out}, or remove it")
    if group.get("priority"):
        yield from parts.needs_ray(spec, "priority", f"{place}.priority")


def _autoscaler_rules(spec: Object, path: str, metadata: Object) -> Findings:
    options, place = spec.get("autoscalerOptions") or {}, f"{path}.autoscalerOptions"
    given = parts.head_variables(spec)
    yield from resources.check(options.get("resources") or {}, f"{place}.resources")
    yield from pods.environment_rules(options.get("env") or [], f"{place}.env")
    yield from parts.managed("KUBERAY_GEN_AUTOSCALER_START_CMD", options.get("env"), f"{place}.env")
    if not parts.autoscales(spec):
        if given.get(parts.AUTOSCALER_V2_VARIABLE) in parts.TRUE:
            yield error(
                f"{path}.headGroupSpec.{parts.RAY}.env",
                f"{parts.AUTOSCALER_V2_VARIABLE} needs enableInTreeAutoscaling: true: set it, or "
                "remove the variable",
            )
        elif options:
            yield warning(place, "has no effect without enableInTreeAutoscaling: true")
        return
    if options.get("version") and parts.AUTOSCALER_V2_VARIABLE in given:
        yield error(
            f"{place}.version",
            f"cannot be combined with {parts.AUTOSCALER_V2_VARIABLE} of the head: drop that",
        )
    yield from _restart_rules(spec, path)
    head = (spec["headGroupSpec"].get("template") or {}).get("spec") or {}
    if head.get("automountServiceAccountToken") is False:
        yield error(
            f"{path}.headGroupSpec.template.spec.automountServiceAccountToken",
            "is false, but the autoscaler in the head's pod needs the token: remove it",
        )
    labels, annotations = (metadata.get(key) or {} for key in ("labels", "annotations"))
    is_elastic = annotations.get("kueue.x-k8s.io/elastic-job") == "true"
    if "kueue.x-k8s.io/queue-name" in labels and not is_elastic:
        yield error(
            f"{path}.enableInTreeAutoscaling",
            "Kueue admits only clusters of a fixed size: set it to false",
        )


def _restart_rules(spec: Object, path: str) -> Findings:
    """Check restart policies: autoscaler v2 replaces pods, which must not restart by themselves."""
    version = (spec.get("autoscalerOptions") or {}).get("version")
    is_v2 = parts.autoscales_by_v2(spec)
    by_default = version is None and not is_v2 and parts.is_at_least(spec, _AUTOSCALER_V2_DEFAULT)
    for place, group in parts.groups(spec, path):
        policy = ((group["template"] or {}).get("spec") or {}).get("restartPolicy") or "Never"
        if policy == "Never":
            continue
        where = f"{place}.template.spec.restartPolicy"
        if is_v2:
            yield error(where, f"is {policy}; with autoscaler v2 it must be Never")
        elif by_default:
            yield warning(
                where,
                f"is {policy}; Ray {spec['rayVersion']} uses autoscaler v2, where it must be Never",
            )


# Versions.


def _version_rules(spec: Object, path: str) -> Findings:
    version, auth = spec.get("rayVersion"), spec.get("authOptions")
    if version and parts.ray_version(spec) is None:
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
        yield from parts.needs_ray(spec, "tokens", f"{path}.rayVersion")
    if by_kubernetes and version:
        yield from parts.needs_ray(spec, "enableK8sTokenAuth", f"{path}.rayVersion")
    if by_kubernetes and auth.get("secretName"):
        yield error(
            f"{path}.authOptions.secretName", "cannot be combined with enableK8sTokenAuth: keep one"
        )


def _image_rules(spec: Object, path: str) -> Findings:
    """Check that all images have the same Ray version; others cannot join the cluster."""
    version = spec.get("rayVersion")
    of_head = image_ray_version(parts.ray_container(spec["headGroupSpec"]).get("image") or "")
    for place, group in parts.groups(spec, path):
        image = parts.ray_container(group).get("image") or ""
        own, where = image_ray_version(image), f"{place}.{parts.RAY}.image"
        if own and of_head and own != of_head:
            yield error(where, f"{image} has Ray {own}, but the head's image has {of_head}")
        elif own and version and own != version:
            yield warning(where, f"image {image} has Ray {own}, but rayVersion is {version}")
