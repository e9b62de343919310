"""YAML as people mean it: unique keys, numbers with exponents, and no surprises.

YAML 1.1, which PyYAML reads, takes ``1e6`` for text, ``007`` for an octal number, ``12:30`` for 750
and ``yes`` for true. Here numbers are decimal, ``true`` and ``false`` are the booleans (YAML 1.2's
core schema), and anything else is text.
"""

import re
from typing import Any

import yaml

from prioritycut_ray.errors import one_line

_TAG = "tag:yaml.org,2002:"


class Number(float):
    """A number with a point or an exponent that keeps its spelling: a name may look like one.

    Attributes:
        text: the number as written, such as ``1.10``.
    """

    def __new__(cls, text: str) -> "Number":
        """Parse a number of YAML."""
        number = super().__new__(cls, text.lower().replace(".inf", "inf").replace(".nan", "nan"))
        number.text = text
        return number

    text: str

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle as a plain number."""
        return float, (float(self),)


class Loader(yaml.SafeLoader):
    """Resolves scalars by the rules above."""


class TextLoader(yaml.SafeLoader):
    """Resolves nothing: every scalar is text."""


Loader.yaml_implicit_resolvers = {}
TextLoader.yaml_implicit_resolvers = {}
for _name, _pattern, _first in (
    ("bool", "true|True|TRUE|false|False|FALSE", "tTfF"),
    ("null", "~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("merge", "<<", "<"),
    ("int", "[-+]?(0|[1-9][0-9]*)", "-+0123456789"),
    (
        "float",
        r"[-+]?([0-9]+\.[0-9]*|\.[0-9]+|[0-9]+(?=[eE]))([eE][-+]?[0-9]+)?"
        r"|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        "-+.0123456789",
    ),
):
    Loader.add_implicit_resolver(f"{_TAG}{_name}", re.compile(f"^(?:{_pattern})$"), list(_first))


def _number(loader: Loader, node: yaml.ScalarNode) -> Number:
    return Number(loader.construct_scalar(node))


def _refuse(loader: Loader, node: yaml.Node) -> None:
    name = node.tag.removeprefix(_TAG)
    raise yaml.constructor.ConstructorError(
        problem=f"the tag !!{name} is not supported", problem_mark=node.start_mark
    )


Loader.add_constructor(f"{_TAG}float", _number)
for _name in ("binary", "timestamp", "omap", "pairs", "set"):
    Loader.add_constructor(f"{_TAG}{_name}", _refuse)


def parse_yaml(text: str | bytes, loader: type[yaml.SafeLoader] = Loader) -> Any:
    """Parse one YAML document to plain values; None if it is empty.

    Raises:
        ValueError: if it is not valid YAML, or gives a key twice; the message is one line.
    """
    try:
        reader = loader(text)
        try:
            root = reader.get_single_node()
            check_nodes(root)
            return None if root is None else reader.construct_document(root)
        finally:
            reader.dispose()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f" (line {mark.line + 1}, column {mark.column + 1})" if mark else ""
        words = ", ".join(filter(None, (error.context, error.problem)))
        raise ValueError(f"{words}{place}") from error
    except yaml.YAMLError as error:
        raise ValueError(one_line(str(error))) from error
    except RecursionError as error:
        raise ValueError("the nesting is too deep") from error


def check_nodes(root: yaml.Node | None) -> None:
    """Check every node before merge keys are filled in, since these may be overridden.

    Raises:
        ValueError: if a key is given twice, a text is not valid Unicode, or an alias contains
            itself.
    """
    if root is not None:
        _check(root, above=set(), done=set())


def _check(node: yaml.Node, above: set[int], done: set[int]) -> None:
    line = node.start_mark.line + 1
    if id(node) in above:
        raise ValueError(f"the alias on line {line} contains itself")
    if id(node) in done:
        return
    if isinstance(node, yaml.ScalarNode):
        if "\0" in node.value or any("\ud800" <= c <= "\udfff" for c in node.value):
            raise ValueError(f"the text on line {line} contains an invalid character")
    elif isinstance(node, yaml.MappingNode):
        _check_keys(node)
    children = node.value if isinstance(node, yaml.CollectionNode) else []
    for child in children:
        for part in child if isinstance(child, tuple) else (child,):
            _check(part, above | {id(node)}, done)
    done.add(id(node))


def _check_keys(mapping: yaml.MappingNode) -> None:
    lines: dict[tuple[str, str], int] = {}
    for key, _ in mapping.value:
        if not isinstance(key, yaml.ScalarNode) or key.tag == f"{_TAG}merge":
            continue
        line = key.start_mark.line + 1
        if (name := (key.tag, key.value)) in lines:
            raise ValueError(
                f"the key {key.value!r} is given twice, on line {lines[name]} and on line {line}; "
                "keep one of them"
            )
        lines[name] = line
