"""``prioritycut k8s``."""

import shlex
import textwrap
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Literal

import yaml
from rich.console import Console

from prioritycut_ray.config import Section, load_config, load_section
from prioritycut_ray.errors import UserError
from prioritycut_ray.kubernetes.options import PLACEHOLDER, ManifestOptions
from prioritycut_ray.kubernetes.render import entrypoint, render
from prioritycut_ray.retraining.settings import RetrainSettings
from prioritycut_ray.search.space import load_base, load_search

if TYPE_CHECKING:
    from prioritycut_ray.kubernetes.check import Problem


def load_options(file: str | None, overrides: Sequence[str]) -> ManifestOptions:
    """The options of the manifests: defaults, a YAML file, ``key=value`` words.

    Raises:
        UserError: a key or a value is wrong.
    """
    return load_section(ManifestOptions, file, overrides)


def check_jobs(options: ManifestOptions) -> None:
    """Make sure that each job would accept its command line.

    Raises:
        UserError: a file is missing or wrong, or the sizes do not go together.
    """
    train, tune, retrain = (
        shlex.split(entrypoint(options, verb))[2:] for verb in ("train", "tune", "retrain")
    )
    size = f"max_workers={options.max_workers} and worker.gpus={options.worker.gpus}"
    try:
        load_config(train[0], train[1:])
    except UserError as error:
        raise UserError(f"with {size}: {error}; change them or train.overrides") from error
    if _is_here("tune", options):
        search = load_search(Path(tune[0]), smoke=False)
        try:
            load_base(search, [word for word in tune[1:] if "=" in word])
        except UserError as error:
            raise UserError(f"{options.tune} with {size}: {error}") from error
    if _is_here("retrain", options):
        load_section(RetrainSettings, retrain[0], retrain[1:])


def _is_here(key: Literal["tune", "retrain"], options: ManifestOptions) -> bool:
    """Whether a file of the image can be read: the image is built from the folder it is in.

    The files that the image always has may be missing here, and so may those in a volume.

    Raises:
        UserError: another one is missing.
    """
    file = getattr(options, key)
    if not Path(file).is_absolute() and Path(file).is_file():
        return True
    if file == ManifestOptions.model_fields[key].default or options.has_mounted(file):
        return False
    raise UserError(
        f"{key}={file}: is not a file below this folder; give its path in the image, and run this "
        "in the folder that the image is built from"
    )


def render_files(options: ManifestOptions, out: Path, console: Console) -> None:
    """Write the manifests into a folder.

    Raises:
        UserError: see :func:`check_jobs`.
    """
    check_jobs(options)
    out.mkdir(parents=True, exist_ok=True)
    for name, text in render(options).items():
        (out / name).write_text(text)
        console.print(f"{out / name}", markup=False)
    if options.image.startswith(PLACEHOLDER):
        console.print(
            f"image={options.image} is a placeholder that no node can pull: give your own "
            "(see docs/operations.md)",
            style="yellow",
        )


def validate(files: Sequence[Path], console: Console) -> None:
    """Check manifests and print what is wrong: errors, and warnings that do not fail the check.

    Raises:
        UserError: there is an error.
    """
    check = _checker()
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


def checked(manifests: str) -> Sequence["Problem"]:
    """The warnings of manifests.

    Raises:
        UserError: there is an error.
    """
    check = _checker()
    problems: Sequence[Problem] = check.check_text(manifests)
    errors = check.errors_of(problems)
    if errors:
        raise UserError("; ".join(f"{item.where}: {item.message}" for item in errors))
    return problems


def _checker() -> ModuleType:
    """The checker, whose schemas are an extra: they are larger than all the rest."""
    try:
        from prioritycut_ray.kubernetes import check
    except ModuleNotFoundError as error:
        raise UserError(
            f"checking manifests needs {error.name}: pip install 'prioritycut_ray[k8s]'"
        ) from error
    return check


def describe(options: Section) -> str:
    """The options as YAML with a comment each, to start a file of one's own."""
    lines = []
    for key in type(options).model_fields:
        value, comment = getattr(options, key), comment_of(type(options), key)
        lines += textwrap.wrap(comment, 96, initial_indent="# ", subsequent_indent="# ")
        if isinstance(value, Section):
            lines += [f"{key}:", textwrap.indent(describe(value), "  ").rstrip()]
        else:
            plain = options.model_dump(mode="json", include={key})
            lines.append(yaml.safe_dump(plain, sort_keys=False, width=100).rstrip())
    return "\n".join(lines) + "\n"


def comment_of(section: type[Section], key: str) -> str:
    """The docstring of an option, where need be of the class that a section only changes."""
    fields = (getattr(kind, "model_fields", {}).get(key) for kind in section.__mro__)
    return next((field.description for field in fields if field and field.description), "")
