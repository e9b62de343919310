"""From options to the manifests of ``cluster/``: plain data, then YAML. Deterministic."""

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from prioritycut_ray.kubernetes.options import (
    ManifestOptions,
    PodOptions,
    SecretKey,
    VolumeOptions,
    image_ray_version,
)

Object = dict[str, Any]

KUBECTL_IMAGE = "registry.k8s.io/kubectl:v1.34.1"
"""Kubernetes' own image: kubectl and nothing else, not even a shell."""
_PORTS = {"gcs": 6379, "dashboard": 8265, "client": 10001}
_RESERVE_S = 15
"""Of a pod's grace: what is left for Ray to end after the checkpoint."""
_MARGIN_S = 5
"""A driver gives up so long before the hook that waits for it."""
_START_DEADLINE_S = 1800
"""For a cluster to come up: images are pulled, machines are bought."""
_LOST_NODE_S = 60
"""After which the pods of a node that does not answer are replaced."""
_ANSWER_S = 300
"""For the operator to take up a change."""
_CLUSTER_STAYS_S = 60
_HEAD_STAYS_S = 600
"""For a look at the dashboard of a job that has ended, where its workers are gone."""
_JOB_STAYS_S = 7 * 24 * 3600
"""With it go the logs of its submitter."""


def render(options: ManifestOptions) -> dict[str, str]:
    """All manifests: file name → YAML."""
    files = {
        "base.yaml": _base(options),
        "storage-secret.yaml": [_storage_secret(options)],
        "raycluster.yaml": [ray_cluster(options)],
        "rayjob-train.yaml": [ray_job(options, "train")],
        "rayjob-tune.yaml": [ray_job(options, "tune")],
        "cronjob-retrain.yaml": _retrain_cron(options),
    }
    if options.ray_cron_job:
        files["raycronjob-retrain.yaml"] = [_ray_cron_job(options)]
    return {name: _HEADER + to_yaml(objects) for name, objects in files.items()}


_HEADER = "# Rendered by `prioritycut k8s render`; change its options, not this file.\n"


def to_yaml(objects: list[Object]) -> str:
    """Objects as YAML documents."""
    return yaml.dump_all(objects, Dumper=_Dumper, sort_keys=False, width=100)


class _Dumper(yaml.SafeDumper):
    """Without anchors, and with long texts as blocks: for people who read manifests."""

    def ignore_aliases(self, data: Any) -> bool:
        """No anchors."""
        return True


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    style = "|" if "\n" in text else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _text)


# Jobs.


def entrypoint(options: ManifestOptions, verb: str) -> str:
    """The command line of a job: what a laptop would run."""
    storage, worker = options.storage, options.worker
    per_pod = max(worker.gpus, 1)
    use_gpu = f"train.use_gpu={'yes' if worker.gpus else 'no'}"
    places = [f"storage={storage}/runs", f"data.url={storage}/data"]
    grace = f"train.grace_seconds={_save_seconds(options) - _MARGIN_S}"
    if verb == "retrain":
        places = [f"models={storage}/models", f"data={storage}/data"]
        words = [options.retrain, *places, f"set.{grace}"]
    elif verb == "tune":
        # A trial fills a pod, but for a CPU: the trials' drivers need some.
        cpus = max((worker.cpus - 1) // per_pod, 1)
        size = [f"train.workers={per_pod}", f"train.cpus_per_worker={cpus}", use_gpu]
        words = [options.tune, *places, *size, grace, "--resume"]  # what a retried attempt must do
    else:
        workers, cpus = options.max_workers * per_pod, worker.cpus // per_pod
        size = [f"train.workers={workers}", f"train.cpus_per_worker={cpus}", use_gpu]
        name = f"name={Path(options.train.config).stem}"
        words = [options.train.config, name, *places, *size, grace, *options.train.overrides]
    return shlex.join(["prioritycut", verb, *words])


def _save_seconds(options: ManifestOptions) -> int:
    """Of a pod's grace: what a hook may take, and what Ray lets a job that it stops."""
    return options.grace_seconds - _RESERVE_S


def ray_job(options: ManifestOptions, verb: str) -> Object:
    """A RayJob: a cluster that lives as long as its job does."""
    return {
        "apiVersion": "ray.io/v1",
        "kind": "RayJob",
        "metadata": _metadata(options, f"-{verb}", _queue_labels(options)),
        "spec": _ray_job_spec(options, verb),
    }


def _ray_job_spec(options: ManifestOptions, verb: str) -> Object:
    # Most nights there is nothing to retrain: its cluster begins without workers.
    grows = verb == "retrain" and options.queue is None
    spec = {
        "entrypoint": entrypoint(options, verb),
        "submissionMode": options.submission,
        **_removal(options, grows=grows),
        # A retried attempt may overlap the pods of the one before: the run's lease fences it off.
        # Retraining is not retried here but by its CronJob, which waits for one attempt.
        "backoffLimit": 0 if verb == "retrain" else options.retries,
        "preRunningDeadlineSeconds": _START_DEADLINE_S,
        "activeDeadlineSeconds": options.max_hours * 3600,
        "rayClusterSpec": _cluster_spec(options, grows=grows),
    }
    if options.submission == "K8sJobMode":
        spec["submitterPodTemplate"] = _submitter(options)
    return spec


def _removal(options: ManifestOptions, *, grows: bool) -> Object:
    """When what a job leaves behind goes: first its GPUs, at last the RayJob and its logs."""
    if options.queue:
        # Kueue takes no job that removes its cluster in another way.
        return {"shutdownAfterJobFinishes": True, "ttlSecondsAfterFinished": _CLUSTER_STAYS_S}
    after = {"DeleteCluster": _CLUSTER_STAYS_S, "DeleteSelf": _JOB_STAYS_S}
    if not grows:  # the operator does not take workers from a cluster that grows
        after = {"DeleteWorkers": 0, "DeleteCluster": _HEAD_STAYS_S, "DeleteSelf": _JOB_STAYS_S}
    ends = [{"jobStatus": "SUCCEEDED"}, {"jobDeploymentStatus": "Failed"}]
    rules = [
        {"policy": policy, "condition": {**end, "ttlSeconds": seconds}}
        for end in ends
        for policy, seconds in after.items()
    ]
    return {"deletionStrategy": {"deletionRules": rules}}


def ray_cluster(options: ManifestOptions) -> Object:
    """A cluster that stays, and grows and shrinks with what is submitted to it."""
    return {
        "apiVersion": "ray.io/v1",
        "kind": "RayCluster",
        "metadata": _metadata(options, "", _queue_labels(options)),
        "spec": _cluster_spec(options, grows=options.queue is None),
    }


def _queue_labels(options: ManifestOptions) -> dict[str, str]:
    if options.queue:
        return {"kueue.x-k8s.io/queue-name": options.queue}
    if options.scheduler == "volcano":
        return {"volcano.sh/queue-name": "default"}
    return {}


# The cluster.


def _cluster_spec(options: ManifestOptions, *, grows: bool) -> Object:
    workers = options.min_workers if grows else options.max_workers
    spec: Object = {
        "rayVersion": image_ray_version(options.image),
        "authOptions": {"mode": "token"},
        "enableInTreeAutoscaling": grows,
        "headGroupSpec": {
            "serviceType": "ClusterIP",
            # Nothing is computed on the head: when it is busy, the cluster looks dead.
            "rayStartParams": {
                "dashboard-host": "0.0.0.0",
                "num-cpus": "0",
                **_object_store(options.head),
            },
            "template": _head_pod(options, grows=grows),
        },
        "workerGroupSpecs": [
            {
                "groupName": "gpu" if options.worker.gpus else "cpu",
                "replicas": workers,
                "minReplicas": workers,
                "maxReplicas": options.max_workers,
                "rayStartParams": _object_store(options.worker),
                "template": _worker_pod(options),
            }
        ],
    }
    if grows:
        spec["autoscalerOptions"] = {
            "version": "v2",
            "upscalingMode": "Default",
            "idleTimeoutSeconds": 300,
            "resources": _same({"cpu": "500m", "memory": "1Gi"}),
            "securityContext": _CONTAINER_SECURITY,
        }
    if options.redis:
        spec["gcsFaultToleranceOptions"] = {
            "redisAddress": options.redis,
            "redisPassword": {
                "valueFrom": {"secretKeyRef": {"name": f"{options.name}-redis", "key": "password"}}
            },
        }
    if options.history:
        collector = {"image": options.history.collector, "env": _variables(options.history.env)}
        spec["historyServerOptions"] = {"collectorOptions": collector}
    return spec


def _object_store(size: PodOptions) -> dict[str, str]:
    # In bytes. Unless told, Ray takes 95 % of /dev/shm, which the data loader needs.
    return {"object-store-memory": str(int(size.object_store_gib * 2**30))}


def _head_pod(options: ManifestOptions, *, grows: bool) -> Object:
    save_s = _save_seconds(options)
    container = _ray_container(
        options,
        "ray-head",
        options.head,
        # How long a stopped job may save before it is killed; Ray's own value is 3 seconds.
        variables={"RAY_JOB_STOP_WAIT_TIME_S": str(save_s)},
        pre_stop=["interrupt", "--address", "http://127.0.0.1:8265", "--seconds", str(save_s)],
    )
    container["ports"] = [{"name": name, "containerPort": port} for name, port in _PORTS.items()]
    pod = _ray_pod(options, "head", options.head, container, tolerations=[])
    # For its autoscaler, whose rights the operator gives it.
    pod["spec"]["automountServiceAccountToken"] = grows
    return pod


def _worker_pod(options: ManifestOptions) -> Object:
    container = _ray_container(
        options,
        "ray-worker",
        options.worker,
        variables={},
        pre_stop=["drain", "--seconds", str(_save_seconds(options))],
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
                "labelSelector": {"matchLabels": _labels(options, "worker")},
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
        "labelSelector": {"matchLabels": _labels(options, "worker")},
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
    pod = _pod(
        options,
        role,
        container,
        volumes=[shm, *_volumes(options)],
        grace_s=options.grace_seconds,
        service_account=f"{options.name}-{role}",
    )
    pod["metadata"] = {
        "labels": {**options.labels, **size.labels, **_labels(options, role)},
        "annotations": {**_STAYS, **options.annotations, **size.annotations},
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


_STAYS = {
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
        "resources": _same(amounts),
        "env": _environment(options, {**variables, **size.env}, gpus=size.gpus),
        "envFrom": [_storage_credentials(options)],
        "volumeMounts": [{"name": "shm", "mountPath": "/dev/shm"}, *_mounts(options)],
        "securityContext": _CONTAINER_SECURITY,
        # The run hears that it ends, and saves while this hook holds the pod.
        "lifecycle": {"preStop": {"exec": {"command": ["prioritycut", "jobs", *pre_stop]}}},
    }


def _environment(
    options: ManifestOptions, more: Mapping[str, str | SecretKey], *, gpus: int = 0
) -> list[Object]:
    own = {} if gpus else {"NVIDIA_VISIBLE_DEVICES": "void"}  # the image's is "all"
    if options.storage_endpoint:
        own["AWS_ENDPOINT_URL"] = options.storage_endpoint
    return _variables({**own, **options.env, **more})


def _variables(values: Mapping[str, str | SecretKey]) -> list[Object]:
    return [
        {"name": name, "value": value}
        if isinstance(value, str)
        else {
            "name": name,
            "valueFrom": {"secretKeyRef": {"name": value.secret, "key": value.key}},
        }
        for name, value in values.items()
    ]


def _storage_credentials(options: ManifestOptions) -> Object:
    # Optional: where the cloud gives pods an identity of their own, no key is needed.
    return {"secretRef": {"name": f"{options.name}-storage", "optional": True}}


def _volumes(options: ManifestOptions) -> list[Object]:
    return [{"name": name, **_source(volume)} for name, volume in options.volumes.items()]


def _source(volume: VolumeOptions) -> Object:
    if volume.claim:
        return {"persistentVolumeClaim": {"claimName": volume.claim}}
    if volume.config_map:
        return {"configMap": {"name": volume.config_map}}
    if volume.secret:
        return {"secret": {"secretName": volume.secret}}
    return {"emptyDir": {"sizeLimit": f"{volume.size_gib}Gi"}}


def _mounts(options: ManifestOptions) -> list[Object]:
    return [
        {"name": name, "mountPath": volume.path} | ({"readOnly": True} if volume.read_only else {})
        for name, volume in options.volumes.items()
    ]


def _submitter(options: ManifestOptions) -> Object:
    container = {
        "name": "ray-job-submitter",
        "image": options.image,
        "resources": _same({"cpu": "500m", "memory": "1Gi"}),
        "env": _environment(options, {}),
        "securityContext": _CONTAINER_SECURITY,
    }
    account = f"{options.name}-worker"
    pod = _pod(options, "submitter", container, volumes=[], grace_s=30, service_account=account)
    pod["spec"]["automountServiceAccountToken"] = False
    return pod


# What all pods have.

_CONTAINER_SECURITY: Object = {
    "allowPrivilegeEscalation": False,
    "capabilities": {"drop": ["ALL"]},
}


def _pod(
    options: ManifestOptions,
    role: str,
    container: Object,
    *,
    volumes: list[Object],
    grace_s: int,
    service_account: str,
) -> Object:
    metadata: Object = {"labels": {**options.labels, **_labels(options, role)}}
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


def _same(amounts: Mapping[str, str]) -> Object:
    """Requests that equal limits: the class of pods that is evicted last."""
    return {"requests": dict(amounts), "limits": dict(amounts)}


def _metadata(
    options: ManifestOptions, suffix: str, labels: Mapping[str, str] | None = None
) -> Object:
    return {
        "name": f"{options.name}{suffix}",
        "namespace": options.namespace,
        "labels": {"app.kubernetes.io/part-of": options.name, **(labels or {})},
    }


def _labels(options: ManifestOptions, role: str) -> dict[str, str]:
    return {"app.kubernetes.io/part-of": options.name, "app.kubernetes.io/component": role}


# What a namespace needs once.


def _base(options: ManifestOptions) -> list[Object]:
    group, resources = ["ray.io"], ["rayjobs"]
    one_job = [
        {"apiGroups": group, "resources": resources, "verbs": ["create"]},
        {
            "apiGroups": group,
            "resources": resources,
            "resourceNames": [f"{options.name}-retrain"],
            "verbs": ["get", "list", "watch", "delete"],
        },
    ]
    identity = options.service_account_annotations
    return [
        *_account(options, "-head", [], identity),
        *_account(options, "-worker", [], identity),
        *_account(options, "-retrain", one_job, {}),
        _disruption_budget(options),
        _network_policy(options),
        *_tensorboard(options),
    ]


def _account(
    options: ManifestOptions, suffix: str, rules: list[Object], annotations: Mapping[str, str]
) -> list[Object]:
    metadata = _metadata(options, suffix)
    account = {
        "apiVersion": "v1",
        "kind": "ServiceAccount",
        "metadata": metadata | ({"annotations": dict(annotations)} if annotations else {}),
        "automountServiceAccountToken": bool(rules),
    }
    if not rules:
        return [account]
    group, name = "rbac.authorization.k8s.io", f"{options.name}{suffix}"
    role = {
        "apiVersion": f"{group}/v1",
        "kind": "Role",
        "metadata": metadata,
        "rules": rules,
    }
    binding = {
        "apiVersion": f"{group}/v1",
        "kind": "RoleBinding",
        "metadata": metadata,
        "roleRef": {"apiGroup": group, "kind": "Role", "name": name},
        "subjects": [{"kind": "ServiceAccount", "name": name, "namespace": options.namespace}],
    }
    return [account, role, binding]


def _disruption_budget(options: ManifestOptions) -> Object:
    return {
        "apiVersion": "policy/v1",
        "kind": "PodDisruptionBudget",
        "metadata": _metadata(options, "-head"),
        "spec": {
            # Of pods of a custom resource Kubernetes counts no shares, and a budget counts the
            # heads of all clusters: a number that they never reach protects each of them.
            "minAvailable": 1000,
            "unhealthyPodEvictionPolicy": "AlwaysAllow",
            "selector": {"matchLabels": _labels(options, "head")},
        },
    }


def _destination(networks: Sequence[str], ports: Sequence[int]) -> Object:
    rule: Object = {"to": [{"ipBlock": {"cidr": network}} for network in networks]}
    return rule | ({"ports": [_tcp(port) for port in ports]} if ports else {})


def _tcp(port: int) -> Object:
    return {"protocol": "TCP", "port": port}


_IDENTITY_AGENTS = {
    "eks": [_destination(["169.254.170.23/32", "fd00:ec2::23/128"], [80])],
    "gke": [
        _destination(["169.254.169.254/32"], [80]),
        _destination(["169.254.169.252/32"], [988]),
    ],
}
"""Where a cloud's agent on the node hands out the credentials of a pod."""


def _network_policy(options: ManifestOptions) -> Object:
    ours = {"podSelector": {"matchLabels": {"app.kubernetes.io/part-of": options.name}}}
    operator = {
        "namespaceSelector": {
            "matchLabels": {"kubernetes.io/metadata.name": options.operator_namespace}
        }
    }
    network = options.network
    anywhere = dict.fromkeys([443, *network.api_server_ports, *options.ports_of_services])
    return {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": _metadata(options, ""),
        "spec": {
            "podSelector": ours["podSelector"],
            "policyTypes": ["Ingress", "Egress"],
            "ingress": [
                {"from": [ours]},
                {"from": [operator], "ports": [_tcp(_PORTS["dashboard"])]},
            ],
            "egress": [
                {"to": [ours]},
                {"ports": [{"protocol": protocol, "port": 53} for protocol in ("UDP", "TCP")]},
                {"ports": [_tcp(port) for port in anywhere]},
                *(_IDENTITY_AGENTS[network.pod_identity] if network.pod_identity else []),
                *(_destination([rule.cidr], rule.ports) for rule in network.egress),
            ],
        },
    }


def _tensorboard(options: ManifestOptions) -> list[Object]:
    labels, port = _labels(options, "tensorboard"), 6006
    container = {
        "name": "tensorboard",
        "image": options.image,
        "command": [
            "tensorboard",
            f"--logdir={options.storage}/runs",
            "--bind_all",
            f"--port={port}",
            "--load_fast=false",  # the fast reader knows no bucket
        ],
        "ports": [{"name": "http", "containerPort": port}],
        "resources": _same({"cpu": "1", "memory": "2Gi"}),
        "env": _environment(options, {}),
        "envFrom": [_storage_credentials(options)],
        "volumeMounts": _mounts(options),
        "readinessProbe": {"httpGet": {"path": "/", "port": "http"}},
        "securityContext": _CONTAINER_SECURITY,
    }
    account = f"{options.name}-worker"
    pod = _pod(
        options,
        "tensorboard",
        container,
        volumes=_volumes(options),
        grace_s=30,
        service_account=account,
    )
    pod["spec"] |= {"restartPolicy": "Always", "automountServiceAccountToken": False}
    deployment = {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": _metadata(options, "-tensorboard"),
        "spec": {"replicas": 1, "selector": {"matchLabels": labels}, "template": pod},
    }
    service = {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": _metadata(options, "-tensorboard"),
        "spec": {"selector": labels, "ports": [{"name": "http", "port": port}]},
    }
    return [deployment, service]


def _storage_secret(options: ManifestOptions) -> Object:
    return {
        "apiVersion": "v1",
        "kind": "Secret",
        "metadata": _metadata(options, "-storage"),
        "type": "Opaque",
        "stringData": {
            "AWS_ACCESS_KEY_ID": "replace-me",
            "AWS_SECRET_ACCESS_KEY": "replace-me",
            "AWS_DEFAULT_REGION": "us-east-1",
        },
    }


# The schedule.


def _retrain_cron(options: ManifestOptions) -> list[Object]:
    """A CronJob that creates a RayJob and waits for its end, and the RayJob it creates."""
    job = ray_job(options, "retrain")
    name = f"{options.name}-retrain"
    manifest = {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": _metadata(options, "-retrain"),
        "data": {"rayjob.yaml": to_yaml([job])},
    }
    # Each step has an end, so that neither an operator that is dead nor a job that it refuses holds
    # the schedule. A job that was taken has a start at once, one that is refused never has.
    removal_s = options.grace_seconds + _ANSWER_S
    end_s = options.max_hours * 3600 + _START_DEADLINE_S
    status = "--for=jsonpath={.status.%s}"
    steps = {
        "remove-last-night": ["delete", f"rayjob/{name}", "--ignore-not-found"],
        "create": ["create", "--filename=/manifest/rayjob.yaml"],
        "await-start": ["wait", f"rayjob/{name}", status % "startTime"],
        "await-end": ["wait", f"rayjob/{name}", status % "endTime"],
        "judge": ["wait", f"rayjob/{name}", status % "jobStatus" + "=SUCCEEDED"],
    }
    limits = {
        "remove-last-night": removal_s,
        "await-start": _ANSWER_S,
        "await-end": end_s,
        "judge": 10,
    }
    for step, limit in limits.items():
        steps[step].append(f"--timeout={limit}s")
    containers: list[Object] = [
        {
            "name": step,
            "image": KUBECTL_IMAGE,
            "args": [*arguments, f"--namespace={options.namespace}"],
            "resources": _same({"cpu": "100m", "memory": "128Mi"}),
            "securityContext": {**_CONTAINER_SECURITY, "readOnlyRootFilesystem": True},
            "volumeMounts": [{"name": "manifest", "mountPath": "/manifest", "readOnly": True}],
        }
        for step, arguments in steps.items()
    ]
    volumes = [{"name": "manifest", "configMap": {"name": name}}]
    pod = _pod(
        options, "retrain", containers[-1], volumes=volumes, grace_s=30, service_account=name
    )
    pod["spec"]["initContainers"] = containers[:-1]
    pod["metadata"]["annotations"] = {**_STAYS, **options.annotations}
    cron = {
        "apiVersion": "batch/v1",
        "kind": "CronJob",
        "metadata": _metadata(options, "-retrain"),
        "spec": {
            "schedule": options.schedule,
            "timeZone": options.time_zone,
            # The pod lives as long as its RayJob, so that two nights never overlap.
            "concurrencyPolicy": "Forbid",
            "startingDeadlineSeconds": 3600,
            "successfulJobsHistoryLimit": 3,
            "failedJobsHistoryLimit": 5,
            "jobTemplate": {
                "spec": {
                    "backoffLimit": 1,
                    "activeDeadlineSeconds": 2 * sum(limits.values()),
                    "ttlSecondsAfterFinished": 7 * 24 * 3600,
                    "template": pod,
                }
            },
        },
    }
    return [manifest, cron]


def _ray_cron_job(options: ManifestOptions) -> Object:
    """KubeRay's own schedule.

    Never suspended: when that ends, the operator makes up for every night at once.
    """
    return {
        "apiVersion": "ray.io/v1",
        "kind": "RayCronJob",
        "metadata": _metadata(options, "-retrain"),
        "spec": {
            "schedule": options.schedule,
            "timeZone": options.time_zone,
            "jobTemplate": _ray_job_spec(options, "retrain"),
        },
    }
