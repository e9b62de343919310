"""What pydantic finds wrong, in the user's terms: dotted keys, and how to correct them."""

import difflib
import json
import reprlib
from collections.abc import Sequence
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, Tag, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

Branches = dict[str, type[BaseModel]]
"""Sections of a union by their tags."""
_SHOWN = 10
"""Problems that a message lists."""


def describe_problems(error: ValidationError, root: type[BaseModel]) -> str:
    """Describe what pydantic found on one line, each key once: a union reports every branch.

    Args:
        error: what pydantic raised.
        root: the model that was validated.
    """
    problems: dict[str, list[str]] = {}
    for item in error.errors():
        key, kind, others = _locate(item["loc"], root)
        problems.setdefault(key, []).append(_problem(item, key, kind, others))
    found = [" or ".join(dict.fromkeys(messages)) for messages in problems.values()]
    more = len(found) - _SHOWN
    return "; ".join(found[:_SHOWN]) + (f"; and {more} more" if more > 0 else "")


def _problem(item: ErrorDetails, key: str, kind: Any, others: Branches) -> str:
    message, value = str(item["msg"]).removeprefix("Value error, "), item["input"]
    match item["type"]:
        case "extra_forbidden":
            return f"unknown key {key!r}{_owner(key, others)}{_suggestion(key, kind)}"
        case "model_type" | "model_attributes_type":
            message = "is a section: set its keys"
            message += ", or null to disable it" if type(None) in get_args(kind) else ""
        case "string_type" if value is None:
            message = "an empty value, null and ~ are null in YAML; if it is text, quote it"
        case "string_type" if isinstance(value, bool | int | float):
            kind_read = "boolean" if isinstance(value, bool) else "number"
            message = f"YAML reads this as a {kind_read}; if it is text, quote it"
            message += f" ({key}='\"{json.dumps(value)}\"' on the command line)"
        case "int_from_float" | "int_parsing":
            message = "must be a whole number"
        case "dict_type":
            message = "must be a mapping, such as {key: value}"
        case "union_tag_invalid":
            key, value = f"{key}.{_tag_key(kind)}", item["ctx"]["tag"]
            message = f"must be one of {item['ctx']['expected_tags']}"
        case "missing":
            message = "is required"
    if not key:
        return message
    is_section = isinstance(value, dict | BaseModel)
    return f"{key}: {message}" if is_section else f"{key}={reprlib.repr(value)}: {message}"


def _locate(location: Sequence[str | int], root: type[BaseModel]) -> tuple[str, Any, Branches]:
    """Find the dotted key of a problem, and the type there; for an unknown key, its section's type.

    pydantic adds its own names of a union's branches, and a mark of a mapping's keys.

    Returns:
        The key, the type, and what its section could be instead, if that is one of a union.
    """
    parts: list[str] = []
    kind: Any = root
    others: Branches = {}
    for place, part in enumerate(location):
        section = next((s for s in _section_types(kind) if part in keys_of(s)), None)
        branches = _branches(kind)
        if branch := branches.pop(str(part), None):
            kind, others = branch, branches
            continue
        others = {} if section else others
        if section:
            kind = keys_of(section)[str(part)].annotation
        elif _element_type(kind) is not None and part != "[key]":
            kind = _element_type(kind)
        elif place < len(location) - 1 or not _section_types(kind):
            continue
        parts.append(str(part))
    return ".".join(parts), kind, others


def _branches(kind: Any) -> Branches:
    """Return the branches of a tagged union; none if it is something else."""
    return {
        mark.tag: get_args(option)[0]
        for option in get_args(kind)
        for mark in get_args(option)
        if isinstance(mark, Tag)
    }


def _tag_key(union: Any) -> str:
    """Return the key that decides between the sections of a union."""
    fields = keys_of(_section_types(union)[0])
    return next(name for name, field in fields.items() if get_origin(field.annotation) is Literal)


def _owner(key: str, others: Branches) -> str:
    """Say which other section of the union has an unknown key, if one does."""
    parents, _, wrong = key.rpartition(".")
    found = [
        f"{parents}.{_tag_key(section)}={tag}"
        for tag, section in others.items()
        if wrong in keys_of(section)
    ]
    return f" (a key of {' and '.join(found)})" if found else ""


def _suggestion(key: str, kind: Any) -> str:
    """Suggest the key that may have been meant, from the same section as the wrong one."""
    parents, _, wrong = key.rpartition(".")
    keys = [name for section in _section_types(kind) for name in keys_of(section)]
    if not keys:
        return ""
    near = difflib.get_close_matches(wrong, keys, n=1)
    if near:
        return f"; did you mean {'.'.join(filter(None, [parents, near[0]]))!r}?"
    return f"; the keys{f' of {parents}' if parents else ''} are {', '.join(keys)}"


def _section_types(annotation: Any) -> list[type[BaseModel]]:
    """Return the sections that a value may be."""
    if get_origin(annotation) is Annotated:
        return _section_types(get_args(annotation)[0])
    if get_origin(annotation) in (Union, UnionType):
        return [section for option in get_args(annotation) for section in _section_types(option)]
    is_section = isinstance(annotation, type) and issubclass(annotation, BaseModel)
    return [annotation] if is_section else []


def section_type(annotation: Any) -> type[BaseModel] | None:
    """Return the section that a value may be; None if it cannot be one."""
    return next(iter(_section_types(annotation)), None)


def mapping_values(annotation: Any) -> Any:
    """Return the type of a mapping's values; None if it is not a mapping."""
    return get_args(annotation)[1] if get_origin(annotation) is dict else None


def _element_type(annotation: Any) -> Any:
    """Return the type of the items of a list, or of a mapping's values."""
    if get_origin(annotation) in (list, tuple):
        return get_args(annotation)[0]
    return mapping_values(annotation)


def keys_of(section: type[BaseModel]) -> dict[str, FieldInfo]:
    """Return the fields of a model by the names that they have in files."""
    return {field.alias or name: field for name, field in section.model_fields.items()}
