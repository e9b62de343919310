"""The closed JSON Schema of KubeRay's objects, built from the facts in ``kuberay.yaml``.

"Closed": a field that the schema does not name is an error, as a misspelt field is dropped by an
API server without a word. Pods and other core objects are Kubernetes' own definitions, which come
with the package ``kubernetes-validate``.
"""

from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import celpy
import yaml
from celpy.adapter import json_to_cel
from jsonschema import Draft202012Validator, ValidationError
from kubernetes_validate.utils import schema_contents
from referencing import Registry, Resource

_INT32 = {"type": "integer", "minimum": -(2**31), "maximum": 2**31 - 1}
_QUANTITY = {"type": ["string", "number"]}
SCALARS: dict[str, dict[str, Any]] = {
    "string": {"type": "string"},
    "boolean": {"type": "boolean"},
    "integer": _INT32,
    "number": {"type": "number"},
    "quantity": _QUANTITY,
    "strings": {"type": "object", "additionalProperties": {"type": "string"}},
}
KINDS = ("RayCluster", "RayJob", "RayCronJob", "RayService")


class Rule(NamedTuple):
    """A CEL rule on every value of a type, or of one of its fields."""

    expression: Any
    """The compiled program."""
    message: str


class Facts(NamedTuple):
    """What ``kuberay.yaml`` says."""

    version: str
    kubernetes: str
    types: dict[str, dict[str, str]]
    schema: dict[str, Any]
    rules: dict[str, list[Rule]]
    """By type (``DeletionStrategy``) or field (``RayJobSpec.managedBy``)."""


@cache
def facts() -> Facts:
    """The facts, with the schema and the rules built from them."""
    tables = yaml.safe_load((Path(__file__).parent / "kuberay.yaml").read_text())
    environment = celpy.Environment()

    def compiled(rule: dict[str, str]) -> Rule:
        return Rule(environment.program(environment.compile(rule["rule"])), rule["message"])

    return Facts(
        version=tables["version"],
        kubernetes=tables["kubernetes"],
        types=tables["types"],
        schema=_schema(tables),
        rules={place: [compiled(rule) for rule in rules] for place, rules in tables["cel"].items()},
    )


def _schema(tables: dict[str, Any]) -> dict[str, Any]:
    definitions: dict[str, Any] = {
        name: {"enum": values} for name, values in tables["enums"].items()
    }
    for name, fields in tables["types"].items():
        properties = {field: _field_schema(kind) for field, kind in fields.items()}
        if name in KINDS:
            properties |= {
                "apiVersion": {"const": "ray.io/v1"},
                "kind": {"const": name},
                "metadata": _core("io.k8s.apimachinery.pkg.apis.meta.v1.ObjectMeta"),
                "status": {"type": "object"},
            }
        required = tables["required"].get(name, [])
        definitions[name] = {
            "type": "object",
            "properties": properties,
            "required": ["apiVersion", "kind", "metadata", "spec"] if name in KINDS else required,
            "additionalProperties": False,
        }
    for place, minimum in tables["minimum"].items():
        name, field = place.split(".")
        definitions[name]["properties"][field] = {**_INT32, "minimum": minimum}
    for place in tables["not_empty"]:
        name, field = place.split(".")
        definitions[name]["properties"][field] |= {"minLength": 1, "minItems": 1}
    return {"$id": "https://ray.io/kuberay", "$defs": definitions}


def _field_schema(kind: str) -> dict[str, Any]:
    if kind.endswith("*"):
        return {"type": "array", "items": _field_schema(kind[:-1])}
    if kind.startswith("io.k8s."):
        return _core(kind)
    return dict(SCALARS.get(kind) or {"$ref": f"#/$defs/{kind}"})


def _core(kind: str) -> dict[str, Any]:
    return {"$ref": f"https://kubernetes.io/api/_definitions.json#/$defs/{kind}"}


@cache
def _registry() -> Registry[Any]:
    version = facts().kubernetes
    core = schema_contents(
        f"kubernetes-json-schema/v{version}.0-local-strict/_definitions.json", version
    )
    resources = [Resource.from_contents(core), _kuberay_resource()]
    return resources @ Registry()


def _kuberay_resource() -> Resource[Any]:
    return Resource.from_contents(
        {"$schema": "https://json-schema.org/draft/2020-12/schema", **facts().schema}
    )


def errors(kind: str, document: dict[str, Any]) -> Iterator[ValidationError]:
    """What the schema of a KubeRay kind finds wrong in a document."""
    reference = {"$ref": f"https://ray.io/kuberay#/$defs/{kind}"}
    yield from Draft202012Validator(reference, registry=_registry()).iter_errors(document)


def broken_rules(kind: str, value: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """Where the CEL rules do not hold: (path, message); the value fits the schema of its kind."""
    for rule in facts().rules.get(kind, ()):
        if not rule.expression.evaluate({"self": json_to_cel(value)}):
            yield path, rule.message
    for field, field_kind in facts().types.get(kind, {}).items():
        if field not in value:
            continue
        place, child = f"{path}.{field}".lstrip("."), value[field]
        for rule in facts().rules.get(f"{kind}.{field}", ()):
            if not rule.expression.evaluate({"self": json_to_cel(child)}):
                yield place, rule.message
        if field_kind.endswith("*") and isinstance(child, list):
            for index, item in enumerate(child):
                yield from broken_rules(field_kind[:-1], item, f"{place}[{index}]")
        elif isinstance(child, dict):
            yield from broken_rules(field_kind, child, place)
