"""``prioritycut k8s``."""

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from rich.console import Console

from prioritycut_ray.config import load_config, load_section
from prioritycut_ray.errors import UserError
from prioritycut_ray.kubernetes.checker import load_checker
from prioritycut_ray.kubernetes.options import PLACEHOLDER, ManifestOptions
from prioritycut_ray.kubernetes.render import entrypoint, render
from prioritycut_ray.retraining.settings import RetrainSettings
from prioritycut_ray.search.space import load_base, load_search


def render_files(options: ManifestOptions, out: Path, console: Console) -> None:
    """Write the manifests into a folder.

    Raises:
        UserError: see :func:`check_entrypoints`.
    """
    check_entrypoints(options)
    out.mkdir(parents=True, exist_ok=True)
    for name, text in render(options).items():
        (out / name).write_text(text)
        console.print(f"{out / name}", markup=False)
    if options.image.startswith(PLACEHOLDER):
        console.print(
            f"image={options.image} is a placeholder that cannot be pulled: use your own "
            "(see docs/operations.md)",
            style="yellow",
        )


def check_entrypoints(options: ManifestOptions) -> None:
    """Make sure that each job would accept its command line.

    Raises:
        UserError: a file is missing or invalid, or the sizes do not match.
    """
    train, tune, retrain = (
        shlex.split(entrypoint(options, verb))[2:] for verb in ("train", "tune", "retrain")
    )
    size = f"max_workers={options.max_workers} and worker.gpus={options.worker.gpus}"
    try:
        load_config(train[0], train[1:])
    except UserError as error:
        raise UserError(f"with {size}: {error}; change them or train.overrides") from error
    if _is_readable("tune", options):
        search = load_search(Path(tune[0]), smoke=False)
        try:
            load_base(search, [word for word in tune[1:] if "=" in word])
        except UserError as error:
            raise UserError(f"{options.tune} with {size}: {error}") from error
    if _is_readable("retrain", options):
        load_section(RetrainSettings, retrain[0], retrain[1:])


def _is_readable(key: Literal["tune", "retrain"], options: ManifestOptions) -> bool:
    """Return whether a file of the image can be read here, where the image is built from.

    Files that the image always contains, and files in a volume, may be missing here.

    Raises:
        UserError: another file is missing.
    """
    file = getattr(options, key)
    if not Path(file).is_absolute() and Path(file).is_file():
        return True
    if file == ManifestOptions.model_fields[key].default or options.has_mounted(file):
        return False
    raise UserError(
        f"{key}={file}: is not a file in this folder; use its path in the image, and run this "
        "command in the folder that the image is built from"
    )


def validate(files: Sequence[Path], console: Console) -> None:
    """Check manifests, and print errors and warnings.

    Raises:
        UserError: there is an error.
    """
    check = load_checker()
    errors = 0
    for file in files:
        problems = check.check_file(file)
        found = len(check.errors_of(problems))
        errors += found
        for problem in problems:
            console.print(f"{file}: {problem}", markup=False, soft_wrap=True)
        if not found:
            warned = sum(problem.severity is check.Severity.WARNING for problem in problems)
            rest = f", with {_count(warned, 'warning')}" if warned else ""
            console.print(f"{file}: valid{rest}", markup=False, soft_wrap=True)
    if errors:
        raise UserError(f"{_count(errors, 'error')}; see above")


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
