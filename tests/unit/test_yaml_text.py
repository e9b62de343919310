"""YAML as people mean it, and what is rejected."""

import math
import pickle
from typing import Any

import pytest

from prioritycut_ray.yaml_text import Number, TextLoader, parse_yaml


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e6", 1e6),
        ("1E6", 1e6),
        ("+1.5e+6", 1.5e6),
        ("2e-4", 2e-4),
        ("-.5", -0.5),
        ("5.", 5.0),
        ("[6e6, 9e6]", [6e6, 9e6]),
        ("{a: 1e-4}", {"a": 1e-4}),
        (".inf", math.inf),
        ("-.INF", -math.inf),
        ("10", 10),
        ("-3", -3),
        ("007", "007"),
        ("0x10", "0x10"),
        ("1_000", "1_000"),
        ("12:30", "12:30"),
        ("1:02:03.5", "1:02:03.5"),
        ("2026-11-29", "2026-11-29"),
        ("2026-11-29 10:00:00", "2026-11-29 10:00:00"),
        ("yes", "yes"),
        ("No", "No"),
        ("on", "on"),
        ("true", True),
        ("FALSE", False),
        ("null", None),
        ("~", None),
        ("", None),
        ("=", "="),
        ("'1e6'", "1e6"),
        ('"true"', "true"),
        ("1e6x", "1e6x"),
        ("e5", "e5"),
        (".", "."),
        ("-", [None]),
    ],
)
def test_a_scalar_is_what_it_looks_like_to_people(text: str, value: Any) -> None:
    read = parse_yaml(text)
    assert read == value
    assert type(read) is type(value) or isinstance(read, Number)


def test_nan_is_a_number() -> None:
    assert math.isnan(parse_yaml(".nan"))


def test_a_number_keeps_its_spelling_and_pickles_as_a_plain_one() -> None:
    number = parse_yaml("1.10")
    assert (number, number.text) == (1.1, "1.10")
    assert type(pickle.loads(pickle.dumps(number))) is float


@pytest.mark.parametrize(
    ("text", "key", "lines"),
    [
        ("train: {samples: 5}\ndata: {}\ntrain: {batch_size: 4}\n", "train", (1, 3)),
        ("a:\n  b: 1\n  c: 2\n  'b': 3\n", "b", (2, 4)),
        ("- x: 1\n  x: 1\n", "x", (1, 2)),
        ("a: [{b: {c: 1, c: 1}}]", "c", (1, 1)),
        ("5: a\n5: b\n", "5", (1, 2)),
        ("? [1]\n: {k: 1, k: 2}\n", "k", (2, 2)),
        ("base: &base {x: 1}\nother:\n  <<: *base\n  y: 1\n  y: 2\n", "y", (4, 5)),
    ],
)
@pytest.mark.parametrize("encode", [str, str.encode, lambda text: text.encode("utf-8-sig")])
def test_a_duplicate_key_is_rejected_with_both_lines(
    text: str, key: str, lines: tuple[int, int], encode: Any
) -> None:
    first, second = lines
    words = f"the key '{key}' is given twice, on line {first} and on line {second}"
    with pytest.raises(ValueError, match=words):
        parse_yaml(encode(text))
    with pytest.raises(ValueError, match=words):
        parse_yaml(encode(text), TextLoader)


def test_equal_keys_of_different_mappings_and_merged_keys_are_not_duplicates() -> None:
    text = """
a: &a {x: 1, y: 1}
nested: {b: &b {<<: *a, x: 2}}
c: {<<: *b, x: 3}
d: *b
e: {<<: *a, <<: *b}
"""
    tree = parse_yaml(text)
    assert tree["nested"]["b"] == tree["d"] == {"x": 2, "y": 1}
    assert tree["c"] == {"x": 3, "y": 1}


@pytest.mark.parametrize(
    "text",
    [
        "a: [",
        "a: b: c",
        "\x00",
        "a: 1\n---\nb: 2\n",
        "!!python/object:os.x {}",
        "[" * 3000,
        b"\xff",
    ],
)
def test_invalid_yaml_is_an_error_of_one_line(text: str | bytes) -> None:
    with pytest.raises(ValueError, match=r"\w") as caught:
        parse_yaml(text)
    assert "\n" not in str(caught.value)
