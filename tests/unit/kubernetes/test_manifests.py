"""The manifests in cluster/ are valid, and equal to what is rendered."""

import re
import shlex
from collections.abc import Iterator
from typing import Any

import pytest
import yaml

from prioritycut_ray.config import Section, load_config, load_section
from prioritycut_ray.errors import UserError
from prioritycut_ray.kubernetes.check import check_file, check_text, errors_of
from prioritycut_ray.kubernetes.options import (
    RAY_VERSION,
    ManifestOptions,
    SecretKey,
    comment_of,
    image_ray_version,
)
from prioritycut_ray.kubernetes.render import entrypoint, render
from prioritycut_ray.retraining.settings import RetrainSettings
from tests.places import ROOT

FILES = sorted(path.name for path in (ROOT / "cluster").glob("*.yaml"))
RENDERED = render(ManifestOptions())
Object = dict[str, Any]


def objects(file: str) -> list[Object]:
    return list(yaml.safe_load_all(RENDERED[file]))


def train_job() -> Object:
    return objects("rayjob-train.yaml")[0]


def pods(tree: Any) -> Iterator[Object]:
    """Every pod of a document, of those in ConfigMaps too."""
    if isinstance(tree, dict):
        if "containers" in tree:
            yield tree
        for value in tree.values():
            yield from pods(value)
    elif isinstance(tree, list):
        for item in tree:
            yield from pods(item)
    elif isinstance(tree, str) and "apiVersion:" in tree:
        yield from pods(list(yaml.safe_load_all(tree)))


def test_committed_files_are_what_is_rendered() -> None:
    assert set(RENDERED) == set(FILES)
    for name, text in RENDERED.items():
        assert (ROOT / "cluster" / name).read_text() == text, "run `prioritycut k8s render`"


@pytest.mark.parametrize("name", FILES)
def test_committed_files_are_valid(name: str) -> None:
    assert errors_of(check_file(ROOT / "cluster" / name)) == []


EVERYTHING: Object = {
    "image_pull_secrets": ["registry"],
    "storage": "/sets/prioritycut",
    "storage_endpoint": "http://minio",
    "volumes": {
        "sets": {"path": "/sets", "claim": "datasets"},
        "cache": {"path": "/cache", "size_gib": 100},
        "ca": {"path": "/etc/ca", "config_map": "ca", "read_only": True},
    },
    "worker": {
        "env": {"NCCL_DEBUG": "INFO", "HF_TOKEN": {"secret": "hub", "key": "token"}},
        "labels": {"example.com/team": "vision"},
        "annotations": {"k8s.v1.cni.cncf.io/networks": "rdma"},
        "node_selector": {
            "topology.kubernetes.io/zone": ["a", "b"],
            "cloud.google.com/gke-accelerator": "nvidia-l4",
        },
        "tolerations": {"dedicated": "ml", "example.com/any": ""},
        "priority_class": "batch",
        "runtime_class": "nvidia",
        "object_store_gib": 0.25,
        "same_zone": "required",
    },
    "env": {"HTTPS_PROXY": "http://proxy:3128", "NVIDIA_VISIBLE_DEVICES": "all"},
    "labels": {"cost-center": "7"},
    "annotations": {"sidecar.istio.io/inject": "false"},
    "service_account_annotations": {"eks.amazonaws.com/role-arn": "arn:aws:iam::1:role/pc"},
    "network": {
        "api_server_ports": [8443],
        "pod_identity": "eks",
        "egress": [{"cidr": "10.0.0.0/8", "ports": [3128]}, {"cidr": "fd00::/8"}],
    },
}


@pytest.mark.parametrize(
    "changes",
    [
        {"queue": "gpu"},
        {"scheduler": "volcano"},
        {"redis": "redis.db:6379", "storage_endpoint": "http://minio:9000"},
        {"worker": {"cpus": 8, "memory_gib": 16, "shm_gib": 4, "gpus": 0}, "spot": False},
        {"worker": {"cpus": 32, "memory_gib": 256, "shm_gib": 64, "gpus": 8}, "max_workers": 1},
        {"train": {"config": "taichi256", "overrides": ["train.samples=1000"]}},
        {"submission": "SidecarMode"},
        {"ray_cron_job": True, "name": "a" * 28},
        {
            "history": {
                "collector": "quay.io/kuberay/collector:v1.7.0",
                "env": {"STORAGE_BACKEND": "S3", "S3_REGION": "eu-central-1", "S3_BUCKET": "logs"},
            }
        },
        EVERYTHING,
    ],
)
def test_every_option_renders_valid_manifests(changes: Object) -> None:
    for text in render(ManifestOptions.model_validate(changes)).values():
        assert errors_of(check_text(text)) == []


def all_pods(options: ManifestOptions | None = None) -> list[Object]:
    """Yield every pod of the manifests, including embedded ones."""
    files = render(options or ManifestOptions()).values()
    return [pod for text in files for pod in pods(list(yaml.safe_load_all(text)))]


def ray_pods(options: ManifestOptions | None = None) -> list[Object]:
    return [pod for pod in all_pods(options) if name_of(pod) in ("ray-head", "ray-worker")]


def name_of(pod: Object) -> str:
    return str(pod["containers"][0]["name"])


def test_every_pod_follows_the_security_rules() -> None:
    for pod in all_pods():
        assert pod["securityContext"]["runAsNonRoot"] is True
        for container in pod["containers"] + pod.get("initContainers", []):
            resources = container["resources"]
            assert resources["requests"] == resources["limits"], "evicted last"
            assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
    assert len(ray_pods()) == 8
    for pod in ray_pods():
        assert pod["volumes"][0]["emptyDir"]["sizeLimit"], "/dev/shm has a size"
        assert pod["containers"][0]["lifecycle"]["preStop"]


def test_all_grace_periods_follow_from_one_option() -> None:
    """The driver gives up before its hook, and the hook before the pod is killed."""
    options = ManifestOptions(grace_seconds=300)
    for pod in ray_pods(options):
        assert pod["terminationGracePeriodSeconds"] == 300
        container = pod["containers"][0]
        assert container["lifecycle"]["preStop"]["exec"]["command"][-2:] == ["--seconds", "285"]
        if name_of(pod) == "ray-head":
            stop = {"name": "RAY_JOB_STOP_WAIT_TIME_S", "value": "285"}
            assert stop in container["env"]
    for verb in ("train", "tune"):
        words = [w for w in entrypoint(options, verb).split()[3:] if not w.startswith("--")]
        assert load_config("vox256", words).train.grace_seconds == 280
    words = entrypoint(options, "retrain").split()
    settings = load_section(RetrainSettings, str(ROOT / words[2]), words[3:])
    assert settings.set == {"train.grace_seconds": 280}


def test_only_workers_run_on_spot_instances() -> None:
    cluster = train_job()["spec"]["rayClusterSpec"]
    head = cluster["headGroupSpec"]["template"]["spec"]
    worker = cluster["workerGroupSpecs"][0]["template"]["spec"]
    assert {t["tolerationSeconds"] for t in head["tolerations"]} == {60}, "of lost nodes only"
    assert {item["value"] for item in worker["tolerations"] if "value" in item} == {"true", "spot"}


def test_roles_grant_the_least_permissions() -> None:
    roles = {o["metadata"]["name"]: o for o in objects("base.yaml") if o["kind"] == "Role"}
    assert set(roles) == {"prioritycut-retrain"}, "the operator creates the head's role"
    for rule in roles["prioritycut-retrain"]["rules"]:
        assert rule["resources"] == ["rayjobs"]
        assert "*" not in rule["verbs"]
        named = rule.get("resourceNames") == ["prioritycut-retrain"]
        assert named or rule["verbs"] == ["create"]
    for pod in ray_pods():
        grows = any(c["name"] == "ray-head" for c in pod["containers"])
        assert grows or pod["automountServiceAccountToken"] is False
    job = train_job()["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]
    assert job["automountServiceAccountToken"] is False, "it does not scale"
    stays = objects("raycluster.yaml")[0]["spec"]["headGroupSpec"]["template"]["spec"]
    assert stays["automountServiceAccountToken"] is True


def removal(options: ManifestOptions, file: str) -> Object:
    [job] = list(yaml.safe_load_all(render(options)[file]))
    return dict(job["spec"])


def test_workers_are_deleted_first_and_the_job_last() -> None:
    spec = removal(ManifestOptions(), "rayjob-train.yaml")
    assert "shutdownAfterJobFinishes" not in spec
    rules = spec["deletionStrategy"]["deletionRules"]
    ends: dict[str, dict[str, int]] = {}
    for rule in rules:
        condition = dict(rule["condition"])
        seconds = condition.pop("ttlSeconds")
        ends.setdefault(str(condition), {})[rule["policy"]] = seconds
    assert len(ends) == 2, "after success and after failure"
    for after in ends.values():
        assert after["DeleteWorkers"] == 0
        assert after["DeleteWorkers"] < after["DeleteCluster"] < after["DeleteSelf"]


def test_with_a_queue_the_cluster_is_removed_after_the_job() -> None:
    spec = removal(ManifestOptions(queue="gpu"), "rayjob-train.yaml")
    assert spec["shutdownAfterJobFinishes"] is True
    assert "deletionStrategy" not in spec


def policy_of(**network: Any) -> Object:
    options = ManifestOptions.model_validate(network)
    documents = yaml.safe_load_all(render(options)["base.yaml"])
    return next(dict(d["spec"]) for d in documents if d["kind"] == "NetworkPolicy")


@pytest.mark.parametrize(
    ("changes", "port"),
    [
        ({"storage_endpoint": "http://minio"}, 80),
        ({"storage_endpoint": "https://minio/"}, 443),
        ({"storage_endpoint": "http://minio:9000/"}, 9000),
        ({"redis": "redis.db:6380"}, 6380),
        ({"network": {"api_server_ports": [8443]}}, 8443),
    ],
)
def test_the_network_policy_lets_pods_reach_their_services(changes: Object, port: int) -> None:
    anywhere = policy_of(**changes)["egress"][2]["ports"]
    assert {"protocol": "TCP", "port": port} in anywhere
    assert len({item["port"] for item in anywhere}) == len(anywhere)


@pytest.mark.parametrize(
    ("cloud", "agents"),
    [
        ("eks", [("169.254.170.23/32", 80), ("fd00:ec2::23/128", 80)]),
        ("gke", [("169.254.169.254/32", 80), ("169.254.169.252/32", 988)]),
    ],
)
def test_the_network_policy_lets_pods_reach_their_identity(
    cloud: str, agents: list[tuple[str, int]]
) -> None:
    rules = policy_of(network={"pod_identity": cloud})["egress"][3:]
    found = [
        (place["ipBlock"]["cidr"], rule["ports"][0]["port"])
        for rule in rules
        for place in rule["to"]
    ]
    assert found == agents
    assert len(policy_of()["egress"]) == 3


def test_every_head_is_protected_from_evictions() -> None:
    budget = next(o for o in objects("base.yaml") if o["kind"] == "PodDisruptionBudget")
    assert budget["spec"]["minAvailable"] >= 1000, "more than there are heads"
    head = train_job()["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]
    labels = budget["spec"]["selector"]["matchLabels"]
    assert labels.items() <= head["metadata"]["labels"].items()
    annotations = head["metadata"]["annotations"]
    assert annotations["cluster-autoscaler.kubernetes.io/safe-to-evict"] == "false"
    assert annotations["karpenter.sh/do-not-disrupt"] == "true"


def test_each_step_of_the_nightly_job_has_a_timeout() -> None:
    spec = objects("cronjob-retrain.yaml")[1]["spec"]["jobTemplate"]["spec"]
    pod = spec["template"]["spec"]
    steps = {c["name"]: c["args"] for c in pod["initContainers"] + pod["containers"]}
    order = ["remove-last-night", "create", "await-start", "await-end", "judge"]
    assert list(steps) == order
    seconds = {}
    for name, words in steps.items():
        if name != "create":
            [limit] = [w for w in words if w.startswith("--timeout=")]
            seconds[name] = int(limit.removeprefix("--timeout=").removesuffix("s"))
    assert seconds["await-start"] == 300
    assert "--for=jsonpath={.status.startTime}" in steps["await-start"]
    assert seconds["remove-last-night"] > ManifestOptions().grace_seconds
    assert spec["activeDeadlineSeconds"] >= sum(seconds.values())


def test_a_ray_cron_job_is_rendered_on_request_and_not_suspended() -> None:
    assert "raycronjob-retrain.yaml" not in RENDERED
    [cron] = yaml.safe_load_all(
        render(ManifestOptions(ray_cron_job=True))["raycronjob-retrain.yaml"]
    )
    assert "suspend" not in cron["spec"]


def test_a_job_submits_from_its_head_on_request() -> None:
    spec = removal(ManifestOptions(submission="SidecarMode"), "rayjob-train.yaml")
    assert spec["submissionMode"] == "SidecarMode"
    assert "submitterPodTemplate" not in spec


def test_options_are_applied_to_the_pods() -> None:
    options = ManifestOptions.model_validate(EVERYTHING)
    [job] = yaml.safe_load_all(render(options)["rayjob-train.yaml"])
    group = job["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]
    assert group["rayStartParams"] == {"object-store-memory": str(2**28)}
    metadata, pod = group["template"]["metadata"], group["template"]["spec"]
    assert metadata["labels"]["example.com/team"] == "vision"
    assert metadata["labels"]["cost-center"] == "7"
    assert metadata["annotations"]["k8s.v1.cni.cncf.io/networks"] == "rdma"
    assert pod["imagePullSecrets"] == [{"name": "registry"}]
    assert (pod["priorityClassName"], pod["runtimeClassName"]) == ("batch", "nvidia")
    assert pod["nodeSelector"] == {"cloud.google.com/gke-accelerator": "nvidia-l4"}
    affinity = pod["affinity"]
    [term] = affinity["nodeAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"][
        "nodeSelectorTerms"
    ]
    zones = {"key": "topology.kubernetes.io/zone", "operator": "In", "values": ["a", "b"]}
    assert term == {"matchExpressions": [zones]}
    [same] = affinity["podAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]
    assert same["topologyKey"] == "topology.kubernetes.io/zone"
    assert {"key": "dedicated", "operator": "Equal", "value": "ml"} in pod["tolerations"]
    container = pod["containers"][0]
    variables = {item["name"]: item for item in container["env"]}
    assert variables["AWS_ENDPOINT_URL"]["value"] == "http://minio"
    assert variables["HF_TOKEN"]["valueFrom"]["secretKeyRef"] == {"name": "hub", "key": "token"}
    assert {"name": "cache", "mountPath": "/cache"} in container["volumeMounts"]
    for other in all_pods(options):
        assert other["imagePullSecrets"] == [{"name": "registry"}]
    accounts = list(yaml.safe_load_all(render(options)["base.yaml"]))
    named = {d["metadata"]["name"]: d["metadata"].get("annotations") for d in accounts[:3]}
    role = EVERYTHING["service_account_annotations"]
    assert named["prioritycut-head"] == named["prioritycut-worker"] == role


def test_pods_without_gpus_see_none() -> None:
    for pod in all_pods():
        container = pod["containers"][0]
        if container["image"] == ManifestOptions().image:
            hidden = {"name": "NVIDIA_VISIBLE_DEVICES", "value": "void"} in container.get("env", [])
            assert hidden is ("nvidia.com/gpu" not in container["resources"]["limits"])


def test_the_entrypoint_of_a_job_is_a_valid_command() -> None:
    words = entrypoint(ManifestOptions(), "train").split()
    assert words[:3] == ["prioritycut", "train", "vox256"]
    config = load_config(words[2], words[3:])
    assert (config.train.workers, config.train.use_gpu) == (4, "yes")
    assert config.storage == "s3://prioritycut/runs"


def test_the_entrypoint_of_a_retraining_is_valid() -> None:
    words = entrypoint(ManifestOptions(), "retrain").split()
    assert words[:3] == ["prioritycut", "retrain", "retrain.yaml"]
    settings = load_section(RetrainSettings, str(ROOT / words[2]), words[3:])
    assert settings.data == "s3://prioritycut/data"


def test_the_entrypoint_of_a_search_is_valid_and_a_trial_fits_a_pod() -> None:
    words = entrypoint(ManifestOptions(), "tune").split()
    assert words[:3] == ["prioritycut", "tune", "tune_configs/ablation.yaml"]
    assert words[-1] == "--resume", "a retried attempt resumes"
    config = load_config("vox256", words[3:-1])
    assert config.data.url == "s3://prioritycut/data"
    assert (config.train.workers, config.train.use_gpu) == (1, "yes")
    assert config.train.cpus_per_worker < ManifestOptions().worker.cpus, "room for drivers"


def test_the_image_and_the_manifests_have_the_same_ray_version() -> None:
    dockerfile = (ROOT / "Dockerfile").read_text()
    assert f"ARG RAY_VERSION={RAY_VERSION}\n" in dockerfile
    assert image_ray_version(ManifestOptions().image) == RAY_VERSION
    assert train_job()["spec"]["rayClusterSpec"]["rayVersion"] == RAY_VERSION


@pytest.mark.parametrize(
    ("image", "version"),
    [
        ("rayproject/ray:2.46.0-gpu", "2.46.0"),
        ("localhost:5000/prioritycut-ray:0.1.0-ray2.60.0-cpu", "2.60.0"),
        ("prioritycut-ray:0.1.0", None),
        ("rayproject/ray@sha256:0123", None),
        ("ray", None),
    ],
)
def test_the_ray_version_of_an_image_is_in_its_tag(image: str, version: str | None) -> None:
    assert image_ray_version(image) == version


@pytest.mark.parametrize(
    ("word", "fragments"),
    [
        ("min_workers=9", ["min_workers=9"]),
        ("image=prioritycut:latest", ["image=", "Ray version"]),
        ("image=REGISTRY/prioritycut-ray:0.1.0-ray2.60.0-cpu", ["image=", "lower case"]),
        ("storage=s3://BUCKET", ["storage=", "s3://BUCKET"]),
        ("storage=gs://bucket", ["storage=", "s3fs"]),
        ("storage=/data", ["storage=/data", "volumes"]),
        ("storage_endpoint=minio:9000", ["storage_endpoint=", "http(s)://HOST"]),
        ("storage_endpoint=http://minio:99999", ["storage_endpoint=", "http(s)://HOST"]),
        ("storage_endpoint=http://minio/bucket", ["storage_endpoint=", "http(s)://HOST"]),
        ("redis=redis", ["redis=", "HOST:PORT"]),
        ("redis=redis:0", ["redis=", "HOST:PORT"]),
        ("worker.shm_gib=48", ["worker", "shm_gib=48", "memory_gib=48"]),
        ("worker.object_store_gib=12", ["worker", "object_store_gib=12", "shm_gib=12"]),
        ("name=Has Capitals", ["name=", "a-z"]),
        (f"name={'a' * 29}", ["name=", "28"]),
        ("queue=two words", ["queue="]),
        ("schedule=0 17 2 * * *", ["schedule=", "five-field"]),
        ("schedule=99 2 * * *", ["schedule=", "not a cron expression"]),
        ("schedule=17 2 * * 1#2", ["schedule=", "not a cron expression"]),
        ("schedule=0 2 31 2 *", ["schedule=", "never occurs"]),
        ("time_zone=Mars/Olympus", ["time_zone=", "Europe/Berlin"]),
        ("time_zone=CET+1", ["time_zone=", "Europe/Berlin"]),
        ("train.config=vox257", ["train", "vox257", "vox256"]),
        ("train.worker=3", ["'train.worker'", "config, overrides"]),
        ("train.overrides=[train.worker=3]", ["'train.worker'", "'train.workers'"]),
        ("worker.gpu=2", ["'worker.gpu'", "'worker.gpus'"]),
        ("head.frobnicate=1", ["'head.frobnicate'", "memory_gib"]),
        ("network.egress=[{cidr: 10.0.0.0/8, port: 1}]", ["port'", "egress.0.ports"]),
        ("network.egress=[{cidr: 10.0.0.1/8}]", ["cidr", "CIDR"]),
        ("volumes.cache.pth=/cache", ["volumes.cache.pth", "volumes.cache.path"]),
        ("volumes.cache.path=/cache", ["volumes.cache", "size_gib"]),
        ("worker.env.NCCL-DEBUG=INFO", ["NCCL-DEBUG", "variable"]),
        ("worker.labels.team=a b", ["worker.labels.team", "label"]),
    ],
)
def test_invalid_options_are_named(word: str, fragments: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        load_section(ManifestOptions, None, [word])
    for fragment in fragments:
        assert fragment in str(caught.value)
    assert "\n" not in str(caught.value)


def test_mutually_exclusive_options_are_rejected() -> None:
    for words in (["queue=a", "scheduler=volcano"], ["queue=a", "ray_cron_job=true"]):
        with pytest.raises(UserError, match="are mutually exclusive"):
            load_section(ManifestOptions, None, words)


def test_overrides_change_one_value_and_keys_may_have_dots() -> None:
    words = [
        "worker.gpus=2",
        "head.memory_gib=32",
        "worker.node_selector.topology.kubernetes.io/zone=a,b",
        "worker.env.OMP_NUM_THREADS=007",
        "env.TOKEN={secret: hub, key: token}",
        "labels.example.com/team=yes",
        "worker.tolerations.dedicated=",
        "worker.labels.release=1e3",
        "volumes.cache.path=/cache",
        "volumes.cache.size_gib=20",
    ]
    options = load_section(ManifestOptions, None, words)
    assert (options.worker.gpus, options.worker.cpus) == (2, 8)
    assert (options.head.memory_gib, options.head.cpus) == (32, 4)
    assert options.worker.node_selector == {"topology.kubernetes.io/zone": ("a", "b")}
    assert options.worker.env == {"OMP_NUM_THREADS": "007"}
    assert options.env == {"TOKEN": SecretKey(secret="hub", key="token")}
    assert options.labels == {"example.com/team": "yes"}
    assert options.volumes["cache"].size_gib == 20
    assert options.worker.tolerations == {"dedicated": ""}
    assert options.worker.labels == {"release": "1e3"}


def test_the_options_of_the_docs_are_options() -> None:
    text = (ROOT / "docs" / "operations.md").read_text()
    table = text.partition("## Options")[2].partition("\n## ")[0]
    rows = [line.split("|")[2] for line in table.splitlines() if line.startswith("| ")][2:]
    assert len(rows) > 15
    for row in rows:
        words = [
            word.replace("HOST:PORT", "redis:6379").replace("NAME", "gpu").replace("IMAGE", "image")
            for span in re.findall("`([^`]+)`", row)
            if not span.startswith("-")  # helm's
            for word in shlex.split(span)
            if re.match(r"[a-z_.]+[^ ]*=", word) and "…" not in word
        ]
        load_section(ManifestOptions, None, words)


def test_every_option_has_a_comment() -> None:
    def sections(kind: type[Section]) -> Iterator[type[Section]]:
        yield kind
        for field in kind.model_fields.values():
            if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
                yield from sections(field.annotation)

    for section in sections(ManifestOptions):
        for key in section.model_fields:
            assert comment_of(section, key), f"{section.__name__}.{key}"
