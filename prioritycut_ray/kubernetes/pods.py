"""The pods of the manifests: containers, their environment and hooks, and where they may run."""

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
"""Of a pod's grace: what is left for Ray to end after the checkpoint."""
_LOST_NODE_S = 60
"""After which the pods of a node that does not answer are replaced."""


# Ray's own.


def save_seconds(options: ManifestOptions) -> int:
    """Of a pod's grace: what a hook may take, and what Ray lets a job that it stops."""
    return options.grace_seconds - _RESERVE_S


def head_pod(options: ManifestOptions, *, grows: bool) -> Object:
    """The head of a cluster."""
    save_s = save_seconds(options)
    container = _ray_container(
        options,
        "ray-head",
        options.head,
        # How long a stopped job may save before it is killed; Ray's own value is 3 seconds.
        variables={"RAY_JOB_STOP_WAIT_TIME_S": str(save_s)},
        pre_stop=["interrupt", "--address", "http://127.0.0.1:8265", "--seconds", str(save_s)],
    )
    container["ports"] = [{"name": name, "containerPort": port} for name, port in PORTS.items()]
    pod = _ray_pod(options, "head", options.head, container, tolerations=[])
    # For its autoscaler, whose rights the operator gives it.
    pod["spec"]["automountServiceAccountToken"] = grows
    return pod


def worker_pod(options: ManifestOptions) -> Object:
    """A worker of a cluster."""
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
    """Workers of one cluster go where the first of them is."""
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
    """Of machines with GPUs, and of those that the cloud can take back."""
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
    """A pod of a cluster: one that a node's loss or an eviction costs something."""
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
    """On which nodes a pod may run, and how long after they are lost."""
    # Kubernetes' own value is 300 seconds.
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
"""Annotations of pods that autoscalers of nodes must not move."""


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
        # The run hears that it ends, and saves while this hook holds the pod.
        "lifecycle": {"preStop": {"exec": {"command": ["prioritycut", "jobs", *pre_stop]}}},
    }


def environment(
    options: ManifestOptions, more: Mapping[str, str | SecretKey], *, gpus: int = 0
) -> list[Object]:
    """The variables of a container of the image: those of all, and more."""
    own = {} if gpus else {"NVIDIA_VISIBLE_DEVICES": "void"}  # the image's is "all"
    if options.storage_endpoint:
        own["AWS_ENDPOINT_URL"] = options.storage_endpoint
    return variables_of({**own, **options.env, **more})


def variables_of(values: Mapping[str, str | SecretKey]) -> list[Object]:
    """Variables as Kubernetes writes them."""
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
    """The storage's keys as variables."""
    # Optional: where the cloud gives pods an identity of their own, no key is needed.
    return {"secretRef": {"name": f"{options.name}-storage", "optional": True}}


def volumes_of(options: ManifestOptions) -> list[Object]:
    """The volumes that are chosen, for a pod."""
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
    """Where a container finds them."""
    return [
        {"name": name, "mountPath": volume.path} | ({"readOnly": True} if volume.read_only else {})
        for name, volume in options.volumes.items()
    ]


def submitter_pod(options: ManifestOptions) -> Object:
    """The pod that submits a job and follows its log."""
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


# What all pods have.

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
    """A pod of any role."""
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
    """Requests that equal limits: the class of pods that is evicted last."""
    return {"requests": dict(amounts), "limits": dict(amounts)}


def metadata_of(
    options: ManifestOptions, suffix: str, labels: Mapping[str, str] | None = None
) -> Object:
    """Of an object; its name ends in the suffix."""
    return {
        "name": f"{options.name}{suffix}",
        "namespace": options.namespace,
        "labels": {"app.kubernetes.io/part-of": options.name, **(labels or {})},
    }


def labels_of(options: ManifestOptions, role: str) -> dict[str, str]:
    """By which the pods of a role are found."""
    return {"app.kubernetes.io/part-of": options.name, "app.kubernetes.io/component": role}
