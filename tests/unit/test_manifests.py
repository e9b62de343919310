"""The manifests of cluster/ and their checker: what is committed is what is rendered, and valid."""

import copy
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from prioritycut_ray.config import load_config, load_section
from prioritycut_ray.errors import UserError
from prioritycut_ray.kubernetes import schema
from prioritycut_ray.kubernetes.check import check_file, check_text, parse_quantity
from prioritycut_ray.kubernetes.options import RAY_VERSION, ManifestOptions, image_ray_version
from prioritycut_ray.kubernetes.render import entrypoint, render
from prioritycut_ray.retraining.settings import RetrainSettings

ROOT = Path(__file__).parents[2]
FILES = sorted(path.name for path in (ROOT / "cluster").glob("*.yaml"))
RENDERED = render(ManifestOptions())
Object = dict[str, Any]


def objects(file: str) -> list[Object]:
    return list(yaml.safe_load_all(RENDERED[file]))


def train_job() -> Object:
    return objects("rayjob-train.yaml")[0]


def problems(document: Object) -> str:
    return "\n".join(str(problem) for problem in check_text(yaml.safe_dump(document)))


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
    assert check_file(ROOT / "cluster" / name) == []


def test_samples_of_kuberay_are_valid() -> None:
    samples = ROOT / "tests" / "data" / "kuberay_samples.yaml"
    assert len(list(yaml.safe_load_all(samples.read_text()))) == 12
    assert check_file(samples) == []


@pytest.mark.parametrize(
    "changes",
    [
        {"queue": "gpu"},
        {"scheduler": "volcano"},
        {"redis": "redis.db:6379", "storage_endpoint": "http://minio:9000"},
        {"worker": {"cpus": 8, "memory_gib": 16, "shm_gib": 4}, "spot": False},
        {"worker": {"cpus": 32, "memory_gib": 256, "shm_gib": 64, "gpus": 8}, "max_workers": 1},
        {"train": {"config": "taichi256", "overrides": ["train.samples=1000"]}},
    ],
)
def test_every_choice_renders_valid_manifests(changes: Object) -> None:
    for text in render(ManifestOptions.model_validate(changes)).values():
        assert check_text(text) == []


def test_every_pod_keeps_its_promises() -> None:
    ray_pods = 0
    for text in RENDERED.values():
        for pod in pods(list(yaml.safe_load_all(text))):
            assert pod["securityContext"]["runAsNonRoot"] is True
            for container in pod["containers"] + pod.get("initContainers", []):
                resources = container["resources"]
                assert resources["requests"] == resources["limits"], "evicted last"
                assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
            if pod["containers"][0]["name"] in ("ray-head", "ray-worker"):
                ray_pods += 1
                assert pod["volumes"][0]["emptyDir"]["sizeLimit"], "/dev/shm has a size"
                assert pod["containers"][0]["lifecycle"]["preStop"]
                assert pod["terminationGracePeriodSeconds"] == 120
    assert ray_pods == 10


def test_only_workers_run_where_machines_are_taken_back() -> None:
    cluster = train_job()["spec"]["rayClusterSpec"]
    head = cluster["headGroupSpec"]["template"]["spec"]
    worker = cluster["workerGroupSpecs"][0]["template"]["spec"]
    assert "tolerations" not in head
    assert {item["value"] for item in worker["tolerations"] if "value" in item} == {"true", "spot"}


def test_roles_give_the_least_rights() -> None:
    roles = {o["metadata"]["name"]: o for o in objects("base.yaml") if o["kind"] == "Role"}
    assert set(roles) == {"prioritycut-head", "prioritycut-retrain"}
    for role in roles.values():
        for rule in role["rules"]:
            assert "*" not in rule["verbs"] + rule["resources"] + rule["apiGroups"]
            assert "secrets" not in rule["resources"]


def test_the_command_of_a_job_is_what_a_laptop_would_run() -> None:
    words = entrypoint(ManifestOptions(), "train").split()
    assert words[:3] == ["prioritycut", "train", "vox256"]
    config = load_config(words[2], words[3:])
    assert (config.train.workers, config.train.use_gpu) == (4, "yes")
    assert config.storage == "s3://prioritycut/runs"


def test_a_retraining_is_one_file_and_its_places() -> None:
    words = entrypoint(ManifestOptions(), "retrain").split()
    assert words[:3] == ["prioritycut", "retrain", "retrain.yaml"]
    settings = load_section(RetrainSettings, str(ROOT / words[2]), words[3:])
    assert settings.data == "s3://prioritycut/data"


def test_a_search_is_one_file_and_a_trial_a_pod() -> None:
    words = entrypoint(ManifestOptions(), "tune").split()
    assert words[:3] == ["prioritycut", "tune", "tune_configs/ablation.yaml"]
    assert words[-1] == "--resume", "a retried attempt goes on"
    config = load_config("vox256", words[3:-1])
    assert config.data.url == "s3://prioritycut/data"
    assert (config.train.workers, config.train.use_gpu) == (1, "yes")
    assert config.train.cpus_per_worker < ManifestOptions().worker.cpus, "room for drivers"


def test_the_image_and_the_manifests_have_one_ray() -> None:
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
    ("changes", "fragment"),
    [
        ({"min_workers": 9}, "min_workers=9"),
        ({"image": "prioritycut:latest"}, "Ray version"),
        ({"queue": "a", "scheduler": "volcano"}, "exclude"),
        ({"worker": {"cpus": 1, "memory_gib": 4, "shm_gib": 4}}, "shm_gib=4"),
        ({"name": "Has Capitals"}, "name"),
    ],
)
def test_options_that_do_not_fit_are_named(changes: Object, fragment: str) -> None:
    with pytest.raises(ValueError, match=fragment):
        ManifestOptions.model_validate(changes)


# Mistakes: what is changed in the training job, and what the checker must say of it.


def cluster(job: Object) -> Object:
    return dict(job)["spec"]["rayClusterSpec"]


def group(job: Object) -> Object:
    return cluster(job)["workerGroupSpecs"][0]


def head(job: Object) -> Object:
    return cluster(job)["headGroupSpec"]


def container(job: Object) -> Object:
    return group(job)["template"]["spec"]["containers"][0]


def put(place: Callable[[Object], Object], key: str, value: Any) -> Callable[[Object], None]:
    return lambda job: place(job).__setitem__(key, value)


def drop(place: Callable[[Object], Object], key: str) -> Callable[[Object], None]:
    return lambda job: place(job).__delitem__(key)


def spec(job: Object) -> Object:
    return dict(job)["spec"]


def metadata(job: Object) -> Object:
    return dict(job)["metadata"]


MISTAKES: dict[str, tuple[Callable[[Object], None], str]] = {
    "misspelt field": (put(spec, "shutdownAfterJobFinish", True), "shutdownAfterJobFinish"),
    "misspelt pod field": (put(container, "imagePullPolice", "Always"), "imagePullPolice"),
    "text for a number": (put(spec, "backoffLimit", "3"), "backoffLimit"),
    "number for text": (put(head, "rayStartParams", {"num-cpus": 0}), "num-cpus"),
    "unknown submission mode": (put(spec, "submissionMode", "Job"), "'Job' is none of"),
    "no entrypoint": (drop(spec, "entrypoint"), "entrypoint: is missing"),
    "empty entrypoint": (put(spec, "entrypoint", ""), "entrypoint: is missing"),
    "no cluster": (drop(spec, "rayClusterSpec"), "needs rayClusterSpec"),
    "negative retries": (put(spec, "backoffLimit", -1), "backoffLimit: is -1"),
    "no deadline": (put(spec, "activeDeadlineSeconds", 0), "activeDeadlineSeconds"),
    "start deadline": (put(spec, "preRunningDeadlineSeconds", 0), "preRunningDeadlineSeconds"),
    "ttl without shutdown": (put(spec, "shutdownAfterJobFinishes", False), "ttlSeconds"),
    "runtime env": (put(spec, "runtimeEnvYAML", "a: [b"), "runtimeEnvYAML: no valid YAML"),
    "runtime env list": (put(spec, "runtimeEnvYAML", "[pip]"), "runtimeEnvYAML: is a mapping"),
    "managedBy": (put(spec, "managedBy", "me"), "managedBy: is ray.io/kuberay-operator or"),
    "half a deletion strategy": (
        put(spec, "deletionStrategy", {"onSuccess": {"policy": "DeleteNone"}}),
        "needs both onSuccess and onFailure",
    ),
    "deletion condition": (
        put(
            spec,
            "deletionStrategy",
            {"deletionRules": [{"policy": "DeleteSelf", "condition": {"ttlSeconds": 1}}]},
        ),
        "deletionRules[0].condition: one of jobStatus",
    ),
    "min over max": (put(group, "minReplicas", 9), "minReplicas: is 9, more than maxReplicas: 4"),
    "negative min": (put(group, "minReplicas", -1), "minReplicas: is negative"),
    "replicas over max": (put(group, "replicas", 9), "replicas: is 9, not within"),
    "group twice": (
        lambda job: cluster(job)["workerGroupSpecs"].append(copy.deepcopy(group(job))),
        "'gpu' is there twice",
    ),
    "no group name": (drop(group, "groupName"), "groupName"),
    "no container": (
        lambda job: group(job)["template"]["spec"].update(containers=[]),
        "a pod needs a container",
    ),
    "another ray": (put(cluster, "rayVersion", "2.46.0"), "has Ray 2.60.0, rayVersion is 2.46.0"),
    "tokens of an old ray": (
        lambda job: (
            put(cluster, "rayVersion", "2.40.0")(job),
            put(container, "image", "rayproject/ray:2.40.0")(job),
        ),
        "tokens need 2.52.0",
    ),
    "token without version": (drop(cluster, "rayVersion"), "rayVersion: is needed"),
    "auth mode": (put(cluster, "authOptions", {"mode": "password"}), "password"),
    "k8s token": (
        put(cluster, "authOptions", {"mode": "token", "enableK8sTokenAuth": True}),
        "enableK8sTokenAuth is not for jobs",
    ),
    "quantity": (
        lambda job: container(job)["resources"]["limits"].update(memory="48 GB"),
        "'48 GB' is no quantity",
    ),
    "request over limit": (
        lambda job: container(job)["resources"]["requests"].update(cpu="9"),
        "requests.cpu: is more than its limit",
    ),
    "half a gpu": (
        lambda job: container(job)["resources"]["limits"].update({"nvidia.com/gpu": "500m"}),
        "is a whole number",
    ),
    "mount of no volume": (
        lambda job: container(job)["volumeMounts"].append({"name": "x", "mountPath": "/x"}),
        "there is no volume 'x'",
    ),
    "grace too short": (
        lambda job: group(job)["template"]["spec"].update(terminationGracePeriodSeconds=60),
        "takes 105 s, the pod's grace is 60 s",
    ),
    "too many workers": (
        put(
            spec,
            "entrypoint",
            "prioritycut train vox256 storage=s3://b/r data.url=s3://b/d "
            "train.workers=8 train.use_gpu=yes",
        ),
        "train.workers=8 of 1 CPU and a GPU each: the worker groups have room for 4",
    ),
    "no gpus": (
        lambda job: [side.pop("nvidia.com/gpu") for side in container(job)["resources"].values()],
        "room for 0",
    ),
    "storage of one pod": (
        put(spec, "entrypoint", "prioritycut train vox256 data.url=s3://b/d"),
        "storage=runs is a path within each pod",
    ),
    "misspelt key of the config": (
        put(spec, "entrypoint", "prioritycut train vox256 train.worker=4"),
        "did you mean 'train.workers'",
    ),
    "unknown verb": (put(spec, "entrypoint", "prioritycut trian vox256"), "is prioritycut train"),
    "open quote": (put(spec, "entrypoint", "prioritycut train 'vox256"), "no valid command line"),
    "long name": (put(metadata, "name", "a" * 48), "has 48 characters, a RayJob at most 47"),
    "no DNS label": (put(metadata, "name", "1_train"), "is no DNS label"),
    "no name": (drop(metadata, "name"), "an object needs a name"),
    "kueue and autoscaling": (
        lambda job: (
            put(cluster, "enableInTreeAutoscaling", True)(job),
            metadata(job)["labels"].update({"kueue.x-k8s.io/queue-name": "q"}),
        ),
        "Kueue admits clusters of a fixed size only",
    ),
    "restart with autoscaler v2": (
        lambda job: (
            put(cluster, "enableInTreeAutoscaling", True)(job),
            group(job)["template"]["spec"].update(restartPolicy="Always"),
        ),
        "restartPolicy: is Never",
    ),
    "more CPUs than the container": (
        put(group, "rayStartParams", {"num-cpus": "16"}),
        "is 16, more than the container's limit 8",
    ),
    "labels of rayStartParams": (
        put(group, "rayStartParams", {"labels": "a=b"}),
        "use the group's labels",
    ),
    "redis by hand": (
        lambda job: head(job)["template"]["spec"]["containers"][0]["env"].append(
            {"name": "RAY_REDIS_ADDRESS", "value": "redis:6379"}
        ),
        "needs gcsFaultToleranceOptions",
    ),
    "rocksdb with redis": (
        put(cluster, "gcsFaultToleranceOptions", {"backend": "rocksdb", "redisAddress": "r:1"}),
        "backend rocksdb has no redisAddress",
    ),
    "sidecar with submitter": (put(spec, "submissionMode", "SidecarMode"), "SidecarMode has no"),
    "interactive and retried": (
        put(spec, "submissionMode", "InteractiveMode"),
        "InteractiveMode is not retried",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_named(mistake: str) -> None:
    change, fragment = MISTAKES[mistake]
    job = train_job()
    assert problems(job) == ""
    change(job)
    assert fragment in problems(job)


@pytest.mark.parametrize(
    ("text", "fragment"),
    [
        ("", "holds no object"),
        ("a: [", "no valid YAML"),
        ("- 1", "is a mapping, not list"),
        ("kind: Pod", "needs apiVersion and kind"),
        ("apiVersion: v1\nkind: Pod\nkind: Pod\n", "'kind' is given twice"),
        ("apiVersion: v1\n1: 2\n", "'1' is no text"),
        ("apiVersion: ray.io/v1alpha1\nkind: RayJob\n", "is ray.io/v1, not ray.io/v1alpha1"),
        ("apiVersion: ray.io/v1\nkind: RayJobs\n", "KubeRay has no kind RayJobs"),
        ("apiVersion: batch/v2\nkind: Job\n", "has no Job in batch/v2"),
    ],
)
def test_a_text_that_holds_no_manifest_is_named(text: str, fragment: str) -> None:
    assert fragment in "\n".join(str(problem) for problem in check_text(text))


@pytest.mark.parametrize(
    ("key", "value", "fragment"),
    [
        ("schedule", "17 2 * *", "has not the five fields"),
        ("schedule", "99 2 * * *", "is no schedule"),
        ("concurrencyPolicy", "Forbidden", "is none of Allow, Forbid, Replace"),
        ("concurencyPolicy", "Forbid", "concurencyPolicy"),
    ],
)
def test_mistakes_of_a_schedule_are_named(key: str, value: str, fragment: str) -> None:
    cron = objects("cronjob-retrain.yaml")[1]
    cron["spec"][key] = value
    assert fragment in problems(cron)


def test_a_job_within_a_config_map_is_checked() -> None:
    manifest = objects("cronjob-retrain.yaml")[0]
    text = manifest["data"]["rayjob.yaml"]
    manifest["data"]["rayjob.yaml"] = text.replace("K8sJobMode", "Job")
    assert "data[rayjob.yaml] RayJob/prioritycut-retrain" in problems(manifest)


def test_random_damage_is_told_and_never_crashes_the_check() -> None:
    rng = random.Random(0)
    told = 0
    junk: list[Any] = [None, "", "x", -1, 10**30, 1.5, True, [], {}, [None], {"a": None}]
    for _ in range(150):
        job = train_job()
        places = list(_places(job))
        for tree, key in rng.sample(places, k=rng.randint(1, 3)):
            tree[key] = rng.choice(junk)
        told += bool(check_text(yaml.safe_dump(job)))
    assert told > 100, "most damage is noticed"


def _places(tree: Any) -> Iterator[tuple[Any, Any]]:
    items = tree.items() if isinstance(tree, dict) else enumerate(tree)
    for key, value in items:
        yield tree, key
        if isinstance(value, dict | list):
            yield from _places(value)


def test_damaged_text_never_crashes_the_check() -> None:
    rng = random.Random(1)
    text = RENDERED["rayjob-train.yaml"]
    for _ in range(60):
        start = rng.randrange(len(text))
        damage = "".join(rng.choices("{}[]:-&*!|>'\"%@`#\t\n ~aé\x00", k=rng.randint(1, 4)))
        check_text(text[:start] + damage + text[start + rng.randint(0, 20) :])


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"missing\.yaml"):
        check_file(tmp_path / "missing.yaml")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match=r"binary\.yaml: no UTF-8"):
        check_file(tmp_path / "binary.yaml")


@pytest.mark.parametrize(
    ("text", "amount"),
    [
        ("500m", 0.5),
        ("2", 2),
        ("1.5", 1.5),
        ("1Ki", 1024),
        ("1k", 1000),
        ("1e3", 1000),
        ("1E", 1e18),
    ],
)
def test_quantities(text: str, amount: float) -> None:
    parsed = parse_quantity(text)
    assert parsed is not None
    assert float(parsed) == amount


@pytest.mark.parametrize("text", ["", "1 Gi", "Gi", "1GB", "-", None, [], "1e99999"])
def test_no_quantities(text: Any) -> None:
    assert parse_quantity(text) is None


def test_every_type_of_the_facts_is_known() -> None:
    facts = schema.facts()
    for fields in facts.types.values():
        for kind in fields.values():
            name = kind.rstrip("*")
            assert (
                name.startswith("io.k8s.")
                or name in schema.SCALARS
                or name in (facts.schema["$defs"])
            ), name
