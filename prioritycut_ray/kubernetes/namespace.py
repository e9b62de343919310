"""Objects that a namespace needs once: accounts, roles, network policy, TensorBoard, a secret."""

from collections.abc import Mapping, Sequence

from prioritycut_ray.kubernetes.options import ManifestOptions
from prioritycut_ray.kubernetes.pods import (
    CONTAINER_SECURITY,
    PORTS,
    Object,
    environment,
    labels_of,
    metadata_of,
    mounts_of,
    plain_pod,
    same,
    storage_credentials,
    volumes_of,
)


def namespace_objects(options: ManifestOptions) -> list[Object]:
    """Return all of these objects except the secret."""
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
    metadata = metadata_of(options, suffix)
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
        "metadata": metadata_of(options, "-head"),
        "spec": {
            # Kubernetes cannot count percentages of a custom resource's pods, and the budget counts
            # the heads of all clusters: a number that they never reach protects each of them.
            "minAvailable": 1000,
            "unhealthyPodEvictionPolicy": "AlwaysAllow",
            "selector": {"matchLabels": labels_of(options, "head")},
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
"""Where the cloud's agent on the node serves the credentials of a pod."""


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
        "metadata": metadata_of(options, ""),
        "spec": {
            "podSelector": ours["podSelector"],
            "policyTypes": ["Ingress", "Egress"],
            "ingress": [
                {"from": [ours]},
                {"from": [operator], "ports": [_tcp(PORTS["dashboard"])]},
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
    labels, port = labels_of(options, "tensorboard"), 6006
    container = {
        "name": "tensorboard",
        "image": options.image,
        "command": [
            "tensorboard",
            f"--logdir={options.storage}/runs",
            "--bind_all",
            f"--port={port}",
            "--load_fast=false",  # the fast loader does not read buckets
        ],
        "ports": [{"name": "http", "containerPort": port}],
        "resources": same({"cpu": "1", "memory": "2Gi"}),
        "env": environment(options, {}),
        "envFrom": [storage_credentials(options)],
        "volumeMounts": mounts_of(options),
        "readinessProbe": {"httpGet": {"path": "/", "port": "http"}},
        "securityContext": CONTAINER_SECURITY,
    }
    account = f"{options.name}-worker"
    pod = plain_pod(
        options,
        "tensorboard",
        container,
        volumes=volumes_of(options),
        grace_s=30,
        service_account=account,
    )
    pod["spec"] |= {"restartPolicy": "Always", "automountServiceAccountToken": False}
    deployment = {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": metadata_of(options, "-tensorboard"),
        "spec": {"replicas": 1, "selector": {"matchLabels": labels}, "template": pod},
    }
    service = {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": metadata_of(options, "-tensorboard"),
        "spec": {"selector": labels, "ports": [{"name": "http", "port": port}]},
    }
    return [deployment, service]


def storage_secret(options: ManifestOptions) -> Object:
    """Return the storage secret with placeholders for its values."""
    return {
        "apiVersion": "v1",
        "kind": "Secret",
        "metadata": metadata_of(options, "-storage"),
        "type": "Opaque",
        "stringData": {
            "AWS_ACCESS_KEY_ID": "replace-me",
            "AWS_SECRET_ACCESS_KEY": "replace-me",
            "AWS_DEFAULT_REGION": "us-east-1",
        },
    }
