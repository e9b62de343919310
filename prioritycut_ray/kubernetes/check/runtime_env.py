"""The runtime environment of a RayJob."""

import re
from collections.abc import Iterator
from typing import Any

import yaml

from prioritycut_ray.kubernetes import schema
from prioritycut_ray.kubernetes.check.findings import Findings, Object, error, warning
from prioritycut_ray.kubernetes.syntax import did_you_mean
from prioritycut_ray.yaml_text import check_nodes

_EXCLUSIVE = ("pip", "uv", "conda")
_TYPES = {"string": str, "list": list, "mapping": dict, "boolean": bool}
_URL = re.compile("[a-z][a-z0-9+.-]*://")


def check(spec: Object, path: str) -> Findings:
    """Check the runtimeEnvYAML of a RayJob's spec."""
    place = f"{path}.runtimeEnvYAML"
    text = spec.get("runtimeEnvYAML") or ""
    try:
        check_nodes(yaml.compose(text, yaml.SafeLoader))
        environment = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError) as reason:
        yield error(place, f"is not valid YAML: {' '.join(str(reason).split())}")
        return
    if environment is None:
        return
    if not isinstance(environment, dict):
        yield error(place, f"must be a mapping, not {type(environment).__name__}")
        return
    known = schema.kuberay().tables["runtime_env"]
    for key in environment:
        if environment[key] is None:
            continue
        if key not in known:
            hint = did_you_mean(key, known, alike=0.75)
            serious = error if hint else warning
            yield serious(f"{place} {key}", f"is not a key of runtime_env; Ray ignores it{hint}")
        elif not isinstance(environment[key], tuple(_TYPES[kind] for kind in known[key])):
            wanted = " or a ".join(known[key])
            yield error(f"{place} {key}", f"{environment[key]!r} is not a {wanted}")
    given = [key for key in _EXCLUSIVE if environment.get(key)]
    if len(given) > 1:
        yield error(place, f"has {' and '.join(given)}, which are mutually exclusive: keep one")
    yield from _variable_rules(environment.get("env_vars"), f"{place} env_vars")
    yield from _code_rules(environment, spec, place)


def _variable_rules(variables: Any, place: str) -> Findings:
    if not isinstance(variables, dict):
        return
    for name, value in variables.items():
        if not isinstance(name, str):
            yield error(f"{place}.{name}", f"the name {name!r} is not a string: write '{name}'")
        if not isinstance(value, str):
            text = "" if value is None else str(value).lower() if isinstance(value, bool) else value
            yield error(f"{place}.{name}", f"{value!r} is not a string: write '{text}' in quotes")


def _code_rules(environment: Object, spec: Object, place: str) -> Findings:
    """Check that code is at a URL: no folder of the user's machine is uploaded."""
    has_submitter = spec.get("submissionMode") in (None, "", "K8sJobMode", "SidecarMode")
    serious = warning if has_submitter else error
    for key, location in _locations(environment):
        if not _URL.match(location):
            yield serious(
                f"{place} {key}",
                f"{location} is a path in the submitter's pod, not on your machine: use the URL "
                "of a .zip, or put the code into the image",
            )
        elif location.startswith(("http://", "https://", "s3://", "gs://")) and not re.search(
            r"\.(zip|whl|jar|tar\.gz|tgz)$", location.split("?")[0]
        ):
            yield error(f"{place} {key}", f"{location} is not the URL of a .zip or .whl")


def _locations(environment: Object) -> Iterator[tuple[str, str]]:
    if isinstance(environment.get("working_dir"), str):
        yield "working_dir", environment["working_dir"]
    modules = environment.get("py_modules")
    for index, module in enumerate(modules if isinstance(modules, list) else []):
        if isinstance(module, str):
            yield f"py_modules[{index}]", module
