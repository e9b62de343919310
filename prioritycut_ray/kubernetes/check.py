"""What is wrong with a manifest, found without a cluster.

Three layers: the closed schemas (KubeRay's here, Kubernetes' from ``kubernetes-validate``), the CEL
rules of KubeRay, and what only the operator, the API server or a failing job would say otherwise:
these follow ``ValidateRayClusterSpec`` and ``ValidateRayJobSpec`` of KubeRay v1.7.
"""

import re
import shlex
from collections.abc import Iterator, Mapping
from decimal import Decimal
from pathlib import Path
from typing import Any, NamedTuple

import kubernetes_validate
import yaml
from croniter import croniter

from prioritycut_ray.config import Config, load_config
from prioritycut_ray.errors import UserError
from prioritycut_ray.kubernetes import schema
from prioritycut_ray.kubernetes.options import image_ray_version

Object = Mapping[str, Any]


class Problem(NamedTuple):
    """Something wrong at one place of a manifest."""

    where: str
    """Object and path, such as ``RayJob/train spec.entrypoint``."""
    message: str

    def __str__(self) -> str:
        return f"{self.where}: {self.message}"


def check_file(path: Path) -> list[Problem]:
    """All problems of a file of manifests.

    Raises:
        UserError: the file cannot be read.
    """
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "no UTF-8 text"
        raise UserError(f"{path}: {reason}; give a YAML file of manifests") from error
    return check_text(text)


def check_text(text: str) -> list[Problem]:
    """All problems of a text of one or more YAML documents."""
    try:
        documents = [document for document in yaml.load_all(text, _Loader) if document is not None]
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        return [Problem("file", f"no valid YAML: {' '.join(str(error).split())}")]
    if not documents:
        return [Problem("file", "holds no object")]
    return [problem for document in documents for problem in _check_document(document)]


class _Loader(yaml.SafeLoader):
    """Refuses what PyYAML lets pass in silence: a key given twice, a key that is no text."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """A mapping of texts, each once."""
        seen: set[str] = set()
        for key, _ in node.value:
            if key.tag == "tag:yaml.org,2002:merge":
                continue
            if key.tag != "tag:yaml.org,2002:str":
                raise yaml.constructor.ConstructorError(
                    problem=f"the key {key.value!r} is no text", problem_mark=key.start_mark
                )
            if key.value in seen:
                raise yaml.constructor.ConstructorError(
                    problem=f"the key {key.value!r} is given twice", problem_mark=key.start_mark
                )
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def _check_document(document: Any) -> Iterator[Problem]:
    if not isinstance(document, dict):
        yield Problem("file", f"an object is a mapping, not {type(document).__name__}")
        return
    kind, version = document.get("kind"), document.get("apiVersion")
    if not isinstance(kind, str) or not isinstance(version, str):
        yield Problem("file", "an object needs apiVersion and kind, both as text")
        return
    metadata = document.get("metadata")
    name = metadata.get("name") if isinstance(metadata, dict) else None
    title = f"{kind}/{name}"
    is_ray = version.split("/")[0] == "ray.io"
    shape = _shape_of_ray(kind, version, document) if is_ray else _shape_of_core(document)
    wrong = False
    for path, message in shape:
        wrong = True
        yield Problem(f"{title} {path}".rstrip(), message)
    if wrong:  # the rules below rely on the shape
        return
    for path, message in _rules(kind, document):
        yield Problem(f"{title} {path}".rstrip(), message)


Finding = tuple[str, str]
"""Path and message."""


def _shape_of_ray(kind: str, version: str, document: dict[str, Any]) -> Iterator[Finding]:
    if kind not in schema.KINDS:
        yield "kind", f"KubeRay has no kind {kind}, but {', '.join(schema.KINDS)}"
    elif version != "ray.io/v1":
        yield "apiVersion", f"is ray.io/v1, not {version}"
    else:
        for error in schema.errors(kind, document):
            yield _dotted(error.absolute_path), error.message


def _shape_of_core(document: dict[str, Any]) -> Iterator[Finding]:
    version = schema.facts().kubernetes
    try:
        kubernetes_validate.validate(document, version, strict=True)
    except kubernetes_validate.ValidationError as error:
        yield _dotted(error.absolute_path), error.message
    except kubernetes_validate.SchemaNotFoundError:
        yield "kind", f"Kubernetes {version} has no {document['kind']} in {document['apiVersion']}"


def _dotted(path: Any) -> str:
    words = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path)
    return words.lstrip(".")


def _rules(kind: str, document: Object) -> Iterator[Finding]:
    yield from _metadata_rules(kind, document.get("metadata") or {})
    spec = document.get("spec") or {}
    match kind:
        case "RayCluster":
            yield from schema.broken_rules(kind, document)
            yield from _cluster_rules(spec, "spec", document["metadata"])
        case "RayJob":
            yield from schema.broken_rules(kind, document)
            yield from _job_rules(spec, "spec", document["metadata"])
        case "RayCronJob":
            yield from schema.broken_rules(kind, document)
            yield from _schedule_rules(spec)
            yield from _job_rules(spec["jobTemplate"], "spec.jobTemplate", document["metadata"])
        case "RayService":
            yield from schema.broken_rules(kind, document)
            cluster = spec.get("rayClusterConfig")
            if cluster:
                yield from _cluster_rules(cluster, "spec.rayClusterConfig", document["metadata"])
        case "CronJob":
            yield from _cron_job_rules(spec)
        case "Job" | "Deployment" | "StatefulSet" | "DaemonSet":
            yield from _pod_rules(spec.get("template") or {}, "spec.template")
        case "Pod":
            yield from _pod_rules(document, "")
        case "ConfigMap":
            for key, text in (document.get("data") or {}).items():
                holds_object = re.search("^apiVersion:", text or "", re.MULTILINE)
                if key.endswith((".yaml", ".yml")) and holds_object:
                    for where, message in check_text(text):
                        yield f"data[{key}] {where}", message


_LONGEST_NAME = {"RayCluster": 53, "RayJob": 47, "RayService": 47, "RayCronJob": 52, "CronJob": 52}
"""What the operator and the API server leave for the names of what they create."""


def _metadata_rules(kind: str, metadata: Object) -> Iterator[Finding]:
    name, generated = metadata.get("name"), metadata.get("generateName")
    if not name and not generated:
        yield "metadata.name", "an object needs a name"
    elif kind in _LONGEST_NAME:
        text, longest = name or generated or "", _LONGEST_NAME[kind]
        if len(text) > longest:
            yield "metadata.name", f"has {len(text)} characters, a {kind} at most {longest}"
        if not re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", text.rstrip("-") if generated else text):
            yield "metadata.name", f"{text!r} is no DNS label: a-z, 0-9 and -, a letter first"


# KubeRay's jobs.

_SUBMISSION_MODES = ("K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode")


def _job_rules(spec: Object, path: str, metadata: Object) -> Iterator[Finding]:
    mode = spec.get("submissionMode", "K8sJobMode")
    selector, cluster = spec.get("clusterSelector") or {}, spec.get("rayClusterSpec")
    retries = spec.get("backoffLimit", 0)
    if mode not in _SUBMISSION_MODES:
        yield f"{path}.submissionMode", f"{mode!r} is none of {', '.join(_SUBMISSION_MODES)}"
    if not spec.get("entrypoint") and mode != "InteractiveMode":
        yield f"{path}.entrypoint", "is missing: the job would run nothing"
    if not cluster and not selector:
        yield path, "needs rayClusterSpec, or clusterSelector for a cluster that exists"
    if cluster and selector:
        yield f"{path}.clusterSelector", "a job has its own cluster or selects one: drop one"
    if selector and not selector.get("ray.io/cluster"):
        yield f"{path}.clusterSelector", "must name the cluster under ray.io/cluster"
    if selector and retries:
        yield f"{path}.backoffLimit", "a job on a selected cluster is not retried"
    if mode == "InteractiveMode" and retries:
        yield f"{path}.backoffLimit", "InteractiveMode is not retried"
    if mode == "SidecarMode":
        for field in ("submitterPodTemplate", "submitterConfig", "clusterSelector"):
            if spec.get(field):
                yield f"{path}.{field}", "SidecarMode has no such thing"
    for field, least in (("backoffLimit", 0), ("activeDeadlineSeconds", 1)):
        if spec.get(field, least) < least:
            yield f"{path}.{field}", f"is {spec[field]}, at least {least} is needed"
    yield from _end_rules(spec, path)
    yield from _runtime_env_rules(spec, path)
    if spec.get("submitterPodTemplate"):
        yield from _pod_rules(spec["submitterPodTemplate"], f"{path}.submitterPodTemplate")
    if cluster:
        yield from _cluster_rules(cluster, f"{path}.rayClusterSpec", metadata)
        if (cluster.get("authOptions") or {}).get("enableK8sTokenAuth"):
            yield f"{path}.rayClusterSpec.authOptions", "enableK8sTokenAuth is not for jobs"
        yield from _entrypoint_rules(spec.get("entrypoint", ""), cluster, path)


def _end_rules(spec: Object, path: str) -> Iterator[Finding]:
    """What happens to the cluster when the job is over."""
    ends, ttl = spec.get("shutdownAfterJobFinishes", False), spec.get("ttlSecondsAfterFinished", 0)
    if ttl < 0:
        yield f"{path}.ttlSecondsAfterFinished", f"is {ttl}, at least 0 is needed"
    if ttl > 0 and not ends:
        yield f"{path}.ttlSecondsAfterFinished", "needs shutdownAfterJobFinishes: true"
    if spec.get("suspend") and not ends:
        yield f"{path}.suspend", "needs shutdownAfterJobFinishes: true"
    if spec.get("suspend") and spec.get("clusterSelector"):
        yield f"{path}.suspend", "a job on a selected cluster cannot wait"
    if ends and (spec.get("deletionStrategy") or {}).get("deletionRules"):
        yield f"{path}.deletionStrategy", "deletionRules and shutdownAfterJobFinishes: drop one"


def _runtime_env_rules(spec: Object, path: str) -> Iterator[Finding]:
    try:
        environment = yaml.safe_load(spec.get("runtimeEnvYAML", ""))
    except (yaml.YAMLError, ValueError) as error:
        yield f"{path}.runtimeEnvYAML", f"no valid YAML: {' '.join(str(error).split())}"
    else:
        if environment is not None and not isinstance(environment, dict):
            yield f"{path}.runtimeEnvYAML", "is a mapping"


def _schedule_rules(spec: Object) -> Iterator[Finding]:
    schedule = spec.get("schedule") or ""
    if not schedule.startswith("@") and len(schedule.split()) != 5:
        yield "spec.schedule", f"{schedule!r} has not the five fields of cron"
    elif not croniter.is_valid(schedule):
        yield "spec.schedule", f"{schedule!r} is no schedule of cron"


def _cron_job_rules(spec: Object) -> Iterator[Finding]:
    yield from _schedule_rules(spec)
    policy = spec.get("concurrencyPolicy", "Allow")
    if policy not in ("Allow", "Forbid", "Replace"):
        yield "spec.concurrencyPolicy", f"{policy!r} is none of Allow, Forbid, Replace"
    job = (spec.get("jobTemplate") or {}).get("spec") or {}
    path, pod = "spec.jobTemplate.spec.template", job.get("template") or {}
    restart = (pod.get("spec") or {}).get("restartPolicy")
    if restart not in ("Never", "OnFailure"):
        yield f"{path}.spec.restartPolicy", f"of a Job is Never or OnFailure, not {restart}"
    yield from _pod_rules(pod, path)


# Clusters.


def _cluster_rules(spec: Object, path: str, metadata: Object) -> Iterator[Finding]:
    head, groups = spec["headGroupSpec"], spec.get("workerGroupSpecs") or []
    grows = bool(spec.get("enableInTreeAutoscaling"))
    autoscaler = spec.get("autoscalerOptions") or {}
    yield from _group_rules(head, f"{path}.headGroupSpec", spec)
    names = [group["groupName"] for group in groups]
    for index, group in enumerate(groups):
        place = f"{path}.workerGroupSpecs[{index}]"
        if names.index(group["groupName"]) != index:
            yield f"{place}.groupName", f"{group['groupName']!r} is there twice"
        yield from _size_rules(group, place)
        if grows and group.get("suspend"):
            yield f"{place}.suspend", "a cluster that grows cannot suspend a group"
        yield from _group_rules(group, place, spec)
    if grows and autoscaler.get("version", "v2") == "v2":
        for place, template in _templates(spec, path):
            if (template.get("spec") or {}).get("restartPolicy", "Never") != "Never":
                yield f"{place}.spec.restartPolicy", "is Never with the autoscaler v2"
    if autoscaler.get("idleTimeoutSeconds", 0) < 0:
        yield f"{path}.autoscalerOptions.idleTimeoutSeconds", "is negative"
    labels = metadata.get("labels") or {}
    if grows and "kueue.x-k8s.io/queue-name" in labels:
        yield f"{path}.enableInTreeAutoscaling", "Kueue admits clusters of a fixed size only"
    yield from _version_rules(spec, path)
    yield from _fault_tolerance_rules(spec, path, metadata.get("annotations") or {})


def _templates(spec: Object, path: str) -> Iterator[tuple[str, Object]]:
    yield f"{path}.headGroupSpec.template", spec["headGroupSpec"]["template"]
    for index, group in enumerate(spec.get("workerGroupSpecs") or []):
        yield f"{path}.workerGroupSpecs[{index}].template", group["template"]


def _group_rules(group: Object, place: str, spec: Object) -> Iterator[Finding]:
    parameters = group.get("rayStartParams") or {}
    if group.get("resources") and {"num-cpus", "num-gpus", "memory", "resources"} & set(parameters):
        yield f"{place}.resources", "and the resources of rayStartParams exclude each other"
    if "labels" in parameters:
        yield f"{place}.rayStartParams.labels", "is not supported: use the group's labels"
    limits = _limits(_ray_container(group["template"]))
    for parameter, resource in (("num-cpus", "cpu"), ("num-gpus", "nvidia.com/gpu")):
        given, limit = parameters.get(parameter), limits.get(resource)
        if given is None:
            continue
        if not re.fullmatch(r"\d+(\.\d+)?", given):
            yield f"{place}.rayStartParams.{parameter}", f"{given!r} is no number"
        elif limit is not None and Decimal(given) > limit:
            yield (
                f"{place}.rayStartParams.{parameter}",
                f"is {given}, more than the container's limit {limit.normalize():f}",
            )
    yield from _pod_rules(group["template"], f"{place}.template")
    image, version = _ray_container(group["template"]).get("image") or "", spec.get("rayVersion")
    of_image = image_ray_version(image)
    if version and of_image and version != of_image:
        yield f"{place}.template", f"image {image} has Ray {of_image}, rayVersion is {version}"


def _size_rules(group: Object, place: str) -> Iterator[Finding]:
    least, most = group.get("minReplicas", 0), group.get("maxReplicas", 2**31 - 1)
    replicas = group.get("replicas")
    if least < 0:
        yield f"{place}.minReplicas", f"is negative: {least}"
    if least > most:
        yield f"{place}.minReplicas", f"is {least}, more than maxReplicas: {most}"
    elif replicas is not None and not least <= replicas <= most:
        yield f"{place}.replicas", f"is {replicas}, not within {least}..{most}"
    if group.get("numOfHosts", 1) < 1:
        yield f"{place}.numOfHosts", "is less than 1"


def _version_rules(spec: Object, path: str) -> Iterator[Finding]:
    version, auth = spec.get("rayVersion"), spec.get("authOptions")
    match = re.match(r"(\d+)\.(\d+)\.\d+", version or "")
    if version and not match:
        yield f"{path}.rayVersion", f"{version!r} is no version"
    if auth is None or auth.get("mode", "token") != "token":
        if auth and auth.get("enableK8sTokenAuth"):
            yield f"{path}.authOptions", "enableK8sTokenAuth needs mode: token"
        return
    if not version:
        yield f"{path}.rayVersion", "is needed with authOptions.mode token"
    elif match and (int(match[1]), int(match[2])) < (2, 52):
        yield f"{path}.rayVersion", f"is {version}, tokens need 2.52.0"


def _fault_tolerance_rules(spec: Object, path: str, annotations: Object) -> Iterator[Finding]:
    options = spec.get("gcsFaultToleranceOptions")
    head = spec["headGroupSpec"]
    variables = {item["name"] for item in _ray_container(head["template"]).get("env") or []}
    if options is None:
        if "RAY_REDIS_ADDRESS" in variables and not annotations.get("ray.io/ft-enabled"):
            yield f"{path}.headGroupSpec", "RAY_REDIS_ADDRESS needs gcsFaultToleranceOptions"
        return
    place = f"{path}.gcsFaultToleranceOptions"
    if annotations.get("ray.io/ft-enabled"):
        yield place, "and the annotation ray.io/ft-enabled exclude each other"
    for variable in sorted({"RAY_REDIS_ADDRESS", "REDIS_PASSWORD", "REDIS_USERNAME"} & variables):
        yield place, f"the head must not set {variable} beside it"
    if "redis-password" in (head.get("rayStartParams") or {}):
        yield place, "the head must not set redis-password beside it"
    redis = [field for field in options if field.startswith("redis")]
    if options.get("backend", "redis") == "rocksdb" and redis:
        yield place, f"backend rocksdb has no {', '.join(redis)}"
    if options.get("backend", "redis") == "redis" and "storage" in options:
        yield place, "storage is for the backend rocksdb"


# Pods.


def _pod_rules(template: Object, path: str) -> Iterator[Finding]:
    pod = template.get("spec") or {}
    place = f"{path}.spec".lstrip(".")
    if not pod.get("containers"):
        yield f"{place}.containers", "a pod needs a container"
    volumes = {volume["name"] for volume in pod.get("volumes") or []}
    for kind in ("initContainers", "containers"):
        for index, container in enumerate(pod.get(kind) or []):
            spot = f"{place}.{kind}[{index}]"
            yield from _resource_rules(container.get("resources") or {}, f"{spot}.resources")
            for mount in container.get("volumeMounts") or []:
                if mount["name"] not in volumes:
                    yield f"{spot}.volumeMounts", f"there is no volume {mount['name']!r}"
            yield from _grace_rules(container, pod, spot)


def _resource_rules(resources: Object, place: str) -> Iterator[Finding]:
    amounts: dict[str, dict[str, Decimal]] = {"requests": {}, "limits": {}}
    for side, parsed in amounts.items():
        for name, text in (resources.get(side) or {}).items():
            amount = parse_quantity(text)
            if amount is None:
                yield f"{place}.{side}.{name}", f"{text!r} is no quantity, such as 500m or 16Gi"
            else:
                parsed[name] = amount
    for name, request in amounts["requests"].items():
        if request > amounts["limits"].get(name, request):
            yield f"{place}.requests.{name}", "is more than its limit"
    for side, parsed in amounts.items():
        gpus = parsed.get("nvidia.com/gpu")
        if gpus is not None and gpus != int(gpus):
            yield f"{place}.{side}.nvidia.com/gpu", "is a whole number"


_SECONDS = re.compile(r"(?:\bsleep|--seconds|--deadline-remaining-seconds)[ =](\d+)")


def _grace_rules(container: Object, pod: Object, place: str) -> Iterator[Finding]:
    """A preStop hook that outlasts the pod's grace is cut off before its checkpoint is written."""
    hook = ((container.get("lifecycle") or {}).get("preStop") or {}).get("exec") or {}
    words = " ".join(word or "" for word in hook.get("command") or [])
    needed = max((int(seconds) for seconds in _SECONDS.findall(words)), default=0)
    grace = pod.get("terminationGracePeriodSeconds") or 30
    if needed >= grace:
        yield f"{place}.lifecycle.preStop", f"takes {needed} s, the pod's grace is {grace} s"


def _ray_container(template: Object) -> Object:
    containers = (template.get("spec") or {}).get("containers") or [{}]
    return containers[0] or {}


def _limits(container: Object) -> dict[str, Decimal]:
    resources = container.get("resources") or {}
    given = resources.get("limits") or resources.get("requests") or {}
    amounts = {name: parse_quantity(text) for name, text in given.items()}
    return {name: amount for name, amount in amounts.items() if amount is not None}


_QUANTITY = re.compile(r"([0-9]+(?:\.[0-9]*)?)([numkMGTPE]|[KMGTPE]i|[eE][0-9]+)?")
_SUFFIXES = {
    **{suffix: Decimal(1000) ** power for power, suffix in enumerate("num", start=-3)},
    **{suffix: Decimal(1000) ** power for power, suffix in enumerate("kMGTPE", start=1)},
    **{f"{suffix}i": Decimal(1024) ** power for power, suffix in enumerate("KMGTPE", start=1)},
}


def parse_quantity(text: Any) -> Decimal | None:
    """An amount in Kubernetes' notation (``500m``, ``16Gi``), or None if it is none."""
    match = _QUANTITY.fullmatch(str(text))
    if match is None:
        return None
    number, suffix = Decimal(match[1]), match[2] or ""
    if suffix[:1] in ("e", "E") and suffix[1:].isdigit():
        return number.scaleb(int(suffix[1:])) if len(suffix) < 5 else None
    return number * _SUFFIXES.get(suffix, Decimal(1))


# The command line of a job against its cluster.


def _entrypoint_rules(entrypoint: str, cluster: Object, path: str) -> Iterator[Finding]:
    """Whether the cluster holds what the job's configuration asks for."""
    place = f"{path}.entrypoint"
    try:
        words = shlex.split(entrypoint)
    except ValueError as error:
        yield place, f"no valid command line: {error}"
        return
    if words[:1] != ["prioritycut"]:
        return
    if len(words) < 3 or words[1] not in ("train", "tune", "retrain"):
        yield place, "is prioritycut train CONFIG, tune SEARCH or retrain CONFIG"
        return
    if words[1] != "train":
        return
    try:
        config = load_config(words[2], [word for word in words[3:] if not word.startswith("-")])
    except UserError as error:
        yield place, str(error)
        return
    yield from _storage_rules(config, cluster, place)
    yield from _capacity_rules(config, cluster, place)


def _storage_rules(config: Config, cluster: Object, place: str) -> Iterator[Finding]:
    mounts = [
        {mount["mountPath"] for mount in _ray_container(template).get("volumeMounts") or []}
        for _, template in _templates(cluster, "")
    ]
    for key, location in (("storage", config.storage), ("data.url", config.data.url)):
        shared = all(any(location.startswith(mount) for mount in paths) for paths in mounts)
        if "://" not in location and not shared:
            yield place, f"{key}={location} is a path within each pod: give a URL or mount it"


def _capacity_rules(config: Config, cluster: Object, place: str) -> Iterator[Finding]:
    train = config.train
    places, gpus = 0, train.use_gpu == "yes"
    for group in cluster.get("workerGroupSpecs") or []:
        offered = _offered(group)
        fit = [int(offered["cpu"] // train.cpus_per_worker)]
        fit += [int(offered["nvidia.com/gpu"])] if gpus else []
        places += min(fit) * group.get("maxReplicas", 0)
    if places < train.worker_range[0]:
        each = f"{train.cpus_per_worker} CPU{' and a GPU' if gpus else ''}"
        yield (
            place,
            f"train.workers={train.workers} of {each} each: the worker groups have room for "
            f"{places}; lower train.workers or train.cpus_per_worker, or enlarge the group",
        )


def _offered(group: Object) -> dict[str, Decimal]:
    limits, parameters = _limits(_ray_container(group["template"])), group.get("rayStartParams")
    offered = {}
    for resource, key in (("cpu", "num-cpus"), ("nvidia.com/gpu", "num-gpus")):
        amount = parse_quantity((parameters or {}).get(key, ""))
        offered[resource] = limits.get(resource, Decimal(0)) if amount is None else amount
    return offered
