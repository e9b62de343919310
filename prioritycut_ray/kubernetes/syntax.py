"""The syntax of Kubernetes' names, quantities and other strings, with the words for messages.

Source: apimachinery's ``util/validation`` and ``api/resource`` of Kubernetes 1.36.
"""

import base64
import binascii
import difflib
import ipaddress
import re
from collections.abc import Callable, Iterable
from decimal import Decimal
from typing import Any, NamedTuple

_LABEL = "[a-z0-9]([-a-z0-9]*[a-z0-9])?"
_NAME_PART = "[A-Za-z0-9]([-A-Za-z0-9_.]*[A-Za-z0-9])?"


class Format(NamedTuple):
    """The syntax of a string."""

    matches: Callable[[Any], object]
    expected: str
    """What is expected; follows "is not" in a message."""
    of_numbers: bool = False
    """Whether a number is accepted in place of the string."""

    def allows(self, value: Any) -> bool:
        """Return whether a value has this syntax. Unset values and other types are accepted."""
        if isinstance(value, str):
            return value == "" or bool(self.matches(value))
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        return not (is_number and self.of_numbers) or bool(self.matches(value))


def _text(pattern: str, longest: int) -> Callable[[str], bool]:
    compiled = re.compile(pattern)
    return lambda text: len(text) <= longest and compiled.fullmatch(text) is not None


is_dns_label = _text(_LABEL, 63)
is_dns_label_1035 = _text("[a-z]([-a-z0-9]*[a-z0-9])?", 63)
is_dns_subdomain = _text(rf"{_LABEL}(\.{_LABEL})*", 253)
_is_name_part = _text(_NAME_PART, 63)
_is_port_name = _text("(?!-)(?!.*--)(?=.*[a-z])[a-z0-9-]+(?<!-)", 15)


def is_qualified_name(text: str) -> bool:
    """Return whether a string is a label key: a name, or a DNS subdomain, a slash and a name."""
    prefix, slash, name = text.rpartition("/")
    return _is_name_part(name) and (not slash or is_dns_subdomain(prefix))


def is_label_value(text: str) -> bool:
    """Return whether a string is a label value, which may be empty."""
    return text == "" or _is_name_part(text)


_QUANTITY = re.compile(
    r"[+-]?([0-9]+(?:\.[0-9]*)?|\.[0-9]+)([numkMGTPE]|[KMGTPE]i|[eE][+-]?[0-9]+)?"
)
_SUFFIXES = {
    **{suffix: Decimal(1000) ** power for power, suffix in enumerate("num", start=-3)},
    **{suffix: Decimal(1000) ** power for power, suffix in enumerate("kMGTPE", start=1)},
    **{f"{suffix}i": Decimal(1024) ** power for power, suffix in enumerate("KMGTPE", start=1)},
}
_LARGEST_EXPONENT = 30


def parse_quantity(text: Any) -> Decimal | None:
    """Parse a quantity (``500m``, ``16Gi``); return None if it is not one."""
    match = None if isinstance(text, bool) else _QUANTITY.fullmatch(str(text))
    if match is None:
        return None
    number, suffix = Decimal(match[1]), match[2] or ""
    if str(text).startswith("-"):
        number = -number
    if suffix[:1] in ("e", "E") and len(suffix) > 1:
        exponent = int(suffix[1:])
        return number.scaleb(exponent) if abs(exponent) <= _LARGEST_EXPONENT else None
    return number * _SUFFIXES.get(suffix, Decimal(1))


def _is_amount(text: Any) -> bool:
    amount = parse_quantity(text)
    return amount is not None and amount >= 0


_DOMAIN = r"(?:[a-zA-Z0-9](?:[a-zA-Z0-9-]*[a-zA-Z0-9])?)"
_COMPONENT = "[a-z0-9]+(?:(?:[.]|_|__|-+)[a-z0-9]+)*"
_is_image = _text(
    rf"(?:{_DOMAIN}(?:\.{_DOMAIN})*(?::[0-9]+)?/)?{_COMPONENT}(?:/{_COMPONENT})*"
    r"(?::[\w][\w.-]{0,127})?(?:@[A-Za-z][A-Za-z0-9]*:[0-9a-fA-F]{32,})?",
    4096,
)


def _is_base64(text: str) -> bool:
    try:
        base64.b64decode("".join(text.split()), validate=True)
    except binascii.Error:
        return False
    return True


def _is_network(text: str) -> bool:
    try:
        ipaddress.ip_network(text)
    except ValueError:
        return False
    return "/" in text


def _is_port(port: Any) -> bool:
    return _is_port_name(port) if isinstance(port, str) else 1 <= port <= 65535


_STANDARD_RESOURCES = ("cpu", "memory", "ephemeral-storage", "storage")


def _is_resource_name(text: str) -> bool:
    if "/" in text:
        return is_qualified_name(text)
    return text in _STANDARD_RESOURCES or text.startswith("hugepages-")


def _is_inside(text: str) -> bool:
    return not text.startswith("/") and ".." not in text.split("/")


_DNS = "a-z, 0-9 and -, starting and ending with a letter or digit"
FORMATS = {
    "dns-label": Format(is_dns_label, f"a DNS label ({_DNS}, at most 63 characters)"),
    "dns-subdomain": Format(is_dns_subdomain, f"a DNS name ({_DNS}, with dots between labels)"),
    "qualified-name": Format(
        is_qualified_name,
        "a label key (letters, digits, - _ ., at most 63 characters; optionally prefixed by a DNS "
        "name and a slash)",
    ),
    "annotation-key": Format(
        lambda text: is_qualified_name(text.lower()),
        "an annotation key (letters, digits, - _ ., at most 63 characters; optionally prefixed by "
        "a DNS name and a slash)",
    ),
    "label-value": Format(
        is_label_value, "a label value (letters, digits, - _ ., at most 63 characters, no spaces)"
    ),
    "port-name": Format(
        _is_port_name, "a port name (at most 15 characters: a-z, 0-9 and -, at least one letter)"
    ),
    "port": Format(_is_port, "a port: 1 to 65535, or a port name", of_numbers=True),
    "quantity": Format(_is_amount, "a quantity, such as 500m or 16Gi", of_numbers=True),
    "image": Format(_is_image, "an image reference: REGISTRY/NAME:TAG, lower case, without spaces"),
    "config-key": Format(_text("[-._a-zA-Z0-9]+", 253), "a key (letters, digits, - _ .)"),
    "base64": Format(_is_base64, "base64; use stringData for plain text"),
    "cidr": Format(_is_network, "a network in CIDR notation, such as 10.0.0.0/8"),
    "word": Format(_text(r"\S+", 253), "a word without spaces"),
    "path-inside": Format(_is_inside, "a relative path without .."),
    "field-path": Format(
        re.compile(
            r"metadata\.(name|namespace|uid|labels|annotations)(\[.+\])?"
            r"|spec\.(nodeName|serviceAccountName)|status\.(hostIPs?|podIPs?)"
        ).fullmatch,
        "a field of the pod, such as metadata.name or status.podIP",
    ),
    "share": Format(
        lambda value: isinstance(value, int) or re.fullmatch("[0-9]+%", value) is not None,
        "a number of pods or a percentage, such as 1 or 50%",
    ),
    "resource-name": Format(
        _is_resource_name,
        f"a resource: {', '.join(_STANDARD_RESOURCES)}, or one with a vendor's name, such as "
        "nvidia.com/gpu",
    ),
}


_DURATION = re.compile(r"(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:ns|us|µs|ms|s|m|h)")


def is_duration(text: str) -> bool:
    """Return whether a string is a positive Go duration, such as ``1h30m``."""
    return bool(re.fullmatch(f"(?:{_DURATION.pattern})+", text)) and bool(re.search("[1-9]", text))


def did_you_mean(word: Any, known: Iterable[str], alike: float = 0.65) -> str:
    """Return ``; did you mean 'x'?`` for a misspelt word, or an empty string."""
    words = {name.lower(): name for name in known}
    close = difflib.get_close_matches(str(word).lower(), list(words), n=1, cutoff=alike)
    return f"; did you mean {words[close[0]]!r}?" if close else ""
