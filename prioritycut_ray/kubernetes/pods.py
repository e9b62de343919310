"""The pods of the manifests: containers, environment, hooks and placement."""

from collections.abc import Mapping
from typing import Any

from prioritycut_ray.kubernetes.options import (
    ManifestOptions,
    PodOptions,
    SecretKey,
    VolumeOptions,
)

Object = dict[str, Any]

PORTS = {"gcs": 6379, "dashboard": 8265, "client": 10001}
_RESERVE_S = 15
"""Part of the grace period in which Ray ends after the checkpoint is saved."""
_LOST_NODE_S = 60
"""Seconds after which the pods of an unreachable node are replaced."""


# Ray pods.


def save_seconds(options: ManifestOptions) -> int:
    """Return the part of the grace period in which a checkpoint is saved."""
    return options.grace_seconds - _RESERVE_S


def head_pod(options: ManifestOptions, *, autoscales: bool) -> Object:
    """Return the head of a cluster."""
    save_s = save_seconds(options)
    container = _ray_container(
        options,
        "ray-head",
        options.head,
        # How long Ray waits for a stopped job to save before it is killed; the default is 3 s.
        variables={"RAY_JOB_STOP_WAIT_TIME_S": str(save_s)},
        pre_stop=["interrupt", "--address", "http://127.0.0.1:8265", "--seconds", str(save_s)],
    )
    container["ports"] = [{"name": name, "containerPort": port} for name, port in PORTS.items()]
    pod = _ray_pod(options, "head", options.head, container, tolerations=[])
    # For the autoscaler, to which the operator binds a role.
    pod["spec"]["automountServiceAccountToken"] = autoscales
    return pod


def worker_pod(options: ManifestOptions) -> Object:
    """Return a worker of a cluster."""
    container = _ray_container(
        options,
        "ray-worker",
        options.worker,
        variables={},
        pre_stop=["drain", "--seconds", str(save_seconds(options))],
    )
    tolerations = _machine_tolerations(options)
    pod = _ray_pod(options, "worker", options.worker, container, tolerations=tolerations)
    pod["spec"] |= {
        "automountServiceAccountToken": False,
        "topologySpreadConstraints": [
            {
                "maxSkew": 1,
                "topologyKey": "kubernetes.io/hostname",
                "whenUnsatisfiable": "ScheduleAnyway",
                "labelSelector": {"matchLabels": labels_of(options, "worker")},
            }
        ],
    }
    zone = _zone_affinity(options)
    if zone:
        pod["spec"].setdefault("affinity", {})["podAffinity"] = zone
    return pod


def _zone_affinity(options: ManifestOptions) -> Object:
    """Place the workers of a cluster in the same zone."""
    term = {
        "labelSelector": {"matchLabels": labels_of(options, "worker")},
        "matchLabelKeys": ["ray.io/cluster"],
        "topologyKey": "topology.kubernetes.io/zone",
    }
    match options.worker.same_zone:
        case "preferred":
            weighted = {"weight": 100, "podAffinityTerm": term}
            return {"preferredDuringSchedulingIgnoredDuringExecution": [weighted]}
        case "required":
            return {"requiredDuringSchedulingIgnoredDuringExecution": [term]}
    return {}


def _machine_tolerations(options: ManifestOptions) -> list[Object]:
    """Tolerate the taints of GPU nodes and spot instances."""
    tolerations = []
    if options.worker.gpus:
        tolerations.append({"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"})
    if options.spot:
        spot_taints = {
            "cloud.google.com/gke-spot": "true",
            "karpenter.sh/capacity-type": "spot",
            "kubernetes.azure.com/scalesetpriority": "spot",
        }
        tolerations += [
            {"key": key, "operator": "Equal", "value": value, "effect": "NoSchedule"}
            for key, value in spot_taints.items()
        ]
    return tolerations


def _ray_pod(
    options: ManifestOptions,
    role: str,
    size: PodOptions,
    container: Object,
    *,
    tolerations: list[Object],
) -> Object:
    """Return a pod of a cluster, which must not be evicted."""
    shm = {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": f"{size.shm_gib}Gi"}}
    pod = plain_pod(
        options,
        role,
        container,
        volumes=[shm, *volumes_of(options)],
        grace_s=options.grace_seconds,
        service_account=f"{options.name}-{role}",
    )
    pod["metadata"] = {
        "labels": {**options.labels, **size.labels, **labels_of(options, role)},
        "annotations": {**STAYS, **options.annotations, **size.annotations},
    }
    pod["spec"] |= _placement(size, tolerations)
    return pod


def _placement(size: PodOptions, tolerations: list[Object]) -> Object:
    """Return where a pod may run, and how long it stays on an unreachable node."""
    # The default of Kubernetes is 300 seconds.
    lost = [
        {
            "key": f"node.kubernetes.io/{state}",
            "operator": "Exists",
            "effect": "NoExecute",
            "tolerationSeconds": _LOST_NODE_S,
        }
        for state in ("not-ready", "unreachable")
    ]
    chosen = [
        {"key": key, **({"operator": "Equal", "value": value} if value else {"operator": "Exists"})}
        for key, value in size.tolerations.items()
    ]
    placement: Object = {"tolerations": [*lost, *tolerations, *chosen]}
    labels = size.node_selector
    one = {key: values[0] for key, values in labels.items() if len(values) == 1}
    several = [
        {"key": key, "operator": "In", "values": list(values)}
        for key, values in labels.items()
        if len(values) > 1
    ]
    if one:
        placement["nodeSelector"] = one
    if several:
        required = {"nodeSelectorTerms": [{"matchExpressions": several}]}
        placement["affinity"] = {
            "nodeAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": required}
        }
    if size.priority_class:
        placement["priorityClassName"] = size.priority_class
    if size.runtime_class:
        placement["runtimeClassName"] = size.runtime_class
    return placement


STAYS = {
    "cluster-autoscaler.kubernetes.io/safe-to-evict": "false",
    "karpenter.sh/do-not-disrupt": "true",
}
"""Annotations that keep node autoscalers from evicting a pod."""


def _ray_container(
    options: ManifestOptions,
    name: str,
    size: PodOptions,
    *,
    variables: Mapping[str, str],
    pre_stop: list[str],
) -> Object:
    amounts = {"cpu": str(size.cpus), "memory": f"{size.memory_gib}Gi"}
    if size.gpus:
        amounts["nvidia.com/gpu"] = str(size.gpus)
    return {
        "name": name,
        "image": options.image,
        "resources": same(amounts),
        "env": environment(options, {**variables, **size.env}, gpus=size.gpus),
        "envFrom": [storage_credentials(options)],
        "volumeMounts": [{"name": "shm", "mountPath": "/dev/shm"}, *mounts_of(options)],
        "securityContext": CONTAINER_SECURITY,
        # The hook asks the run to save, and delays the end of the pod until it has.
        "lifecycle": {"preStop": {"exec": {"command": ["prioritycut", "jobs", *pre_stop]}}},
    }


def environment(
    options: ManifestOptions, more: Mapping[str, str | SecretKey], *, gpus: int = 0
) -> list[Object]:
    """Return the environment of a container that runs the image."""
    own = {} if gpus else {"NVIDIA_VISIBLE_DEVICES": "void"}  # the image sets "all"
    if options.storage_endpoint:
        own["AWS_ENDPOINT_URL"] = options.storage_endpoint
    return variables_of({**own, **options.env, **more})


def variables_of(values: Mapping[str, str | SecretKey]) -> list[Object]:
    """Return environment variables in Kubernetes' format."""
    return [
        {"name": name, "value": value}
        if isinstance(value, str)
        else {
            "name": name,
            "valueFrom": {"secretKeyRef": {"name": value.secret, "key": value.key}},
        }
        for name, value in values.items()
    ]


def storage_credentials(options: ManifestOptions) -> Object:
    """Return the storage credentials as an environment source."""
    # Optional: pods with a cloud identity need no keys.
    return {"secretRef": {"name": f"{options.name}-storage", "optional": True}}


def volumes_of(options: ManifestOptions) -> list[Object]:
    """Return the configured volumes of a pod."""
    return [{"name": name, **_source(volume)} for name, volume in options.volumes.items()]


def _source(volume: VolumeOptions) -> Object:
    if volume.claim:
        return {"persistentVolumeClaim": {"claimName": volume.claim}}
    if volume.config_map:
        return {"configMap": {"name": volume.config_map}}
    if volume.secret:
        return {"secret": {"secretName": volume.secret}}
    return {"emptyDir": {"sizeLimit": f"{volume.size_gib}Gi"}}


def mounts_of(options: ManifestOptions) -> list[Object]:
    """Return the configured volume mounts of a container."""
    return [
        {"name": name, "mountPath": volume.path} | ({"readOnly": True} if volume.read_only else {})
        for name, volume in options.volumes.items()
    ]


def submitter_pod(options: ManifestOptions) -> Object:
    """Return the pod that submits a job and follows its log."""
    container = {
        "name": "ray-job-submitter",
        "image": options.image,
        "resources": same({"cpu": "500m", "memory": "1Gi"}),
        "env": environment(options, {}),
        "securityContext": CONTAINER_SECURITY,
    }
    account = f"{options.name}-worker"
    pod = plain_pod(
        options, "submitter", container, volumes=[], grace_s=30, service_account=account
    )
    pod["spec"]["automountServiceAccountToken"] = False
    return pod


# All pods.

CONTAINER_SECURITY: Object = {
    "allowPrivilegeEscalation": False,
    "capabilities": {"drop": ["ALL"]},
}


def plain_pod(
    options: ManifestOptions,
    role: str,
    container: Object,
    *,
    volumes: list[Object],
    grace_s: int,
    service_account: str,
) -> Object:
    """Return a pod of any role."""
    metadata: Object = {"labels": {**options.labels, **labels_of(options, role)}}
    if options.annotations:
        metadata["annotations"] = dict(options.annotations)
    spec: Object = {
        "restartPolicy": "Never",
        "serviceAccountName": service_account,
        "terminationGracePeriodSeconds": grace_s,
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": 1000,
            "runAsGroup": 1000,
            "fsGroup": 1000,
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "containers": [{key: value for key, value in container.items() if value}],
    }
    if options.image_pull_secrets:
        spec["imagePullSecrets"] = [{"name": name} for name in options.image_pull_secrets]
    if volumes:
        spec["volumes"] = volumes
    return {"metadata": metadata, "spec": spec}


def same(amounts: Mapping[str, str]) -> Object:
    """Return requests equal to limits, for the QoS class Guaranteed."""
    return {"requests": dict(amounts), "limits": dict(amounts)}


def metadata_of(
    options: ManifestOptions, suffix: str, labels: Mapping[str, str] | None = None
) -> Object:
    """Return the metadata of an object; the suffix is appended to its name."""
    return {
        "name": f"{options.name}{suffix}",
        "namespace": options.namespace,
        "labels": {"app.kubernetes.io/part-of": options.name, **(labels or {})},
    }


def labels_of(options: ManifestOptions, role: str) -> dict[str, str]:
    """Return the labels that select the pods of a role."""
    return {"app.kubernetes.io/part-of": options.name, "app.kubernetes.io/component": role}
