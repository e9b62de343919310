"""``prioritycut k8s``, and ``prioritycut submit --kubernetes``."""

import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import yaml
from rich.console import Console

from prioritycut_ray.config import load_config, load_section, shipped_configs
from prioritycut_ray.errors import UserError
from prioritycut_ray.kubernetes.options import JobOptions, ManifestOptions
from prioritycut_ray.kubernetes.render import ray_job, render, to_yaml

_KUBECTL_SECONDS = 60


def load_options(file: str | None, overrides: Sequence[str]) -> ManifestOptions:
    """The options of the manifests: defaults, a YAML file, ``key=value`` words."""
    return load_section(ManifestOptions, file, overrides)


def render_files(options: ManifestOptions, out: Path, console: Console) -> None:
    """Write the manifests into a folder."""
    out.mkdir(parents=True, exist_ok=True)
    for name, text in render(options).items():
        (out / name).write_text(text)
        console.print(f"{out / name}")


def validate(files: Sequence[Path], console: Console) -> None:
    """Check manifests and print what is wrong.

    Raises:
        UserError: something is.
    """
    check = _checker()
    found = 0
    for file in files:
        problems = check.check_file(file)
        found += len(problems)
        for problem in problems:
            console.print(f"{file}: {problem}", markup=False)
        if not problems:
            console.print(f"{file}: valid")
    if found:
        raise UserError(f"{found} problem{'s' if found > 1 else ''}; see above")


def submit(
    config: str, overrides: Sequence[str], *, options: str | None, dry_run: bool, console: Console
) -> None:
    """Create a RayJob that trains, by the user's own kubectl.

    Raises:
        UserError: the manifest has a problem, or kubectl refuses.
    """
    if config not in shipped_configs():
        raise UserError(
            f"{config}: the image holds the shipped configurations only; name one of "
            f"{', '.join(shipped_configs())} and give your changes as key=value"
        )
    load_config(config, overrides)
    chosen = load_options(options, []).model_copy(
        update={"train": JobOptions(config=config, overrides=tuple(overrides))}
    )
    job = ray_job(chosen, "train")
    # A new object each time: the run's name decides what is resumed, not the RayJob's.
    job["metadata"]["generateName"] = job["metadata"].pop("name") + "-"
    text = to_yaml([job])
    problems = _checker().check_text(text)
    if problems:
        raise UserError("; ".join(str(problem) for problem in problems))
    if dry_run:
        sys.stdout.write(text)
        return
    console.print(_kubectl("create", "--filename=-", text=text).strip())
    console.print(f"Watch: kubectl --namespace {chosen.namespace} get rayjobs --watch")


def _checker() -> ModuleType:
    """The checker, whose schemas are an extra: they are larger than all the rest."""
    try:
        from prioritycut_ray.kubernetes import check
    except ModuleNotFoundError as error:
        raise UserError(
            f"checking manifests needs {error.name}: pip install 'prioritycut_ray[k8s]'"
        ) from error
    return check


def _kubectl(*words: str, text: str) -> str:
    program = shutil.which("kubectl")
    if program is None:
        raise UserError("kubectl is not on the PATH: install it, or use --dry-run and apply later")
    try:
        result = subprocess.run(
            [program, *words], input=text, capture_output=True, text=True, timeout=_KUBECTL_SECONDS
        )
    except subprocess.TimeoutExpired as error:
        raise UserError(f"kubectl did not answer within {_KUBECTL_SECONDS} s") from error
    if result.returncode != 0:
        lines = result.stderr.strip().splitlines() or [f"exit code {result.returncode}"]
        raise UserError(f"kubectl {words[0]}: {lines[-1]}; `kubectl cluster-info` tells more")
    return result.stdout


def describe(options: ManifestOptions) -> str:
    """The options as YAML, to start a file of one's own."""
    return yaml.safe_dump(options.model_dump(mode="json"), sort_keys=False)
