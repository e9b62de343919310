"""The options of the manifests.

``prioritycut k8s render --show-options`` shows the docstrings of the fields to users.
"""

import re
import textwrap
from collections.abc import Callable, Sequence
from pathlib import PurePath
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

import yaml
from pydantic import (
    AfterValidator,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    model_validator,
)

from prioritycut_ray.config import Count, Section, load_config, load_section
from prioritycut_ray.errors import UserError
from prioritycut_ray.kubernetes.cron import schedule_problem, time_zone_problem
from prioritycut_ray.kubernetes.syntax import FORMATS

RAY_VERSION = "2.60.0"
"""The Ray version of the image and the manifests. A test compares it with the Dockerfile."""
PLACEHOLDER = "registry.example.com/"
"""Prefix of the placeholder image in cluster/, which cannot be pulled."""


def image_ray_version(image: str) -> str | None:
    """Return the Ray version in an image's tag: ``…-ray2.60.0-cpu``, ``rayproject/ray:2.60.0``."""
    name, _, tag = image.rsplit("/", 1)[-1].partition(":")
    match = re.search(r"ray[-_]?(\d+\.\d+\.\d+)", tag)
    if match is None and name in ("ray", "ray-ml"):
        match = re.match(r"(\d+\.\d+\.\d+)", tag)
    return match[1] if match else None


# Types.


def _no_problem(problem_of: Callable[[str], str | None]) -> AfterValidator:
    def check(text: str) -> str:
        problem = problem_of(text)
        if problem:
            raise ValueError(problem)
        return text

    return AfterValidator(check)


def _format(name: str) -> AfterValidator:
    """A string in one of Kubernetes' formats."""
    syntax = FORMATS[name]
    return _no_problem(lambda text: None if syntax.matches(text) else f"is not {syntax.expected}")


def _written(pattern: str, expected: str) -> AfterValidator:
    """A string that matches a pattern."""
    return _no_problem(lambda text: None if re.fullmatch(pattern, text) else f"is not {expected}")


def _image_problem(image: str) -> str | None:
    name = image.rsplit("/", 1)[-1].partition(":")[0]
    place = image.removesuffix(image.rsplit("/", 1)[-1]) + name
    if not FORMATS["image"].matches(image) or place != place.lower():
        return f"is not {FORMATS['image'].expected}"
    if image_ray_version(image) is None:
        return (
            "has no Ray version in its tag; name it as in "
            f"prioritycut-ray:0.1.0-ray{RAY_VERSION}-cpu"
        )
    return None


def _endpoint_problem(url: str) -> str | None:
    try:
        parts = urlsplit(url)
        right = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:  # no such port
        right = False
    if right and parts.path in ("", "/") and not parts.query:
        return None
    return "is not http(s)://HOST or http(s)://HOST:PORT"


def _address_problem(address: str) -> str | None:
    match = re.fullmatch(r"[^\s:/]+:(\d{1,5})", address)
    return None if match and 1 <= int(match[1]) <= 65535 else "is not HOST:PORT"


def _as_text(value: Any) -> Any:
    """Convert numbers to strings: YAML parses some strings as numbers."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return str(value) if is_number else value


def _as_words(value: Any) -> Any:
    return [word.strip() for word in value.split(",")] if isinstance(value, str) else value


_NUMBER_AS_TEXT = BeforeValidator(_as_text)
_BUCKET = r"s3://[a-z0-9][a-z0-9.-]+(/[^/\s]+)*"
_FOLDER = r"(/[^/\s:]+)+"
Name = Annotated[
    str,
    _written(
        "[a-z]([-a-z0-9]{0,26}[a-z0-9])?",
        "a name of at most 28 characters: a-z, 0-9 and -, starting with a letter",
    ),
]
"""Short enough for the suffixes that KubeRay appends."""
Label = Annotated[str, _format("dns-label")]
ObjectName = Annotated[str, _format("dns-subdomain")]
LabelKey = Annotated[str, _format("qualified-name")]
AnnotationKey = Annotated[str, _format("annotation-key")]
Text = Annotated[str, _NUMBER_AS_TEXT]
LabelValue = Annotated[str, _NUMBER_AS_TEXT, _format("label-value")]
LabelValues = Annotated[tuple[LabelValue, ...], BeforeValidator(_as_words), Field(min_length=1)]
VariableName = Annotated[
    str, _written("[A-Za-z_][A-Za-z0-9_]*", "a variable name: letters, digits and _")
]
MountPath = Annotated[str, _written(_FOLDER, "an absolute path")]
Port = Annotated[int, Field(ge=1, le=65535)]
Image = Annotated[str, _no_problem(_image_problem)]
Storage = Annotated[
    str,
    _written(
        f"{_BUCKET}|{_FOLDER}",
        "s3://BUCKET or s3://BUCKET/FOLDER (bucket names are lower case), nor an absolute path in "
        "one of `volumes`; the image contains only the S3 driver (s3fs)",
    ),
]


# Sections.


class OptionsSection(Section):
    """A section whose field docstrings are shown to users."""

    model_config = ConfigDict(use_attribute_docstrings=True)


class SecretKey(OptionsSection):
    """A value from a secret."""

    secret: ObjectName
    key: Annotated[str, _format("config-key")]


Variables = dict[
    VariableName,
    Annotated[
        Annotated[Text, Tag("text")] | Annotated[SecretKey, Tag("secret")],
        Discriminator(lambda value: "secret" if isinstance(value, dict | SecretKey) else "text"),
    ],
]


class VolumeOptions(OptionsSection):
    """A volume and its mount path. Exactly one source must be set."""

    path: MountPath
    claim: ObjectName | None = None
    """A PersistentVolumeClaim. All nodes mount it, so its access mode must be ReadWriteMany."""
    config_map: ObjectName | None = None
    secret: ObjectName | None = None
    size_gib: Count | None = None
    """An empty folder on the node's disk, for `data.cache_dir`."""
    read_only: bool = False

    @model_validator(mode="after")
    def _check(self) -> "VolumeOptions":
        if sum(map(bool, (self.claim, self.config_map, self.secret, self.size_gib))) != 1:
            raise ValueError("needs exactly one of claim, config_map, secret and size_gib")
        if self.path in ("/dev/shm", "/tmp", "/home/ray", "/opt/venv"):
            raise ValueError(f"path={self.path} would hide files of the image; use another path")
        return self


class PodOptions(OptionsSection):
    """Resources and placement of a Ray pod."""

    cpus: Count
    """CPUs: requests and limits are equal."""
    memory_gib: Count
    """Memory in GiB: requests and limits are equal."""
    shm_gib: Count
    """Size of /dev/shm, for Ray's object store and the loader's frames; part of memory_gib."""
    object_store_gib: Annotated[float, Field(ge=0.1)] = 0.5
    """Part of /dev/shm for Ray's object store; by default Ray would use nearly all of it."""
    gpus: Annotated[int, Field(ge=0)] = 0
    """GPUs of each pod."""
    env: Variables = Field(default_factory=dict)
    """Environment variables, such as NCCL_SOCKET_IFNAME: eth0, or from a secret:
    {secret: NAME, key: KEY}."""
    labels: dict[LabelKey, LabelValue] = Field(default_factory=dict)
    """Additional labels of these pods."""
    annotations: dict[AnnotationKey, Text] = Field(default_factory=dict)
    """Additional annotations of these pods."""
    node_selector: dict[LabelKey, LabelValues] = Field(default_factory=dict)
    """Labels that nodes must have, with one or more allowed values, as in
    topology.kubernetes.io/zone: [europe-west4-a, europe-west4-b]."""
    tolerations: dict[LabelKey, LabelValue] = Field(default_factory=dict)
    """Taints to tolerate: key and value. An empty value tolerates any value."""
    priority_class: ObjectName | None = None
    """Name of a PriorityClass."""
    runtime_class: ObjectName | None = None
    """Name of a RuntimeClass, such as nvidia."""

    @model_validator(mode="after")
    def _check(self) -> "PodOptions":
        if self.shm_gib >= self.memory_gib:
            raise ValueError(
                f"shm_gib={self.shm_gib} is part of memory_gib={self.memory_gib}; decrease it"
            )
        if self.object_store_gib >= self.shm_gib:
            raise ValueError(
                f"object_store_gib={self.object_store_gib:g} is part of shm_gib={self.shm_gib}, "
                "which the data loader needs too; decrease it"
            )
        return self


class HeadOptions(PodOptions):
    """The head: Ray's control plane and the drivers."""

    cpus: Count = 4
    memory_gib: Count = 16
    shm_gib: Count = 4


class WorkerOptions(PodOptions):
    """A worker."""

    cpus: Count = 8
    memory_gib: Count = 48
    shm_gib: Count = 12
    gpus: Annotated[int, Field(ge=0)] = 1
    same_zone: Literal["no", "preferred", "required"] = "preferred"
    """Whether all workers of a cluster run in one zone; clouds charge for traffic between zones."""


class JobOptions(OptionsSection):
    """The training of a training job."""

    config: str = "vox256"
    """A shipped configuration, or a configuration file in the image."""
    overrides: tuple[str, ...] = ()
    """Changes to it, as in [train.samples=1000000]."""

    @model_validator(mode="after")
    def _check(self) -> "JobOptions":
        try:
            load_config(self.config, self.overrides)
        except UserError as error:
            raise ValueError(str(error)) from error
        return self


class EgressOptions(OptionsSection):
    """An additional destination that pods may reach."""

    cidr: Annotated[str, _format("cidr")]
    ports: tuple[Port, ...] = ()
    """TCP ports; an empty list allows all."""


class NetworkOptions(OptionsSection):
    """Egress that the network policy allows besides DNS, HTTPS, the storage and Redis."""

    api_server_ports: tuple[Port, ...] = (443, 6443)
    """Ports of the API server, for autoscaling and the nightly job."""
    pod_identity: Literal["eks", "gke"] | None = None
    """Cloud whose agent on the node serves credentials to pods. Not needed for IRSA on EKS."""
    egress: tuple[EgressOptions, ...] = ()
    """Other destinations, as in [{cidr: 10.0.0.0/8, ports: [3128]}]."""


class HistoryOptions(OptionsSection):
    """KubeRay's history server: a collector beside every Ray container."""

    collector: str
    """Image of the collector container."""
    env: dict[VariableName, Text] = Field(default_factory=dict)
    """Environment variables of the collector, which say where it writes."""


class ManifestOptions(OptionsSection):
    """All options of the manifests."""

    name: Name = "prioritycut"
    """Prefix of the names of all objects."""
    namespace: Label = "prioritycut"
    """Namespace of all objects; it must exist."""
    image: Image = f"{PLACEHOLDER}prioritycut-ray:0.1.0-ray{RAY_VERSION}-cu126"
    """Image of head, workers and submitter; its tag names its Ray version."""
    image_pull_secrets: tuple[ObjectName, ...] = ()
    """Names of secrets with the registry's credentials."""
    storage: Storage = "s3://prioritycut"
    """Bucket or a folder in it, for data/, runs/ and models/; or a folder in one of `volumes`."""
    storage_endpoint: Annotated[str, _no_problem(_endpoint_problem)] | None = None
    """Endpoint of an S3 service other than AWS, such as http://minio:9000."""
    volumes: dict[Label, VolumeOptions] = Field(default_factory=dict)
    """Volumes of head, workers and TensorBoard by name, as in
    cache: {path: /cache, size_gib: 100} or sets: {path: /sets, claim: datasets}."""

    train: JobOptions = JobOptions()
    """The training of a training job."""
    tune: str = "tune_configs/ablation.yaml"
    """Search file of a search job; a file in the image."""
    retrain: str = "retrain.yaml"
    """Settings of the nightly retraining; a file in the image."""
    schedule: Annotated[str, _no_problem(schedule_problem)] = "17 2 * * *"
    """Schedule of the retraining: a five-field cron expression."""
    time_zone: Annotated[str, _no_problem(time_zone_problem)] = "Etc/UTC"
    """Time zone of the schedule, such as Europe/Berlin."""
    ray_cron_job: bool = False
    """Also render a RayCronJob, which is alpha, needs a feature gate, and may run two nights at
    once."""
    max_hours: Count = 72
    """Time limit of each attempt; a job that exceeds it fails and is not retried."""
    retries: Annotated[int, Field(ge=0)] = 3
    """How often a failed job is retried. Each attempt gets a new cluster and resumes the run."""
    submission: Literal["K8sJobMode", "SidecarMode"] = "K8sJobMode"
    """With SidecarMode the submitter runs in the head's pod, and a job that loses its head is
    retried."""

    head: HeadOptions = HeadOptions()
    """Pod of Ray's control plane and the drivers. Nothing is trained there."""
    worker: WorkerOptions = WorkerOptions()
    """Pods of the workers."""
    min_workers: Annotated[int, Field(ge=0)] = 0
    """Minimum number of worker pods of autoscaling clusters."""
    max_workers: Count = 4
    """Maximum number of worker pods. Training and search use all of them."""
    grace_seconds: Annotated[int, Field(ge=45)] = 120
    """Termination grace period of pods, in which a checkpoint is saved."""
    spot: bool = True
    """Whether workers may run on spot instances."""

    env: Variables = Field(default_factory=dict)
    """Environment variables of all containers that run the image, such as HTTPS_PROXY."""
    labels: dict[LabelKey, LabelValue] = Field(default_factory=dict)
    """Labels of all pods."""
    annotations: dict[AnnotationKey, Text] = Field(default_factory=dict)
    """Annotations of all pods, such as sidecar.istio.io/inject: "false"."""
    service_account_annotations: dict[AnnotationKey, Text] = Field(default_factory=dict)
    """Annotations of the pods' service accounts, such as eks.amazonaws.com/role-arn."""
    network: NetworkOptions = NetworkOptions()
    """Egress that the network policy allows besides DNS, HTTPS, the storage and Redis."""

    queue: Label | None = None
    """Name of a Kueue LocalQueue. Clusters then have a fixed size."""
    scheduler: Literal["default", "volcano"] = "default"
    """Volcano must be enabled in the operator (helm: batchScheduler.name=volcano)."""
    redis: Annotated[str, _no_problem(_address_problem)] | None = None
    """HOST:PORT of a Redis, with which a cluster survives the loss of its head. The password is in
    the secret NAME-redis, key password."""
    history: HistoryOptions | None = None
    """Collector of KubeRay's history server, as in {collector: IMAGE, env: {...}}."""
    operator_namespace: Label = "kuberay-operator"
    """Namespace of KubeRay's operator, which the network policy allows to connect."""

    @model_validator(mode="after")
    def _check(self) -> "ManifestOptions":
        if self.min_workers > self.max_workers:
            raise ValueError(
                f"min_workers={self.min_workers} is greater than max_workers={self.max_workers}"
            )
        if self.queue and self.scheduler == "volcano":
            raise ValueError("queue (Kueue) and scheduler=volcano are mutually exclusive: drop one")
        if self.queue and self.ray_cron_job:
            raise ValueError(
                "ray_cron_job and queue are mutually exclusive: jobs of a RayCronJob have no labels"
            )
        paths = [volume.path for volume in self.volumes.values()]
        if "shm" in self.volumes or len(set(paths)) != len(paths):
            raise ValueError("volumes: paths must be unique, and the name shm is reserved")
        if self.storage.startswith("/") and not self.has_mounted(self.storage):
            raise ValueError(f"storage={self.storage} is not a folder in one of `volumes`")
        return self

    def has_mounted(self, path: str) -> bool:
        """Return whether a path is in one of the volumes."""
        return any(PurePath(path).is_relative_to(volume.path) for volume in self.volumes.values())

    @property
    def ports_of_services(self) -> list[int]:
        """The ports of the storage endpoint and of Redis."""
        ports = []
        if self.storage_endpoint:
            parts = urlsplit(self.storage_endpoint)
            ports.append(parts.port or {"http": 80, "https": 443}[parts.scheme])
        if self.redis:
            ports.append(int(self.redis.rpartition(":")[2]))
        return ports


def load_options(file: str | None, overrides: Sequence[str]) -> ManifestOptions:
    """Return the options: the defaults, changed by a YAML file and by ``key=value`` words.

    Raises:
        UserError: a key or a value is invalid.
    """
    return load_section(ManifestOptions, file, overrides)


def describe_options(options: Section) -> str:
    """Return the options as YAML with comments, as the start of an options file."""
    lines = []
    for key in type(options).model_fields:
        value, comment = getattr(options, key), comment_of(type(options), key)
        lines += textwrap.wrap(comment, 96, initial_indent="# ", subsequent_indent="# ")
        if isinstance(value, Section):
            lines += [f"{key}:", textwrap.indent(describe_options(value), "  ").rstrip()]
        else:
            plain = options.model_dump(mode="json", include={key})
            lines.append(yaml.safe_dump(plain, sort_keys=False, width=100).rstrip())
    return "\n".join(lines) + "\n"


def comment_of(section: type[Section], key: str) -> str:
    """Return the docstring of an option, or that of the class which the section extends."""
    fields = (getattr(kind, "model_fields", {}).get(key) for kind in section.__mro__)
    return next((field.description for field in fields if field and field.description), "")
