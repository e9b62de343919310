"""From options to the manifests of ``cluster/``: plain data, then YAML. Deterministic."""

import shlex
from pathlib import Path
from typing import Any

import yaml

from prioritycut_ray.kubernetes.namespace import namespace_objects, storage_secret
from prioritycut_ray.kubernetes.options import ManifestOptions, PodOptions, image_ray_version
from prioritycut_ray.kubernetes.pods import (
    CONTAINER_SECURITY,
    STAYS,
    Object,
    head_pod,
    metadata_of,
    plain_pod,
    same,
    save_seconds,
    submitter_pod,
    variables_of,
    worker_pod,
)

KUBECTL_IMAGE = "registry.k8s.io/kubectl:v1.34.1"
"""Kubernetes' own image: kubectl and nothing else, not even a shell."""
_MARGIN_S = 5
"""A driver gives up so long before the hook that waits for it."""
_START_DEADLINE_S = 1800
"""For a cluster to come up: images are pulled, machines are bought."""
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
        "base.yaml": namespace_objects(options),
        "storage-secret.yaml": [storage_secret(options)],
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
    grace = f"train.grace_seconds={save_seconds(options) - _MARGIN_S}"
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


def ray_job(options: ManifestOptions, verb: str) -> Object:
    """A RayJob: a cluster that lives as long as its job does."""
    return {
        "apiVersion": "ray.io/v1",
        "kind": "RayJob",
        "metadata": metadata_of(options, f"-{verb}", _queue_labels(options)),
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
        spec["submitterPodTemplate"] = submitter_pod(options)
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
        "metadata": metadata_of(options, "", _queue_labels(options)),
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
            "template": head_pod(options, grows=grows),
        },
        "workerGroupSpecs": [
            {
                "groupName": "gpu" if options.worker.gpus else "cpu",
                "replicas": workers,
                "minReplicas": workers,
                "maxReplicas": options.max_workers,
                "rayStartParams": _object_store(options.worker),
                "template": worker_pod(options),
            }
        ],
    }
    if grows:
        spec["autoscalerOptions"] = {
            "version": "v2",
            "upscalingMode": "Default",
            "idleTimeoutSeconds": 300,
            "resources": same({"cpu": "500m", "memory": "1Gi"}),
            "securityContext": CONTAINER_SECURITY,
        }
    if options.redis:
        spec["gcsFaultToleranceOptions"] = {
            "redisAddress": options.redis,
            "redisPassword": {
                "valueFrom": {"secretKeyRef": {"name": f"{options.name}-redis", "key": "password"}}
            },
        }
    if options.history:
        collector = {"image": options.history.collector, "env": variables_of(options.history.env)}
        spec["historyServerOptions"] = {"collectorOptions": collector}
    return spec


def _object_store(size: PodOptions) -> dict[str, str]:
    # In bytes. Unless told, Ray takes 95 % of /dev/shm, which the data loader needs.
    return {"object-store-memory": str(int(size.object_store_gib * 2**30))}


# The schedule.


def _retrain_cron(options: ManifestOptions) -> list[Object]:
    """A CronJob that creates a RayJob and waits for its end, and the RayJob it creates."""
    job = ray_job(options, "retrain")
    name = f"{options.name}-retrain"
    manifest = {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": metadata_of(options, "-retrain"),
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
            "resources": same({"cpu": "100m", "memory": "128Mi"}),
            "securityContext": {**CONTAINER_SECURITY, "readOnlyRootFilesystem": True},
            "volumeMounts": [{"name": "manifest", "mountPath": "/manifest", "readOnly": True}],
        }
        for step, arguments in steps.items()
    ]
    volumes = [{"name": "manifest", "configMap": {"name": name}}]
    pod = plain_pod(
        options, "retrain", containers[-1], volumes=volumes, grace_s=30, service_account=name
    )
    pod["spec"]["initContainers"] = containers[:-1]
    pod["metadata"]["annotations"] = {**STAYS, **options.annotations}
    cron = {
        "apiVersion": "batch/v1",
        "kind": "CronJob",
        "metadata": metadata_of(options, "-retrain"),
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
        "metadata": metadata_of(options, "-retrain"),
        "spec": {
            "schedule": options.schedule,
            "timeZone": options.time_zone,
            "jobTemplate": _ray_job_spec(options, "retrain"),
        },
    }
