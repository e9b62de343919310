"""Placeholders that were not replaced."""

import re
from collections.abc import Iterator
from typing import Any

from prioritycut_ray.kubernetes.check.findings import Findings, Object, warning
from prioritycut_ray.kubernetes.schema import within

_EXAMPLE_HOST = re.compile(r"(^|[/@.])example\.(com|org|net)([:/]|$)")
_TO_FILL_IN = re.compile(
    r"replace[-_ ]?me|change[-_ ]?me|\bTODO\b|\bFIXME\b|<[A-Za-z][\w .-]*>|\bYOUR[-_]"
    r"|^x{3,}$|^\.\.\.$",
    re.IGNORECASE,
)
_SHOUTED_REGISTRY = re.compile(r"^[A-Z][A-Z_-]*/")
_SHOUTED_BUCKET = re.compile(r"\b(?:s3|gs|gcs|abfs|az)://[A-Z][A-Z_-]*(?:/|\s|$)")


def check(kind: str, document: Object) -> Findings:
    """Find placeholders in the images, secrets, commands and environments of an object."""
    for path, key, text in _texts(document, ""):
        if key == "image" and _is_example_image(text):
            yield warning(path, f"{text} is a placeholder: use your own registry and image")
        elif key in ("value", "entrypoint") and _is_placeholder(text):
            yield warning(path, f"{_shown(text)} is a placeholder: use your own value")
    if kind == "Secret":
        for field in ("stringData", "data"):
            for key, text in (document.get(field) or {}).items():
                if isinstance(text, str) and _TO_FILL_IN.search(text):
                    yield warning(
                        within(field, key),
                        f"{text!r} is a placeholder: create the secret with your own value",
                    )


def _is_example_image(image: str) -> bool:
    return bool(_EXAMPLE_HOST.search(image) or _SHOUTED_REGISTRY.match(image) or "<" in image)


def _is_placeholder(text: str) -> bool:
    return bool(_TO_FILL_IN.search(text) or _SHOUTED_BUCKET.search(text))


def _shown(text: str) -> str:
    found = _SHOUTED_BUCKET.search(text) or _TO_FILL_IN.search(text)
    return repr(found[0].strip() if found else text)


def _texts(tree: Any, path: str) -> Iterator[tuple[str, str, str]]:
    """Yield all strings of an object as (path, key, string)."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree)
    for key, value in items:
        place = within(path, key)
        if isinstance(value, dict | list):
            yield from _texts(value, place)
        elif isinstance(value, str):
            yield place, str(key), value
