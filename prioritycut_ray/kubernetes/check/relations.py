"""Relations between the objects of a file."""

import re
from collections.abc import Iterator
from typing import Any

from prioritycut_ray.kubernetes import schema
from prioritycut_ray.kubernetes.check import names, pods
from prioritycut_ray.kubernetes.check.findings import Finding, Object, error, warning
from prioritycut_ray.kubernetes.syntax import did_you_mean

Relation = Iterator[tuple[str, Finding]]
"""The name of an object, and what is wrong with it."""


def check(documents: list[dict[str, Any]]) -> Relation:
    """Check the relations within a file; each document must match its schema."""
    keys, known = dict(_keys(documents)), _names(documents)
    for document in documents:
        title = names.title(document)
        for path, template in pods.templates(document):
            pod, place = template["spec"], f"{path}.spec".lstrip(".")
            for finding in _pod_relations(pod, place, keys):
                yield title, finding
        for path, kind, name in _references(document):
            others = known.get(kind, [])
            hint = did_you_mean(name, [one for one in others if _differ(one, name)], alike=0.85)
            if name not in others and (hint or (kind == "Role" and others)):
                yield title, warning(path, f"{kind} {name} is not in this file{hint}")
    yield from _twice(documents)
    yield from _services(documents)


def _keys(documents: list[dict[str, Any]]) -> Iterator[tuple[tuple[str, str], set[str]]]:
    """Yield the keys of the file's ConfigMaps and Secrets: (kind, name) → keys."""
    for document in documents:
        kind, metadata = document.get("kind"), document.get("metadata")
        if kind in ("ConfigMap", "Secret") and isinstance(metadata, dict):
            parts = [document.get(field) for field in ("data", "binaryData", "stringData")]
            found = {str(key) for part in parts if isinstance(part, dict) for key in part}
            yield (str(kind), str(metadata.get("name"))), found


def _pod_relations(
    pod: Object, place: str, keys: dict[tuple[str, str], set[str]]
) -> Iterator[Finding]:
    folders: dict[str, tuple[str, set[str]]] = {}
    for index, volume in enumerate(pod.get("volumes") or []):
        source = _source(volume)
        if source is None or source not in keys:
            continue
        items = ((volume.get("configMap") or volume.get("secret")) or {}).get("items")
        spot = f"{place}.volumes[{index}]"
        if items is None:
            folders[str(volume.get("name"))] = (source[1], keys[source])
        for number, item in enumerate(items or []):
            yield from _missing(item, source, keys, f"{spot}.items[{number}].key")
    for spot, container in pods.containers(pod):
        spot = f"{place}.{spot}"
        yield from _file_relations(container, spot)
        for index, variable in enumerate(container.get("env") or []):
            yield from _variable_relations(variable, keys, f"{spot}.env[{index}]")
        for mount in container.get("volumeMounts") or []:
            if mount.get("name") in folders:
                name, known = folders[str(mount.get("name"))]
                yield from _path_relations(container, mount, name, known, spot)


def _source(volume: Object) -> tuple[str, str] | None:
    for field, kind, key in (
        ("configMap", "ConfigMap", "name"),
        ("secret", "Secret", "secretName"),
    ):
        source = volume.get(field)
        if isinstance(source, dict) and not source.get("optional"):
            return kind, str(source.get(key))
    return None


def _missing(
    item: Any, source: tuple[str, str], keys: dict[tuple[str, str], set[str]], spot: str
) -> Iterator[Finding]:
    key = item.get("key") if isinstance(item, dict) else None
    if key is not None and key not in keys[source]:
        hint = did_you_mean(key, keys[source])
        yield error(spot, f"the {source[0]} {source[1]} has no key {key!r}{hint}")


def _variable_relations(
    variable: Object, keys: dict[tuple[str, str], set[str]], spot: str
) -> Iterator[Finding]:
    origin = variable.get("valueFrom")
    if not isinstance(origin, dict):
        return
    for field, kind in (("configMapKeyRef", "ConfigMap"), ("secretKeyRef", "Secret")):
        reference = origin.get(field)
        if not isinstance(reference, dict) or reference.get("optional"):
            continue
        source = (kind, str(reference.get("name")))
        if source in keys:
            yield from _missing(reference, source, keys, f"{spot}.valueFrom.{field}.key")


def _path_relations(
    container: Object, mount: Object, name: str, known: set[str], spot: str
) -> Iterator[Finding]:
    """Check that files which the command line reads are keys of the mounted object."""
    folder = str(mount.get("mountPath")).rstrip("/")
    if mount.get("subPath"):
        if mount["subPath"] not in known:
            hint = did_you_mean(mount["subPath"], known)
            yield error(spot, f"{name} has no key {mount['subPath']!r} for subPath{hint}")
        return
    for field in ("command", "args"):
        for index, word in enumerate(container.get(field) or []):
            for file in re.findall(rf"(?<![\w/]){re.escape(folder)}/([\w.-]+)", str(word)):
                if file not in known:
                    hint = did_you_mean(file, known)
                    yield error(
                        f"{spot}.{field}[{index}]",
                        f"reads {folder}/{file}, but {name} has no key {file!r}{hint}",
                    )


_FILE_OPTION = re.compile(r"^(?:--filename=|-f=?)(/.+)$")


def _file_relations(container: Object, spot: str) -> Iterator[Finding]:
    """Check that files which kubectl reads are in a mounted folder; its image has none."""
    if "kubectl" not in str(container.get("image")):
        return
    mounts = [str(mount.get("mountPath")) for mount in container.get("volumeMounts") or []]
    for index, word in enumerate(container.get("args") or []):
        match = _FILE_OPTION.match(str(word))
        if match and not any(match[1].startswith(f"{mount.rstrip('/')}/") for mount in mounts):
            yield warning(
                f"{spot}.args[{index}]", f"reads {match[1]}, which is not in a mounted folder"
            )


# Between objects.


def _identity(document: Object) -> tuple[str, str, str, str] | None:
    metadata = document.get("metadata")
    if not isinstance(metadata, dict) or not metadata.get("name"):
        return None
    parts = (document.get("apiVersion"), document.get("kind"), metadata.get("namespace"))
    return (*(str(part) for part in parts), str(metadata["name"]))  # type: ignore[return-value]


def _twice(documents: list[dict[str, Any]]) -> Relation:
    seen = set()
    for document in documents:
        identity = _identity(document)
        if identity is not None and identity in seen:
            yield (
                names.title(document),
                error(
                    "metadata.name",
                    "appears twice in this file; the second replaces the first",
                ),
            )
        seen.add(identity)


def _names(documents: list[dict[str, Any]]) -> dict[str, list[str]]:
    """Return the names of the file's objects by kind."""
    known: dict[str, list[str]] = {}
    for document in documents:
        identity = _identity(document)
        if identity is not None:
            known.setdefault(identity[1], []).append(identity[3])
    return known


def _differ(one: str, other: str) -> bool:
    """Return whether two names differ in more than a number."""
    return re.sub(r"\d+", "", one) != re.sub(r"\d+", "", other)


_REFERENCES = {
    "serviceAccountName": "ServiceAccount",
    "claimName": "PersistentVolumeClaim",
    "secretName": "Secret",
    "configMap": "ConfigMap",
    "configMapRef": "ConfigMap",
    "configMapKeyRef": "ConfigMap",
    "secretRef": "Secret",
    "secretKeyRef": "Secret",
}
"""Fields that refer to another object by its name, or by a mapping with its name."""


def _references(tree: Any, path: str = "") -> Iterator[tuple[str, str, str]]:
    """Yield the references of an object to others: (path, kind, name)."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree)
    for key, value in items:
        place = schema.within(path, key)
        kind = _REFERENCES.get(str(key))
        if key == "roleRef" or (path == "subjects" and isinstance(value, dict)):
            kind = str(value.get("kind"))
        if kind and isinstance(value, dict) and value.get("name"):
            yield f"{place}.name", kind, str(value["name"])
        elif kind and isinstance(value, str):
            yield place, kind, value
        if isinstance(value, dict | list):
            yield from _references(value, place)


def _services(documents: list[dict[str, Any]]) -> Relation:
    """Check that the selector and ports of each service match pods in the file."""
    found = [template for document in documents for _, template in pods.templates(document)]
    for document in documents:
        spec = document.get("spec") or {}
        selector = spec.get("selector") or {}
        if document.get("kind") != "Service" or not selector:
            continue
        title = names.title(document)
        matching = [template for template in found if _wrong_labels(selector, template) == []]
        if matching:
            for finding in _service_ports(spec, matching):
                yield title, finding
            continue
        for template in found:
            wrong = _wrong_labels(selector, template)
            if len(wrong) == 1 and len(selector) > 1:
                yield (
                    title,
                    warning(
                        schema.within("spec.selector", wrong[0]),
                        f"is {selector[wrong[0]]}, but no pod in this file has this label",
                    ),
                )


def _wrong_labels(selector: Object, template: Object) -> list[str]:
    labels = (template.get("metadata") or {}).get("labels") or {}
    return [key for key, value in selector.items() if labels.get(key) != value]


def _service_ports(spec: Object, templates: list[Object]) -> Iterator[Finding]:
    offered = {
        port.get("name")
        for template in templates
        for _, container in pods.containers(template["spec"])
        for port in container.get("ports") or []
    }
    for index, port in enumerate(spec.get("ports") or []):
        target = port.get("targetPort")
        if isinstance(target, str) and target not in offered:
            hint = did_you_mean(target, filter(None, offered))
            yield warning(
                f"spec.ports[{index}].targetPort", f"its pods have no port {target!r}{hint}"
            )
