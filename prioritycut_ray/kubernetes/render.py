"""From options to the manifests of ``cluster/``: plain data, then YAML. Deterministic."""

import shlex
from collections.abc import Mapping
from typing import Any

import yaml

from prioritycut_ray.kubernetes.options import ManifestOptions, PodOptions, image_ray_version

Object = dict[str, Any]

KUBECTL_IMAGE = "registry.k8s.io/kubectl:v1.34.1"
"""Kubernetes' own image: kubectl and nothing else, not even a shell."""
_PORTS = {"gcs": 6379, "dashboard": 8265, "client": 10001}
_RESERVE_S = 15
"""Of a pod's grace: what is left for Ray to end after the checkpoint."""
_START_DEADLINE_S = 1800
"""For a cluster to come up: images are pulled, machines are bought."""


def render(options: ManifestOptions) -> dict[str, str]:
    """All manifests: file name → YAML."""
    files = {
        "base.yaml": _base(options),
        "storage-secret.yaml": [_storage_secret(options)],
        "raycluster.yaml": [ray_cluster(options)],
        "rayjob-train.yaml": [ray_job(options, "train")],
        "rayjob-tune.yaml": [ray_job(options, "tune")],
        "cronjob-retrain.yaml": _retrain_cron(options),
        "raycronjob-retrain.yaml": [_ray_cron_job(options)],
    }
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
    if verb == "retrain":
        words = [options.retrain, f"models={storage}/models", f"data={storage}/data"]
    elif verb == "tune":
        # A trial fills a pod, but for a CPU: the trials' drivers need some.
        cpus = max((worker.cpus - 1) // per_pod, 1)
        size = [f"train.workers={per_pod}", f"train.cpus_per_worker={cpus}", use_gpu]
        words = [options.tune, *places, *size, "--resume"]  # what a retried attempt must do
    else:
        workers, cpus = options.max_workers * per_pod, worker.cpus // per_pod
        size = [f"train.workers={workers}", f"train.cpus_per_worker={cpus}", use_gpu]
        config = options.train.config
        words = [config, f"name={config}", *places, *size, *options.train.overrides]
    return shlex.join(["prioritycut", verb, *words])


def ray_job(options: ManifestOptions, verb: str) -> Object:
    """A RayJob: a cluster that lives as long as its job does."""
    return {
        "apiVersion": "ray.io/v1",
        "kind": "RayJob",
        "metadata": _metadata(options, f"-{verb}", _queue_labels(options)),
        "spec": _ray_job_spec(options, verb),
    }


def _ray_job_spec(options: ManifestOptions, verb: str) -> Object:
    return {
        "entrypoint": entrypoint(options, verb),
        "submissionMode": "K8sJobMode",
        "shutdownAfterJobFinishes": True,
        "ttlSecondsAfterFinished": 600,
        # A retried attempt may overlap the pods of the one before: the run's lease fences it off.
        # Retraining is not retried here but by its CronJob, which waits for one attempt.
        "backoffLimit": 0 if verb == "retrain" else options.retries,
        "preRunningDeadlineSeconds": _START_DEADLINE_S,
        "activeDeadlineSeconds": options.max_hours * 3600,
        # Most nights there is nothing to retrain: its cluster begins without workers.
        "rayClusterSpec": _cluster_spec(options, grows=verb == "retrain"),
        "submitterPodTemplate": _submitter(options),
    }


def ray_cluster(options: ManifestOptions) -> Object:
    """A cluster that stays, and grows and shrinks with what is submitted to it."""
    return {
        "apiVersion": "ray.io/v1",
        "kind": "RayCluster",
        "metadata": _metadata(options, "", _queue_labels(options)),
        "spec": _cluster_spec(options, grows=True),
    }


def _queue_labels(options: ManifestOptions) -> dict[str, str]:
    if options.queue:
        return {"kueue.x-k8s.io/queue-name": options.queue}
    if options.scheduler == "volcano":
        return {"ray.io/scheduler-name": "volcano", "volcano.sh/queue-name": "default"}
    return {}


# The cluster.


def _cluster_spec(options: ManifestOptions, *, grows: bool) -> Object:
    grows = grows and options.queue is None
    workers = options.min_workers if grows else options.max_workers
    spec: Object = {
        "rayVersion": image_ray_version(options.image),
        "authOptions": {"mode": "token"},
        "enableInTreeAutoscaling": grows,
        "headGroupSpec": {
            "serviceType": "ClusterIP",
            # Nothing is computed on the head: when it is busy, the cluster looks dead.
            "rayStartParams": {"dashboard-host": "0.0.0.0", "num-cpus": "0"},
            "template": _head_pod(options),
        },
        "workerGroupSpecs": [
            {
                "groupName": "gpu" if options.worker.gpus else "cpu",
                "replicas": workers,
                "minReplicas": workers,
                "maxReplicas": options.max_workers,
                "rayStartParams": {},
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
    return spec


def _head_pod(options: ManifestOptions) -> Object:
    save_s = options.grace_seconds - _RESERVE_S
    interrupt = f"prioritycut jobs interrupt --address http://127.0.0.1:8265 --seconds {save_s}"
    container = _ray_container(options, "ray-head", options.head, pre_stop=interrupt)
    container["env"] += [
        # How long a stopped job may save before it is killed; Ray's own value is 3 seconds.
        {"name": "RAY_JOB_STOP_WAIT_TIME_S", "value": str(save_s)}
    ]
    container["ports"] = [{"name": name, "containerPort": port} for name, port in _PORTS.items()]
    return _pod(
        options,
        "head",
        container,
        volumes=[_shm(options.head)],
        grace_s=options.grace_seconds,
        service_account=f"{options.name}-head",
    )


def _worker_pod(options: ManifestOptions) -> Object:
    save_s = options.grace_seconds - _RESERVE_S
    drain = (
        "ray drain-node --reason DRAIN_NODE_REASON_PREEMPTION --reason-message 'the pod ends' "
        f"--deadline-remaining-seconds {save_s}; sleep {save_s}"
    )
    pod = _pod(
        options,
        "worker",
        _ray_container(options, "ray-worker", options.worker, pre_stop=drain),
        volumes=[_shm(options.worker)],
        grace_s=options.grace_seconds,
        service_account=f"{options.name}-worker",
    )
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
    tolerations = _tolerations(options)
    if tolerations:
        pod["spec"]["tolerations"] = tolerations
    if options.node_selector:
        pod["spec"]["nodeSelector"] = dict(options.node_selector)
    return pod


def _tolerations(options: ManifestOptions) -> list[Object]:
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


def _ray_container(
    options: ManifestOptions, name: str, size: PodOptions, *, pre_stop: str
) -> Object:
    return {
        "name": name,
        "image": options.image,
        "resources": _resources(size),
        "env": _environment(options),
        "envFrom": [_storage_credentials(options)],
        "volumeMounts": [{"name": "shm", "mountPath": "/dev/shm"}],
        "securityContext": _CONTAINER_SECURITY,
        # The run hears that it ends, and saves while this hook holds the pod.
        "lifecycle": {"preStop": {"exec": {"command": ["/bin/sh", "-c", pre_stop]}}},
    }


def _environment(options: ManifestOptions) -> list[Object]:
    if options.storage_endpoint is None:
        return []
    return [{"name": "AWS_ENDPOINT_URL", "value": options.storage_endpoint}]


def _storage_credentials(options: ManifestOptions) -> Object:
    # Optional: where the cloud gives pods an identity of their own, no key is needed.
    return {"secretRef": {"name": f"{options.name}-storage", "optional": True}}


def _submitter(options: ManifestOptions) -> Object:
    container = {
        "name": "ray-job-submitter",
        "image": options.image,
        "resources": _same({"cpu": "500m", "memory": "1Gi"}),
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
    if volumes:
        spec["volumes"] = volumes
    return {"metadata": {"labels": _labels(options, role)}, "spec": spec}


def _shm(size: PodOptions) -> Object:
    return {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": f"{size.shm_gib}Gi"}}


def _resources(size: PodOptions) -> Object:
    amounts = {"cpu": str(size.cpus), "memory": f"{size.memory_gib}Gi"}
    if size.gpus:
        amounts["nvidia.com/gpu"] = str(size.gpus)
    return _same(amounts)


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
    autoscaling = [
        {"apiGroups": [""], "resources": ["pods"], "verbs": ["get", "list", "watch", "patch"]},
        {"apiGroups": ["ray.io"], "resources": ["rayclusters"], "verbs": ["get", "patch"]},
    ]
    creating = [
        {
            "apiGroups": ["ray.io"],
            "resources": ["rayjobs"],
            "verbs": ["get", "list", "watch", "create", "delete"],
        }
    ]
    return [
        *_account(options, "-head", autoscaling),
        *_account(options, "-worker", []),
        *_account(options, "-retrain", creating),
        _disruption_budget(options),
        _network_policy(options),
        *_tensorboard(options),
    ]


def _account(options: ManifestOptions, suffix: str, rules: list[Object]) -> list[Object]:
    account = {
        "apiVersion": "v1",
        "kind": "ServiceAccount",
        "metadata": _metadata(options, suffix),
        "automountServiceAccountToken": bool(rules),
    }
    if not rules:
        return [account]
    group, name = "rbac.authorization.k8s.io", f"{options.name}{suffix}"
    role = {
        "apiVersion": f"{group}/v1",
        "kind": "Role",
        "metadata": _metadata(options, suffix),
        "rules": rules,
    }
    binding = {
        "apiVersion": f"{group}/v1",
        "kind": "RoleBinding",
        "metadata": _metadata(options, suffix),
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
            # For pods of a custom resource Kubernetes counts minAvailable only.
            "minAvailable": 1,
            "selector": {"matchLabels": _labels(options, "head")},
        },
    }


def _network_policy(options: ManifestOptions) -> Object:
    ours = {"podSelector": {"matchLabels": {"app.kubernetes.io/part-of": options.name}}}
    operator = {
        "namespaceSelector": {
            "matchLabels": {"kubernetes.io/metadata.name": options.operator_namespace}
        }
    }
    outside = [_tcp(443), _tcp(6443)]  # storage, the API server
    for address in filter(None, (options.storage_endpoint, options.redis)):
        port = address.rsplit(":", 1)[-1].rstrip("/")
        if port.isdigit() and _tcp(int(port)) not in outside:
            outside.append(_tcp(int(port)))
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
                {"ports": outside},
            ],
        },
    }


def _tcp(port: int) -> Object:
    return {"protocol": "TCP", "port": port}


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
        "env": _environment(options),
        "envFrom": [_storage_credentials(options)],
        "readinessProbe": {"httpGet": {"path": "/", "port": "http"}},
        "securityContext": _CONTAINER_SECURITY,
    }
    account = f"{options.name}-worker"
    pod = _pod(options, "tensorboard", container, volumes=[], grace_s=30, service_account=account)
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
    seconds = options.max_hours * 3600 + _START_DEADLINE_S
    status = "--for=jsonpath={.status.%s}"
    steps = {
        "remove-last-night": ["delete", f"rayjob/{name}", "--ignore-not-found"],
        "create": ["create", "--filename=/manifest/rayjob.yaml"],
        "await-end": ["wait", f"rayjob/{name}", status % "endTime", f"--timeout={seconds}s"],
        "judge": ["wait", f"rayjob/{name}", status % "jobStatus" + "=SUCCEEDED", "--timeout=10s"],
    }
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
                    "activeDeadlineSeconds": 2 * seconds,
                    "ttlSecondsAfterFinished": 7 * 24 * 3600,
                    "template": pod,
                }
            },
        },
    }
    return [manifest, cron]


def _ray_cron_job(options: ManifestOptions) -> Object:
    """Opt-in: KubeRay's own schedule is alpha, behind a feature gate, and may overlap itself."""
    return {
        "apiVersion": "ray.io/v1",
        "kind": "RayCronJob",
        "metadata": _metadata(options, "-retrain"),
        "spec": {
            "schedule": options.schedule,
            "timeZone": options.time_zone,
            "suspend": True,
            "jobTemplate": _ray_job_spec(options, "retrain"),
        },
    }
