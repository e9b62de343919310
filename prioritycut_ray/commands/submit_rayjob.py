"""``prioritycut submit --kubernetes``: a RayJob with a cluster of its own."""

import secrets
import shlex
import sys
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from rich.console import Console

from prioritycut_ray.commands.rayjob import detaching_from, follow
from prioritycut_ray.commands.submit import job_variables, show_package
from prioritycut_ray.config import Config, load_config
from prioritycut_ray.errors import UserError
from prioritycut_ray.kubernetes.checker import warnings_of
from prioritycut_ray.kubernetes.kubectl import Kubectl, KubectlError
from prioritycut_ray.kubernetes.options import (
    PLACEHOLDER,
    JobOptions,
    ManifestOptions,
    load_options,
)
from prioritycut_ray.kubernetes.pods import Object
from prioritycut_ray.kubernetes.rayjobs import (
    RayJobState,
    follow_command,
    get_rayjob,
    next_commands,
)
from prioritycut_ray.kubernetes.render import entrypoint, to_yaml
from prioritycut_ray.kubernetes.submission import (
    CONFIG_MAP_LIMIT,
    RUN_ANNOTATION,
    training,
    volume_words,
)
from prioritycut_ray.ray_cluster.working_directory import Package, pack, required_files


class Flags(NamedTuple):
    """The command line's flags about the manifests.

    Attributes:
        options: YAML file with options.
        words: options as ``key=value``.
        context: kubectl context.
    """

    options: str | None
    words: Sequence[str]
    context: str | None


def option_words(assigned: Sequence[str], **flags: str | int | None) -> list[str]:
    """Combine ``--set`` words with the flags for single options (named by key, __ for a dot).

    Raises:
        UserError: both set the same option.
    """
    given = {key.replace("__", "."): value for key, value in flags.items() if value is not None}
    for word in assigned:
        key = word.partition("=")[0]
        if key in given:
            raise UserError(
                f"--set {word}: {key} is already set to {given[key]} by a flag; remove one of them"
            )
    return [*assigned, *(f"{key}={value}" for key, value in given.items())]


def submit(
    source: str,
    overrides: Sequence[str],
    *,
    flags: Flags,
    excludes: Sequence[str],
    environment: Sequence[str],
    detach: bool,
    dry_run: bool,
    console: Console,
) -> int:
    """Create a RayJob that trains with the code and configurations of this folder, and follow it.

    Returns:
        The exit code of the job's driver; 0 with ``detach`` or ``dry_run``.

    Raises:
        UserError: the configuration, the options or the manifest is invalid, a job already trains
            this run, or kubectl failed.
        Detached: Ctrl-C was pressed; the job continues.
    """
    notes = Console(stderr=True, highlight=False, soft_wrap=True) if dry_run else console
    suffix = f"-train-{secrets.token_hex(3)}"
    config, variables = load_config(source, overrides), job_variables(environment)
    options = _with_job(load_options(flags.options, flags.words), source, overrides, config)
    package, content = _packed(source, options, excludes)
    if content is not None:
        words = [*flags.words, *volume_words(f"{options.name}{suffix}")]
        options = _with_job(load_options(flags.options, words), source, overrides, config)
    objects = training(options, suffix, config.name, variables=variables, package=content)
    manifests = to_yaml(objects)
    warnings = warnings_of(manifests)
    _show(options, package, notes)
    for warning in warnings:
        notes.print(str(warning), markup=False)
    if dry_run:
        sys.stdout.write(manifests)
        return 0
    kubectl, name = Kubectl(options.namespace, flags.context), f"{options.name}{suffix}"
    if options.image.startswith(PLACEHOLDER):
        raise UserError(
            f"image={options.image} is a placeholder that cannot be pulled: use your own with "
            "--image, or in the file of --options"
        )
    _refuse_second_job(kubectl, options, config.name)
    with detaching_from(kubectl, name):
        _create(kubectl, manifests, objects)
        console.print(f"RayJob:            {name} in namespace {options.namespace}", markup=False)
        _adopt(kubectl, objects, console)
        if detach:
            console.print(f"Follow: {follow_command(kubectl, name)}", markup=False)
            return 0
        return follow(kubectl, name, console)


def _with_job(
    options: ManifestOptions, source: str, overrides: Sequence[str], config: Config
) -> ManifestOptions:
    words = list(overrides)
    if config.name != Path(source).stem and f"name={config.name}" not in words:
        words.insert(0, f"name={config.name}")  # otherwise the file names the run
    job = JobOptions(config=source, overrides=tuple(words))
    return options.model_copy(update={"train": job})


def _packed(
    source: str, options: ManifestOptions, excludes: Sequence[str]
) -> tuple[Package, bytes | None]:
    """Return the packed working directory, and its content unless it is empty."""
    here = Path.cwd()
    required = required_files(source, _in_cluster(options), here)
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "working_dir.zip"
        package = pack(here, out, excludes, required, limit=CONFIG_MAP_LIMIT)
        return package, out.read_bytes() if package.files else None


def _in_cluster(options: ManifestOptions) -> Config:
    """Return the configuration as the job will read it.

    Raises:
        UserError: the sizes do not match.
    """
    words = shlex.split(entrypoint(options, "train"))[2:]
    try:
        return load_config(words[0], words[1:])
    except UserError as error:
        raise UserError(
            f"with {options.max_workers} workers of {options.worker.gpus} GPUs: {error}; change "
            "--workers, --gpus or the configuration"
        ) from error


def _show(options: ManifestOptions, package: Package, notes: Console) -> None:
    show_package(package, Path.cwd(), entrypoint(options, "train"), notes)
    worker = options.worker
    notes.print(
        f"Cluster:           {options.max_workers} × {worker.gpus} GPUs, {worker.cpus} CPUs, "
        f"{worker.memory_gib} GiB; image {options.image}",
        markup=False,
    )


def _refuse_second_job(kubectl: Kubectl, options: ManifestOptions, run: str) -> None:
    for rayjob in kubectl.find("rayjobs", f"app.kubernetes.io/part-of={options.name}"):
        metadata = rayjob["metadata"]
        if (metadata.get("annotations") or {}).get(RUN_ANNOTATION) != run:
            continue
        if not RayJobState.of(rayjob).has_ended:
            raise UserError(
                f"run {run!r} is already being trained by RayJob {metadata['name']}; "
                f"{next_commands(kubectl, metadata['name'])}"
            )


def _create(kubectl: Kubectl, manifests: str, objects: list[Object]) -> None:
    """Create all objects, or none if the user's permissions allow the cleanup."""
    try:
        kubectl.create(manifests)
    except KubectlError:
        for item in objects:
            with suppress(KubectlError):
                kubectl.delete(item["kind"].lower(), item["metadata"]["name"])
        raise


def _adopt(kubectl: Kubectl, objects: list[Object], console: Console) -> None:
    """Make the RayJob the owner of the other objects, so that they are deleted with it."""
    *others, rayjob = objects
    for item in others:
        kind, name = item["kind"].lower(), item["metadata"]["name"]
        try:
            created = get_rayjob(kubectl, rayjob["metadata"]["name"])
            owner = {key: rayjob[key] for key in ("apiVersion", "kind")}
            owner |= {key: created["metadata"][key] for key in ("name", "uid")}
            kubectl.patch(kind, name, {"metadata": {"ownerReferences": [owner]}})
        except UserError as error:
            delete = kubectl.shown("delete", kind, name)
            note = f"note: delete the working directory after the job with `{delete}` ({error})"
            console.print(note, markup=False)
