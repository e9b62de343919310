"""The objects of one submitted training: its working directory, and the RayJob that runs it.

The working directory is a ConfigMap that the head and the workers mount; Ray unpacks it from there
like a package at any other URL. The operator can therefore start every attempt by itself, on a new
cluster with the same code, and a printed manifest is complete.
"""

import base64
from collections.abc import Mapping
from typing import Any

import yaml

from prioritycut_ray.kubernetes.options import ManifestOptions
from prioritycut_ray.kubernetes.pods import Object, metadata_of
from prioritycut_ray.kubernetes.render import ray_job

RUN_ANNOTATION = "prioritycut/run"
"""The annotation of a RayJob that names the run it trains."""
CONFIG_MAP_LIMIT = 2**20
"""Maximum size of a ConfigMap in bytes."""
_VOLUME, _PATH, _FILE = "working-dir", "/submitted", "working_dir.zip"


def volume_words(name: str) -> list[str]:
    """Return the options that mount the ConfigMap ``name`` as the working directory."""
    volume = {"path": _PATH, "config_map": name, "read_only": "true"}
    return [f"volumes.{_VOLUME}.{key}={value}" for key, value in volume.items()]


def training(
    options: ManifestOptions,
    suffix: str,
    run: str,
    *,
    variables: Mapping[str, str],
    package: bytes | None,
) -> list[Object]:
    """Return the objects of one training.

    Args:
        options: options of the manifests, with the volume of the working directory if there is one.
        suffix: suffix of the objects' names.
        run: name of the run.
        variables: environment variables of the job.
        package: the working directory as a zip file, or None.
    """
    job = ray_job(options, "train")
    metadata = metadata_of(options, suffix, job["metadata"]["labels"])
    job["metadata"] = {**metadata, "annotations": {RUN_ANNOTATION: run}}
    environment: dict[str, Any] = {}
    if package is not None:
        environment["working_dir"] = f"file://{_PATH}/{_FILE}"
    if variables:
        environment["env_vars"] = dict(variables)
    if environment:
        job["spec"]["runtimeEnvYAML"] = yaml.safe_dump(environment, sort_keys=False)
    return [job] if package is None else [_config_map(metadata_of(options, suffix), package), job]


def _config_map(metadata: Object, package: bytes) -> Object:
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": metadata,
        "immutable": True,
        "binaryData": {_FILE: base64.b64encode(package).decode()},
    }
