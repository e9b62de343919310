"""The closed JSON Schema of Kubernetes' and KubeRay's objects.

"Closed" means that a field which the schema does not name is an error; an API server silently drops
misspelt fields. The definitions of core objects are Kubernetes' own, from the package
``kubernetes-validate``; ``core.yaml`` adds what kube-apiserver checks beyond them. The definitions
of KubeRay's objects are built from ``kuberay.yaml``.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import celpy
import yaml
from celpy.adapter import json_to_cel
from jsonschema import Draft202012Validator, FormatChecker, ValidationError, validators
from kubernetes_validate.utils import schema_contents
from referencing import Registry, Resource

from prioritycut_ray.kubernetes.syntax import FORMATS, did_you_mean

Violation = tuple[str, str]
"""The path of a field, and what is wrong with it."""

_INT32 = {"type": "integer", "minimum": -(2**31), "maximum": 2**31 - 1}
_CORE = "https://kubernetes.io/api/_definitions.json#/$defs/"
_KUBERAY = "https://ray.io/kuberay#/$defs/"
_PREFIXES = {
    "meta.v1.": "io.k8s.apimachinery.pkg.apis.meta.v1.",
    "resource.": "io.k8s.apimachinery.pkg.api.resource.",
}
SCALARS: dict[str, dict[str, Any]] = {
    "string": {"type": "string"},
    "boolean": {"type": "boolean"},
    "integer": _INT32,
    "number": {"type": "number"},
    "quantity": {"type": ["string", "number"], "format": "quantity"},
    "strings": {"type": "object", "additionalProperties": {"type": "string"}},
}
KINDS = ("RayCluster", "RayJob", "RayCronJob", "RayService")
VERSIONS = ("ray.io/v1", "ray.io/v1alpha1")


class Rule(NamedTuple):
    """A CEL rule for the values of a type or of one of its fields."""

    expression: Any
    """The compiled program."""
    message: str


class KubeRayRelease(NamedTuple):
    """The content of ``kuberay.yaml``: the API of one release of KubeRay."""

    version: str
    kubernetes: str
    types: dict[str, dict[str, str]]
    schema: dict[str, Any]
    rules: dict[str, list[Rule]]
    """By type (``DeletionStrategy``) or field (``RayJobSpec.managedBy``)."""
    tables: dict[str, Any]
    """All other tables, by their key in the file."""


@cache
def kuberay() -> KubeRayRelease:
    """Return the supported release, with its schema and its compiled rules."""
    tables = _tables("kuberay.yaml")
    environment = celpy.Environment()

    def compiled(rule: dict[str, str]) -> Rule:
        return Rule(environment.program(environment.compile(rule["rule"])), rule["message"])

    return KubeRayRelease(
        version=tables["version"],
        kubernetes=tables["kubernetes"],
        types=tables["types"],
        schema=_kuberay_schema(tables),
        rules={place: [compiled(rule) for rule in rules] for place, rules in tables["cel"].items()},
        tables=tables,
    )


def _tables(name: str) -> dict[str, Any]:
    tables: dict[str, Any] = yaml.safe_load((Path(__file__).parent / name).read_text())
    return tables


def _kuberay_schema(tables: dict[str, Any]) -> dict[str, Any]:
    definitions: dict[str, Any] = {
        name: {"enum": values} for name, values in tables["enums"].items()
    }
    for name, fields in tables["types"].items():
        properties = {field: _field_schema(kind) for field, kind in fields.items()}
        required = tables["required"].get(name, [])
        if name in KINDS:
            required = ["apiVersion", "kind", "metadata", "spec"]
            properties |= {
                "apiVersion": {"enum": list(VERSIONS)},
                "kind": {"const": name},
                "metadata": {"$ref": f"{_CORE}io.k8s.apimachinery.pkg.apis.meta.v1.ObjectMeta"},
                "status": {"type": "object"},
            }
        definitions[name] = {
            "type": "object",
            "properties": properties,
            "required": required,
            "additionalProperties": False,
        }
    for name, checks in tables["checks"].items():
        _add_checks(definitions[name], checks)
    return {"$id": "https://ray.io/kuberay", "$defs": definitions}


def _field_schema(kind: str) -> dict[str, Any]:
    if kind.endswith("*"):
        return {"type": "array", "items": _field_schema(kind[:-1])}
    if kind.startswith("io.k8s."):
        return {"$ref": f"{_CORE}{kind}"}
    return dict(SCALARS.get(kind) or {"$ref": f"#/$defs/{kind}"})


@cache
def _core_schema() -> dict[str, Any]:
    version = kuberay().kubernetes
    name = f"kubernetes-json-schema/v{version}.0-local-strict/_definitions.json"
    schema: dict[str, Any] = schema_contents(name, version)
    definitions = schema["$defs"]
    quantity = "io.k8s.apimachinery.pkg.api.resource.Quantity"
    definitions[quantity] = {"type": ["string", "number", "null"]}
    for name, checks in _tables("core.yaml").items():
        prefix = next((full for short, full in _PREFIXES.items() if name.startswith(short)), None)
        full = f"{prefix}{name.split('.')[-1]}" if prefix else f"io.k8s.api.{name}"
        _add_checks(definitions[full], checks)
    return schema


def _add_checks(definition: dict[str, Any], checks: Mapping[str, Any]) -> None:
    for field, keywords in checks.items():
        place = definition if field == "." else definition["properties"][field]
        for keyword, value in keywords.items():
            if keyword in ("items", "additionalProperties"):
                place[keyword] = {**place.get(keyword, {}), **_not_set(value)}
            else:
                place[keyword] = _not_set({keyword: value})[keyword]


def _not_set(keywords: dict[str, Any]) -> dict[str, Any]:
    """Add the values that mean "not set" to an enum."""
    if "enum" not in keywords:
        return keywords
    return {**keywords, "enum": [*keywords["enum"], "", None]}


@cache
def _registry() -> Registry[Any]:
    own = {"$schema": "https://json-schema.org/draft/2020-12/schema", **kuberay().schema}
    return [Resource.from_contents(_core_schema()), Resource.from_contents(own)] @ Registry()


# The kinds.


@cache
def core_kinds() -> dict[tuple[str, str], str]:
    """Return the kinds of Kubernetes: (apiVersion, kind) → name of the definition."""
    kinds = {}
    for name, definition in _core_schema()["$defs"].items():
        properties = definition.get("properties", {})
        versions = properties.get("apiVersion", {}).get("enum", ())
        names = properties.get("kind", {}).get("enum", ())
        if len(versions) == 1 and len(names) == 1 and ".meta.v1." not in name:
            kinds[versions[0], names[0]] = name
    return kinds


# Violations of a schema.


def _one_field(
    validator: Any, value: Mapping[str, Any], instance: Any, schema: Mapping[str, Any]
) -> Iterator[ValidationError]:
    if not isinstance(instance, dict):
        return
    fields = value.get("fields") or schema["properties"].keys() - set(value.get("beside", ()))
    given = [name for name in instance if name in fields and instance[name] not in (None, "")]
    if len(given) > 1:
        yield ValidationError(f"has {' and '.join(given)}, which are mutually exclusive: keep one")
    if len(given) < value.get("least", 0):
        yield ValidationError(f"needs one of {', '.join(sorted(fields))}")


def _unique_by(
    validator: Any, keys: list[str], instance: Any, schema: Mapping[str, Any]
) -> Iterator[ValidationError]:
    if not isinstance(instance, list):
        return
    seen: set[tuple[Any, ...]] = set()
    for index, item in enumerate(instance):
        if not isinstance(item, dict) or not item.get(keys[0]):
            continue
        values = tuple(str(item.get(key)) for key in keys)
        if values in seen:
            message = f"{values[0]!r} appears twice: rename or remove one"
            yield ValidationError(message, path=[index, keys[0]])
        seen.add(values)


_Validator = validators.extend(  # type: ignore[no-untyped-call]
    Draft202012Validator, {"one-field": _one_field, "unique-by": _unique_by}
)
_formats = FormatChecker(formats=())
for _name, _format in FORMATS.items():
    _formats.checks(_name)(_format.allows)


def errors(name: str, document: dict[str, Any]) -> Iterator[Violation]:
    """Yield the violations of a definition's schema in a document."""
    reference = f"{_CORE if name.startswith('io.k8s.') else _KUBERAY}{name}"
    validator = _Validator({"$ref": reference}, registry=_registry(), format_checker=_formats)
    for error in validator.iter_errors(document):
        yield from _described(error)
    yield from _empty_items(document, "")


def _empty_items(tree: Any, path: str) -> Iterator[Violation]:
    """Yield list items that are null: the schema accepts them, the API server does not."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree)
    for key, value in items:
        if value is None:
            yield within(path, key), "is empty: remove it"
        elif isinstance(value, dict | list):
            yield from _empty_items(value, within(path, key))


def dotted(path: Iterable[Any]) -> str:
    """Format a path: ``spec.containers[0].name``, ``limits[nvidia.com/gpu]``."""
    words = (
        f"[{part}]" if isinstance(part, int) or re.search("[./]", str(part)) else f".{part}"
        for part in path
    )
    return "".join(words).lstrip(".")


def within(path: str, key: Any) -> str:
    """Return the path of a key below a path."""
    return f"{path}{dotted([key]) if dotted([key]).startswith('[') else f'.{key}'}".lstrip(".")


UNKNOWN_FIELD = "is not a field of this object"


def _described(error: ValidationError) -> Iterator[Violation]:
    """Translate an error of jsonschema, with a clearer message where there is one."""
    path: list[Any] = list(error.absolute_path)
    value: Any = error.instance
    wanted: Any = error.validator_value
    definition: Any = error.schema
    match error.validator:
        case "additionalProperties" if wanted is False:
            known = definition.get("properties", {})
            for name in value.keys() - known.keys():
                yield dotted([*path, name]), _unknown_field(name, known)
        case "required":
            name = next(field for field in wanted if error.message.startswith(repr(field)))
            yield dotted([*path, name]), "is missing"
        case "enum":
            names = [str(name) for name in wanted if name not in ("", None)]
            yield (
                dotted(path),
                f"{value!r} is not one of {', '.join(names)}" + did_you_mean(value, names),
            )
        case "type":
            yield dotted(path), _wrong_type(value, wanted)
        case "format":
            if "propertyNames" in error.schema_path:
                path.append(value)
            yield dotted(path), f"{_short(value)} is not {FORMATS[wanted].expected}"
        case "minimum":
            yield dotted(path), f"is {value}, less than {wanted}"
        case "maximum":
            yield dotted(path), f"is {value}, greater than {wanted}"
        case "minLength" | "minItems":
            yield dotted(path), "is empty"
        case _:
            yield dotted(path), error.message


def _unknown_field(name: Any, known: Iterable[str]) -> str:
    instead = kuberay().tables["unreleased"].get(name)
    if instead:
        return f"is not in any release of KubeRay; use {instead}"
    if name == "spec" and "entrypoint" in known:
        return f"{UNKNOWN_FIELD}: move its content here, without spec"
    return f"{UNKNOWN_FIELD}{did_you_mean(name, known) or ': remove it'}"


_ARTICLES = {
    "integer": "an integer",
    "object": "a mapping",
    "array": "a list",
    "string": "a string",
}


def _wrong_type(value: Any, wanted: str | list[str]) -> str:
    types = [wanted] if isinstance(wanted, str) else [name for name in wanted if name != "null"]
    names = " or ".join(_ARTICLES.get(name, f"a {name}") for name in types)
    hint = ""
    if "string" in types and isinstance(value, bool | int | float):
        hint = f": write '{str(value).lower()}'"
    elif isinstance(value, str) and not {"object", "array"} & set(types):
        hint = ": write it without quotes"
    return f"{_short(value)} is not {names}{hint}"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 70 else f"{text[:60]}… ({len(str(value))} characters)"


def broken_rules(kind: str, value: Any, path: str = "") -> Iterator[Violation]:
    """Yield violations of the CEL rules; the value must match the schema of its kind."""
    for rule in kuberay().rules.get(kind, ()):
        if not rule.expression.evaluate({"self": json_to_cel(value)}):
            yield path, rule.message
    for place, field_kind, child in _children(kind, value, path):
        for rule in kuberay().rules.get(f"{kind}.{place.rpartition('.')[2]}", ()):
            if not rule.expression.evaluate({"self": json_to_cel(child)}):
                yield place, rule.message
        for spot, item in _items(field_kind, child, place):
            yield from broken_rules(field_kind.rstrip("*"), item, spot)


def gated(kind: str, value: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """Yield the fields behind a feature gate that is off by default: (path, gate)."""
    gates = kuberay().tables["gates"]
    if kind in gates:
        yield path or "kind", gates[kind]
    for place, field_kind, child in _children(kind, value, path):
        gate = gates.get(f"{kind}.{place.rpartition('.')[2]}")
        if gate:
            yield place, gate
        for spot, item in _items(field_kind, child, place):
            yield from gated(field_kind.rstrip("*"), item, spot)


def needs_gate(gate: str) -> str:
    """Return the message for something behind a feature gate."""
    return (
        f"needs the feature gate {gate}, which is off by default in KubeRay {kuberay().version}: "
        "enable it in the operator"
    )


def _children(kind: str, value: Any, path: str) -> Iterator[tuple[str, str, Any]]:
    """Yield the fields of a value of a KubeRay type: (path, type, value)."""
    for field, field_kind in kuberay().types.get(kind, {}).items():
        if field in value:
            yield f"{path}.{field}".lstrip("."), field_kind, value[field]


def _items(kind: str, value: Any, path: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the mappings in a field: its value, or the items of its list."""
    if kind.endswith("*") and isinstance(value, list):
        yield from ((f"{path}[{index}]", item) for index, item in enumerate(value))
    elif isinstance(value, dict):
        yield path, value
