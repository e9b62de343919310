"""Access to the checker of manifests, which needs the optional dependencies of ``k8s``."""

from collections.abc import Sequence
from types import ModuleType
from typing import TYPE_CHECKING

from prioritycut_ray.errors import UserError

if TYPE_CHECKING:
    from prioritycut_ray.kubernetes.check import Problem


def load_checker() -> ModuleType:
    """Import :mod:`prioritycut_ray.kubernetes.check`.

    Raises:
        UserError: the extra is not installed.
    """
    try:
        from prioritycut_ray.kubernetes import check
    except ModuleNotFoundError as error:
        raise UserError(
            f"checking manifests requires {error.name}: pip install 'prioritycut_ray[k8s]'"
        ) from error
    return check


def warnings_of(manifests: str) -> Sequence["Problem"]:
    """Check manifests, and return the warnings.

    Raises:
        UserError: the manifests have an error.
    """
    check = load_checker()
    problems: Sequence[Problem] = check.check_text(manifests)
    errors = check.errors_of(problems)
    if errors:
        raise UserError("; ".join(f"{item.where}: {item.message}" for item in errors))
    return problems
