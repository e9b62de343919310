"""What a user may choose about the manifests; everything else is decided by ``render``.

The docstrings of the fields are the comments of ``prioritycut k8s render --show-options``.
"""

import ipaddress
import re
import zoneinfo
from datetime import datetime
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from croniter import CroniterBadDateError, croniter
from pydantic import (
    AfterValidator,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    model_validator,
)

from prioritycut_ray.config import Count, Section, load_config
from prioritycut_ray.errors import UserError

RAY_VERSION = "2.60.0"
"""Of the image and of the manifests; the Dockerfile's ARG is the same, and a test keeps it so."""
PLACEHOLDER = "registry.example.com/"
"""Start of the image in cluster/, which nobody can pull."""


def image_ray_version(image: str) -> str | None:
    """The Ray version that an image's tag names: ``…-ray2.60.0-cpu``, ``rayproject/ray:2.60.0``."""
    name, _, tag = image.rsplit("/", 1)[-1].partition(":")
    match = re.search(r"ray[-_]?(\d+\.\d+\.\d+)", tag)
    if match is None and name in ("ray", "ray-ml"):
        match = re.match(r"(\d+\.\d+\.\d+)", tag)
    return match[1] if match else None


# Syntaxes.


def _check_image(image: str) -> str:
    if not re.fullmatch(r"[a-z0-9][a-z0-9._/-]*(:\d+/[a-z0-9._/-]+)?(:[\w.-]+)?(@\S+)?", image):
        raise ValueError(
            "is not an image name: give registry, name (lower case) and tag, as in "
            f"ghcr.io/me/prioritycut-ray:0.1.0-ray{RAY_VERSION}-cu126"
        )
    if image_ray_version(image) is None:
        raise ValueError(
            f"the tag must name its Ray version, as in prioritycut-ray:0.1.0-ray{RAY_VERSION}-cpu"
        )
    return image


def _check_storage(place: str) -> str:
    if re.fullmatch(r"s3://[a-z0-9][a-z0-9.-]+(/[^/\s]+)*|(/[^/\s:]+)+", place):
        return place
    raise ValueError(
        "is not s3://BUCKET or s3://BUCKET/FOLDER (bucket names are lower case), nor an absolute "
        "path in one of `volumes`; the image contains the S3 driver (s3fs) only"
    )


def _check_schedule(schedule: str) -> str:
    named = schedule.startswith("@")
    if not named and len(schedule.split()) != 5:
        raise ValueError("is not a five-field cron schedule: minute hour day month weekday")
    if not croniter.is_valid(schedule) or not (named or re.fullmatch(r"[\w*,/ -]+", schedule)):
        raise ValueError('is not a cron schedule, such as "17 2 * * *"')
    try:
        croniter(schedule, datetime(2026, 1, 1)).get_next()
    except CroniterBadDateError:
        raise ValueError("never runs: no such day exists") from None
    return schedule


def _check_time_zone(zone: str) -> str:
    if zone not in zoneinfo.available_timezones():
        raise ValueError("is not an IANA time zone, such as Europe/Berlin")
    return zone


def _check_network(network: str) -> str:
    ipaddress.ip_network(network)
    return network


def _as_text(value: Any) -> Any:
    """YAML reads some strings as numbers."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return str(value) if is_number else value


def _as_words(value: Any) -> Any:
    return [word.strip() for word in value.split(",")] if isinstance(value, str) else value


def _written(pattern: str, expected: str) -> AfterValidator:
    def check(text: str) -> str:
        if not re.fullmatch(pattern, text):
            raise ValueError(f"is not {expected}")
        return text

    return AfterValidator(check)


_NUMBER_AS_TEXT = BeforeValidator(_as_text)
_DNS = "a-z, 0-9 and -, a letter or digit first and last"
_NAME_PART = "[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?"
Name = Annotated[
    str,
    _written(
        "[a-z]([-a-z0-9]{0,26}[a-z0-9])?",
        "a name of at most 28 characters: a-z, 0-9 and -, a letter first",
    ),
]
Label = Annotated[
    str,
    _written("[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?", f"a name: {_DNS}, at most 63 characters"),
]
ObjectName = Annotated[
    str, _written("[a-z0-9]([-.a-z0-9]{0,251}[a-z0-9])?", f"the name of an object: {_DNS}, dots")
]
Key = Annotated[
    str,
    _written(
        rf"([a-z0-9]([-a-z0-9.]{{0,251}}[a-z0-9])?/)?{_NAME_PART}",
        "the key of a label or an annotation, such as team or example.com/team",
    ),
]
Text = Annotated[str, _NUMBER_AS_TEXT]
LabelValue = Annotated[
    str,
    _NUMBER_AS_TEXT,
    _written(
        f"({_NAME_PART})?", "the value of a label: letters, digits, - _ ., at most 63 characters"
    ),
]
LabelValues = Annotated[tuple[LabelValue, ...], BeforeValidator(_as_words), Field(min_length=1)]
VariableName = Annotated[
    str, _written("[A-Za-z_][A-Za-z0-9_]*", "the name of a variable: letters, digits and _")
]
MountPath = Annotated[str, _written(r"(/[^/\s:]+)+", "an absolute path")]
Port = Annotated[int, Field(ge=1, le=65535)]
Image = Annotated[str, AfterValidator(_check_image)]
Cidr = Annotated[str, AfterValidator(_check_network)]


# Sections.


class OptionsSection(Section):
    """A section whose field docstrings are shown to users."""

    model_config = ConfigDict(use_attribute_docstrings=True)


class SecretKey(OptionsSection):
    """A value from a secret."""

    secret: ObjectName
    key: Annotated[str, _written("[-._a-zA-Z0-9]+", "the key of a secret")]


Variables = dict[
    VariableName,
    Annotated[
        Annotated[Text, Tag("text")] | Annotated[SecretKey, Tag("secret")],
        Discriminator(lambda value: "secret" if isinstance(value, dict | SecretKey) else "text"),
    ],
]


class VolumeOptions(OptionsSection):
    """A volume and where it is mounted; exactly one source is given."""

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
            raise ValueError("give one of claim, config_map, secret and size_gib")
        if self.path in ("/dev/shm", "/tmp", "/home/ray", "/opt/venv"):
            raise ValueError(f"path={self.path} would hide files of the image: use another path")
        return self


class PodOptions(OptionsSection):
    """Size of a Ray pod, and where it may run."""

    cpus: Count
    """Requests and limits are equal."""
    memory_gib: Count
    """Requests and limits are equal."""
    shm_gib: Count
    """Size of /dev/shm, for Ray's object store and the data loader's frames; counts as memory."""
    object_store_gib: Annotated[float, Field(ge=0.1)] = 0.5
    """Share of /dev/shm for Ray's object store; by default Ray would take nearly all of it."""
    gpus: Annotated[int, Field(ge=0)] = 0
    """GPUs of each pod."""
    env: Variables = Field(default_factory=dict)
    """Environment, such as NCCL_SOCKET_IFNAME: eth0, or from a secret: {secret: NAME, key: KEY}."""
    labels: dict[Key, LabelValue] = Field(default_factory=dict)
    """Labels of these pods only."""
    annotations: dict[Key, Text] = Field(default_factory=dict)
    """Annotations of these pods only."""
    node_selector: dict[Key, LabelValues] = Field(default_factory=dict)
    """Labels that nodes must have, with one or several allowed values, as in
    topology.kubernetes.io/zone: [europe-west4-a, europe-west4-b]."""
    tolerations: dict[Key, LabelValue] = Field(default_factory=dict)
    """Taints to tolerate: key and value; an empty value tolerates every value."""
    priority_class: ObjectName | None = None
    """Name of a PriorityClass."""
    runtime_class: ObjectName | None = None
    """Name of a RuntimeClass, such as nvidia."""

    @model_validator(mode="after")
    def _check(self) -> "PodOptions":
        if self.shm_gib >= self.memory_gib:
            raise ValueError(
                f"shm_gib={self.shm_gib} is part of memory_gib={self.memory_gib}: make it smaller"
            )
        if self.object_store_gib >= self.shm_gib:
            raise ValueError(
                f"object_store_gib={self.object_store_gib:g} is part of shm_gib={self.shm_gib}, "
                "which the data loader needs too: make it smaller"
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
    """Whether to run all workers of a cluster in one zone; clouds bill traffic between zones."""


class JobOptions(OptionsSection):
    """What a training job runs."""

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
    """Another destination of pods."""

    cidr: Cidr
    ports: tuple[Port, ...] = ()
    """TCP ports; empty allows all."""


class NetworkOptions(OptionsSection):
    """Egress that the network policy allows besides DNS, HTTPS, the storage and Redis."""

    api_server_ports: tuple[Port, ...] = (443, 6443)
    """Ports of the API server, for autoscaling and the nightly job."""
    pod_identity: Literal["eks", "gke"] | None = None
    """Cloud whose agent on the node gives pods credentials; IRSA on EKS needs none."""
    egress: tuple[EgressOptions, ...] = ()
    """Other destinations, as in [{cidr: 10.0.0.0/8, ports: [3128]}]."""


class HistoryOptions(OptionsSection):
    """KubeRay's history server: a collector beside every Ray container."""

    collector: str
    """Image of the collector container."""
    env: dict[VariableName, Text] = Field(default_factory=dict)
    """Environment of the collector: where it writes to."""


class ManifestOptions(OptionsSection):
    """Everything that determines the manifests."""

    name: Name = "prioritycut"
    """Prefix of the names of all objects."""
    namespace: Label = "prioritycut"
    """Namespace of all objects; it must exist."""
    image: Image = f"{PLACEHOLDER}prioritycut-ray:0.1.0-ray{RAY_VERSION}-cu126"
    """Image of head, workers and submitter; its tag names its Ray version."""
    image_pull_secrets: tuple[ObjectName, ...] = ()
    """Names of secrets with the registry's credentials."""
    storage: Annotated[str, AfterValidator(_check_storage)] = "s3://prioritycut"
    """Bucket, or a folder in it; holds data/, runs/ and models/."""
    storage_endpoint: (
        Annotated[str, _written(r"https?://[^/\s]+/?", "http(s)://HOST[:PORT]")] | None
    ) = None
    """Endpoint of an S3 service other than AWS, such as http://minio:9000."""
    volumes: dict[Label, VolumeOptions] = Field(default_factory=dict)
    """Volumes of head, workers and TensorBoard by name, as in
    cache: {path: /cache, size_gib: 100} or sets: {path: /sets, claim: datasets}."""

    train: JobOptions = JobOptions()
    """What a training job runs."""
    tune: str = "tune_configs/ablation.yaml"
    """Search file of a search job, a file in the image."""
    retrain: str = "retrain.yaml"
    """Settings of the nightly retraining, a file in the image."""
    schedule: Annotated[str, AfterValidator(_check_schedule)] = "17 2 * * *"
    """Schedule of the retraining, in the five fields of cron."""
    time_zone: Annotated[str, AfterValidator(_check_time_zone)] = "Etc/UTC"
    """Time zone of the schedule, such as Europe/Berlin."""
    ray_cron_job: bool = False
    """Also render a RayCronJob: alpha, behind a feature gate, and its nights may overlap."""
    max_hours: Count = 72
    """Time limit of each attempt; a job that exceeds it fails and is not retried."""
    retries: Annotated[int, Field(ge=0)] = 3
    """How often a failed job is retried; each attempt gets a new cluster and resumes the run."""
    submission: Literal["K8sJobMode", "SidecarMode"] = "K8sJobMode"
    """With SidecarMode the submitter runs in the head's pod, and a job whose head is lost is
    retried."""

    head: HeadOptions = HeadOptions()
    """Pod of Ray's control plane and the drivers; nothing is trained there."""
    worker: WorkerOptions = WorkerOptions()
    """Pods that train."""
    min_workers: Annotated[int, Field(ge=0)] = 0
    """Smallest number of workers of autoscaling clusters."""
    max_workers: Count = 4
    """Largest number of workers; training and search use all of them."""
    grace_seconds: Annotated[int, Field(ge=45)] = 120
    """Termination grace period of pods, in which a checkpoint is written."""
    spot: bool = True
    """Whether workers may run on spot machines."""

    env: Variables = Field(default_factory=dict)
    """Environment of all containers with the image, such as HTTPS_PROXY."""
    labels: dict[Key, LabelValue] = Field(default_factory=dict)
    """Labels of all pods."""
    annotations: dict[Key, Text] = Field(default_factory=dict)
    """Annotations of all pods, such as sidecar.istio.io/inject: "false"."""
    service_account_annotations: dict[Key, Text] = Field(default_factory=dict)
    """Annotations of the accounts of pods, such as eks.amazonaws.com/role-arn."""
    network: NetworkOptions = NetworkOptions()
    """Egress that the network policy allows besides DNS, HTTPS, the storage and Redis."""

    queue: Label | None = None
    """A Kueue LocalQueue; clusters then have a fixed size."""
    scheduler: Literal["default", "volcano"] = "default"
    """Volcano must be enabled in the operator (helm: batchScheduler.name=volcano)."""
    redis: Annotated[str, _written(r"[^\s:/]+:\d+", "HOST:PORT")] | None = None
    """HOST:PORT of a Redis, with which a cluster survives the loss of its head; the password is in
    the secret NAME-redis under the key password."""
    history: HistoryOptions | None = None
    """Collector of KubeRay's history server, as in {collector: IMAGE, env: {...}}."""
    operator_namespace: Label = "kuberay-operator"
    """Namespace of KubeRay's operator, which the network policy admits."""

    @model_validator(mode="after")
    def _check(self) -> "ManifestOptions":
        if self.min_workers > self.max_workers:
            raise ValueError(
                f"min_workers={self.min_workers} is more than max_workers={self.max_workers}"
            )
        if self.queue and self.scheduler == "volcano":
            raise ValueError("queue (Kueue) and scheduler=volcano exclude each other: drop one")
        if self.queue and self.ray_cron_job:
            raise ValueError("ray_cron_job and queue exclude each other, as its jobs get no labels")
        paths = [volume.path for volume in self.volumes.values()]
        if "shm" in self.volumes or len(set(paths)) != len(paths):
            raise ValueError("volumes: paths must differ, and the name shm is taken")
        inside = any(self.storage == p or self.storage.startswith(f"{p}/") for p in paths)
        if self.storage.startswith("/") and not inside:
            raise ValueError(f"storage={self.storage} is not a folder in one of `volumes`")
        return self

    @property
    def ports_of_services(self) -> list[int]:
        """Of the storage and of Redis, where they are not 443."""
        ports = []
        if self.storage_endpoint:
            parts = urlsplit(self.storage_endpoint)
            ports.append(parts.port or {"http": 80, "https": 443}[parts.scheme])
        if self.redis:
            ports.append(int(self.redis.rpartition(":")[2]))
        return ports
