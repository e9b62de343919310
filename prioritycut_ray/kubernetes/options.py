"""What a user may choose about the manifests; everything else is decided by the template."""

import re
from typing import Annotated, Literal

from pydantic import Field, model_validator

from prioritycut_ray.config import Count, Section

RAY_VERSION = "2.60.0"
"""Of the image and of the manifests; the Dockerfile's ARG is the same, and a test keeps it so."""


def image_ray_version(image: str) -> str | None:
    """The Ray version that an image's tag names: ``…-ray2.60.0-cpu``, ``rayproject/ray:2.60.0``."""
    name, _, tag = image.rsplit("/", 1)[-1].partition(":")
    match = re.search(r"ray[-_]?(\d+\.\d+\.\d+)", tag)
    if match is None and name in ("ray", "ray-ml"):
        match = re.match(r"(\d+\.\d+\.\d+)", tag)
    return match[1] if match else None


Name = Annotated[str, Field(pattern=r"^[a-z]([-a-z0-9]{0,28}[a-z0-9])?$")]
"""A DNS label, short enough for what KubeRay appends to it."""


class PodOptions(Section):
    """Size of a pod: its requests and its limits."""

    cpus: Count
    memory_gib: Count
    shm_gib: Count
    """Of /dev/shm, for Ray's object store and the data loader's frames; counts as memory."""
    gpus: Annotated[int, Field(ge=0)] = 0

    @model_validator(mode="after")
    def _check(self) -> "PodOptions":
        if self.shm_gib >= self.memory_gib:
            raise ValueError(
                f"shm_gib={self.shm_gib} is taken from memory_gib={self.memory_gib}: make it less"
            )
        return self


class JobOptions(Section):
    """The configuration that training runs; ``key=value`` words change it."""

    config: str = "vox256"
    overrides: tuple[str, ...] = ()


class ManifestOptions(Section):
    """Everything that determines the manifests."""

    name: Name = "prioritycut"
    namespace: Name = "prioritycut"
    image: str = f"registry.example.com/prioritycut-ray:0.1.0-ray{RAY_VERSION}-cu126"
    """One image for head, workers and submitter; its tag names its Ray version."""
    storage: Annotated[str, Field(pattern="^[a-z0-9]+://.+[^/]$")] = "s3://prioritycut"
    """Bucket, or folder of one: data below ``data/``, runs below ``runs/``."""
    storage_endpoint: str | None = None
    """Of an S3 that is not AWS."""

    train: JobOptions = JobOptions()
    tune: str = "tune_configs/ablation.yaml"
    retrain: str = "retrain.yaml"
    """Settings of retraining, a file in the image."""
    schedule: str = "17 2 * * *"
    """Of retraining, in cron's five fields."""
    time_zone: str = "Etc/UTC"
    max_hours: Count = 72
    """After which a job is ended."""
    retries: Annotated[int, Field(ge=0)] = 3
    """New clusters for a job whose cluster failed; each resumes the run."""

    head: PodOptions = PodOptions(cpus=4, memory_gib=16, shm_gib=4)
    worker: PodOptions = PodOptions(cpus=8, memory_gib=48, shm_gib=12, gpus=1)
    min_workers: Annotated[int, Field(ge=0)] = 0
    """Of clusters that grow by themselves."""
    max_workers: Count = 4
    grace_seconds: Annotated[int, Field(ge=30)] = 120
    """Between the notice that a pod ends and its end: a checkpoint is written in it."""
    spot: bool = True
    """Workers may run on machines that the cloud can take back."""
    node_selector: dict[str, str] = Field(default_factory=dict)
    """Of workers, such as a GPU type."""

    queue: str | None = None
    """A Kueue LocalQueue that jobs wait in; it decides on sizes, so clusters do not grow."""
    scheduler: Literal["default", "volcano"] = "default"
    redis: str | None = None
    """host:port of a Redis; with it a cluster outlives the death of its head."""
    operator_namespace: Name = "kuberay-operator"

    @model_validator(mode="after")
    def _check(self) -> "ManifestOptions":
        if image_ray_version(self.image) is None:
            raise ValueError(
                f"image={self.image}: the tag must name its Ray version, as in "
                f"prioritycut-ray:0.1.0-ray{RAY_VERSION}-cpu"
            )
        if self.min_workers > self.max_workers:
            raise ValueError(
                f"min_workers={self.min_workers} is more than max_workers={self.max_workers}"
            )
        if self.queue and self.scheduler == "volcano":
            raise ValueError("queue (Kueue) and scheduler=volcano exclude each other: drop one")
        return self
