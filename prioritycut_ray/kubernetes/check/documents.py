"""Split a file of manifests into its objects, and apply the rules for the kind of each object."""

import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import yaml

from prioritycut_ray.errors import UserError
from prioritycut_ray.kubernetes import schema
from prioritycut_ray.kubernetes.check import (
    clusters,
    jobs,
    names,
    placeholders,
    pods,
    relations,
    services,
    workloads,
)
from prioritycut_ray.kubernetes.check.findings import (
    Finding,
    Findings,
    Object,
    Problem,
    Severity,
    error,
    errors_of,
    note,
    warning,
)
from prioritycut_ray.kubernetes.syntax import did_you_mean
from prioritycut_ray.yaml_text import check_nodes


def check_file(path: Path) -> list[Problem]:
    """Return all problems in a file of manifests.

    Raises:
        UserError: the file cannot be read.
    """
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as reason:
        words = reason.strerror if isinstance(reason, OSError) else "is not UTF-8 text"
        raise UserError(f"{path}: {words}; pass a YAML file of manifests") from reason
    return check_text(text)


def check_text(text: str) -> list[Problem]:
    """Return all problems in one or more YAML documents, errors first."""
    try:
        for root in yaml.compose_all(text, _FASTEST):
            check_nodes(root)
        documents = [document for document in yaml.load_all(text, _Loader) if document is not None]
    except (yaml.YAMLError, ValueError, RecursionError) as reason:
        return [Problem("file", f"is not valid YAML: {' '.join(str(reason).split())}")]
    if not documents:
        return [Problem("file", "contains no object")]
    problems: list[Problem] = []
    sound: list[dict[str, Any]] = []
    for document in _objects(documents):
        found = list(_check_document(document))
        problems += found
        if not errors_of(found):
            sound.append(_without_nulls(document))
    problems += [_problem(title, finding) for title, finding in relations.check(sound)]
    order = list(Severity)
    return sorted(dict.fromkeys(problems), key=lambda problem: order.index(problem.severity))


_FASTEST: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


class _Loader(_FASTEST):  # type: ignore[misc]
    """Reject keys that are not strings, which PyYAML accepts."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Construct a mapping whose keys are strings."""
        for key, _ in node.value:
            if key.tag == "tag:yaml.org,2002:merge":
                continue
            if key.tag != "tag:yaml.org,2002:str":
                raise yaml.constructor.ConstructorError(
                    problem=f"the key {key.value!r} is not a string: put it in quotes",
                    problem_mark=key.start_mark,
                )
        mapping: dict[Any, Any] = super().construct_mapping(node, deep)
        return mapping


def _problem(title: str, finding: Finding) -> Problem:
    return Problem(f"{title} {finding.path}".rstrip(), finding.message, finding.severity)


def _objects(documents: Iterable[Any]) -> Iterator[Any]:
    """Yield the objects of a file, including those in a ``List``."""
    for document in documents:
        is_list = isinstance(document, dict) and document.get("kind") == "List"
        if is_list and isinstance(document.get("items"), list):
            yield from _objects(document["items"])
        else:
            yield document


def _check_document(document: Any) -> Iterator[Problem]:
    if not isinstance(document, dict):
        yield Problem("file", f"an object must be a mapping, not {type(document).__name__}")
        return
    kind, version = document.get("kind"), document.get("apiVersion")
    if not isinstance(kind, str) or not isinstance(version, str):
        yield Problem("file", "an object needs apiVersion and kind, both strings")
        return
    title, document = names.title(document), _without_nulls(document)
    for finding in _findings(kind, version, document):
        yield _problem(title, finding)


def _without_nulls(tree: Any) -> Any:
    """Drop null values as the API server does: they mean "not set"."""
    if isinstance(tree, dict):
        return {key: _without_nulls(value) for key, value in tree.items() if value is not None}
    return [_without_nulls(item) for item in tree] if isinstance(tree, list) else tree


def _findings(kind: str, version: str, document: dict[str, Any]) -> Findings:
    definition, unknown = _definition(kind, version)
    yield from unknown
    if definition is None:
        return
    shape = list(_shape(definition, version, document))
    yield from shape
    if not any(finding.severity is Severity.ERROR for finding in shape):
        yield from _rules(kind, document)  # they require a valid shape


def _definition(kind: str, version: str) -> tuple[str | None, Iterable[Finding]]:
    """Return the schema of a kind, and findings about the kind itself."""
    group = version.rpartition("/")[0]
    if group == "ray.io":
        if kind not in schema.KINDS:
            known = ", ".join(schema.KINDS)
            hint = did_you_mean(kind, schema.KINDS)
            return None, [error("kind", f"{kind} is not a KubeRay kind; use one of {known}{hint}")]
        if version not in schema.VERSIONS:
            return None, [error("apiVersion", f"is {version}; write ray.io/v1")]
        if version != "ray.io/v1":
            return kind, [warning("apiVersion", f"{version} is deprecated: write ray.io/v1")]
        return kind, []
    kinds = schema.core_kinds()
    if (version, kind) in kinds:
        return kinds[version, kind], []
    return None, [_unknown_kind(kind, version, group)]


def _unknown_kind(kind: str, version: str, group: str) -> Finding:
    kinds = schema.core_kinds()
    release = f"Kubernetes {schema.kuberay().kubernetes}"
    versions = sorted(known for known, name in kinds if name == kind)
    is_core = "." not in group or any(known.rpartition("/")[0] == group for known, _ in kinds)
    if is_core and versions:
        return error("apiVersion", f"{release} has no {kind} in {version}: write {versions[-1]}")
    if is_core:
        hint = did_you_mean(kind, [*(name for _, name in kinds), *schema.KINDS])
        return error("kind", f"{release} has no {kind} in {version}{hint}")
    if kind in schema.KINDS and did_you_mean(group, ["ray.io"]):
        return error("apiVersion", f"is {version}; for a {kind} it is ray.io/v1")
    return note("kind", f"was not checked: there is no schema for {kind} in {version}")


def _shape(definition: str, version: str, document: dict[str, Any]) -> Findings:
    for path, message in schema.errors(definition, document):
        if version == "ray.io/v1alpha1" and message.startswith(schema.UNKNOWN_FIELD):
            yield warning(path, "is not a field of ray.io/v1: remove it")
        else:
            yield error(path, message)


def _rules(kind: str, document: Object) -> Findings:
    yield from names.check(kind, document)
    yield from pods.check(kind, document)
    yield from placeholders.check(kind, document)
    spec = document.get("spec") or {}
    if kind in schema.KINDS:
        for path, message in schema.broken_rules(kind, document):
            yield error(path, message)
        for path, gate in schema.gated(kind, document):
            yield warning(path, schema.needs_gate(gate))
    match kind:
        case "RayCluster":
            yield from clusters.check(spec, "spec", document["metadata"])
        case "RayJob":
            yield from jobs.check(spec, "spec", document["metadata"])
        case "RayCronJob":
            yield from jobs.check_cron(spec)
        case "RayService":
            yield from services.check(spec, document["metadata"])
        case "ConfigMap":
            yield from _config_map_rules(document)
        case _:
            yield from workloads.check(kind, document)


def _config_map_rules(document: Object) -> Findings:
    """Check manifests that are embedded in a ConfigMap."""
    for key, text in (document.get("data") or {}).items():
        is_manifest = re.search("^apiVersion:", text or "", re.MULTILINE)
        if key.endswith((".yaml", ".yml")) and is_manifest:
            for where, message, severity in check_text(text):
                yield Finding(f"data[{key}] {where}", message, severity)
